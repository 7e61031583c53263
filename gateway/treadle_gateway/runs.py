"""Creating, reading, listing and deleting runs: translated into calls of the store, and of the trainer for eviction.

Knows nothing of the operations of a run.
"""

from typing import TYPE_CHECKING, Any, cast

import grpc

from treadle.errors import make_error
from treadle.internal.v1 import journal_pb2, trainer_pb2, trainer_pb2_grpc
from treadle.v1 import training_pb2
from treadle_gateway.directory import STORE_SECONDS, Directory, run_not_found, store_error
from treadle_gateway.forward import Upstreams
from treadle_gateway.routing import no_worker
from treadle_service import failpoints
from treadle_service.logs import get_logger
from treadle_service.principal import Principal, current_principal

if TYPE_CHECKING:
    Handler = grpc.RpcMethodHandler[Any, Any]  # Any: each method has its own messages.
    CreateContext = grpc.aio.ServicerContext[training_pb2.CreateRunRequest, training_pb2.CreateRunResponse]
    GetContext = grpc.aio.ServicerContext[training_pb2.GetRunRequest, training_pb2.GetRunResponse]
    ListContext = grpc.aio.ServicerContext[training_pb2.ListRunsRequest, training_pb2.ListRunsResponse]
    DeleteContext = grpc.aio.ServicerContext[training_pb2.DeleteRunRequest, training_pb2.DeleteRunResponse]

log = get_logger(__name__)
_EVICT_SECONDS = 10.0


class RunService:
    """The methods of TrainingService that no trainer is needed for."""

    def __init__(self, directory: Directory, upstreams: Upstreams) -> None:
        self._directory = directory
        self._upstreams = upstreams

    def handlers(self) -> dict[str, "Handler"]:
        """Returns the handlers by path."""
        typed: dict[str, tuple[Any, Any, Any]] = {  # Any: behaviour, request class, response class of each method.
            "CreateRun": (self.create_run, training_pb2.CreateRunRequest, training_pb2.CreateRunResponse),
            "GetRun": (self.get_run, training_pb2.GetRunRequest, training_pb2.GetRunResponse),
            "ListRuns": (self.list_runs, training_pb2.ListRunsRequest, training_pb2.ListRunsResponse),
            "DeleteRun": (self.delete_run, training_pb2.DeleteRunRequest, training_pb2.DeleteRunResponse),
        }
        make = cast(Any, grpc.unary_unary_rpc_method_handler)  # types-grpcio knows only synchronous behaviours.
        return {
            f"/treadle.v1.TrainingService/{name}": make(
                behaviour, request_deserializer=request.FromString, response_serializer=response.SerializeToString
            )
            for name, (behaviour, request, response) in typed.items()
        }

    async def create_run(
        self, request: training_pb2.CreateRunRequest, _: "CreateContext"
    ) -> training_pb2.CreateRunResponse:
        """Registers a run on a base that trainers serve."""
        principal = current_principal()
        if not request.from_adapter or request.base:
            await self._check_base(request.base)
        try:
            with failpoints.around("gateway.register_run"):
                answer = await self._directory.journal.RegisterRun(
                    journal_pb2.RegisterRunRequest(tenant=principal.tenant, run=request),
                    metadata=self._directory.internal_metadata(principal),
                    timeout=STORE_SECONDS,
                )
        except grpc.aio.AioRpcError as error:
            raise store_error(error) from error
        return training_pb2.CreateRunResponse(run=answer.run, replayed=answer.replayed)

    async def get_run(self, request: training_pb2.GetRunRequest, _: "GetContext") -> training_pb2.GetRunResponse:
        """Returns a run as the store knows it now."""
        self._directory.forget_run(request.name)
        found = await self._directory.lookup_run(request.name, current_principal())
        return training_pb2.GetRunResponse(run=found.run)

    async def list_runs(self, request: training_pb2.ListRunsRequest, _: "ListContext") -> training_pb2.ListRunsResponse:
        """Lists the tenant's runs."""
        principal = current_principal()
        try:
            answer = await self._directory.journal.ScanRuns(
                journal_pb2.ScanRunsRequest(
                    tenant=principal.tenant, page_size=request.page_size, page_token=request.page_token
                ),
                metadata=self._directory.internal_metadata(principal),
                timeout=STORE_SECONDS,
            )
        except grpc.aio.AioRpcError as error:
            raise store_error(error) from error
        return training_pb2.ListRunsResponse(runs=answer.runs, next_page_token=answer.next_page_token)

    async def delete_run(
        self, request: training_pb2.DeleteRunRequest, _: "DeleteContext"
    ) -> training_pb2.DeleteRunResponse:
        """Takes the run from its trainer, then from the store."""
        principal = current_principal()
        self._directory.forget_run(request.name)
        found = await self._directory.lookup_run(request.name, principal)
        await self._evict(request.name, found.lease, principal)
        try:
            await self._directory.journal.RemoveRun(
                journal_pb2.RemoveRunRequest(run=request.name),
                metadata=self._directory.internal_metadata(principal),
                timeout=STORE_SECONDS,
            )
        except grpc.aio.AioRpcError as error:
            raised = store_error(error)
            raise run_not_found(request.name) if raised.reason == "RUN_NOT_FOUND" else raised from error
        finally:
            self._directory.forget_run(request.name)
        return training_pb2.DeleteRunResponse()

    async def _check_base(self, base: str) -> None:
        if base not in self._directory.table.bases("trainer"):
            await self._directory.look_again()
        served = self._directory.table.bases("trainer")
        if base in served:
            return
        if not served:
            raise no_worker("trainer", base)
        raise make_error("UNKNOWN_BASE", f"the base {base[:200]!r} is not served here; there is {', '.join(served)}")

    async def _evict(self, run: str, lease: journal_pb2.Lease, principal: Principal) -> None:
        """Asks the holder to drop the run; one that does not answer finds out at its next write to the journal."""
        if not lease.holder or lease.remaining.ToNanoseconds() <= 0:
            return
        workers = self._directory.table.workers
        address = next((w.address for w in workers if w.worker == lease.holder), lease.address)
        with self._upstreams.use(address) as channel:
            try:
                await trainer_pb2_grpc.TrainerServiceStub(channel).EvictRun(
                    trainer_pb2.EvictRunRequest(run=run),
                    metadata=self._directory.internal_metadata(principal),
                    timeout=_EVICT_SECONDS,
                )
            except grpc.aio.AioRpcError as error:
                log.warning("evict_failed", run=run, address=address, code=error.code().name)
