"""The public services as the gateway answers them: a few methods itself, all others forwarded as bytes.

Every method of these services gets a handler from the services' own descriptors, so that none can be forgotten.
Knows nothing of keys: the principal is there when a handler runs.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any, Final

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass

from treadle.errors import TreadleError, make_error
from treadle.v1 import adapters_pb2, admin_pb2, datasets_pb2, metrics_pb2, sampling_pb2, timeline_pb2, training_pb2
from treadle_gateway.directory import Directory
from treadle_gateway.forward import Forwarder, Target
from treadle_gateway.routing import RETRY_SECONDS, pick_sampler
from treadle_gateway.runs import RunService
from treadle_gateway.timeline import Timeline
from treadle_service import failpoints
from treadle_service.principal import current_principal

if TYPE_CHECKING:
    Handler = grpc.RpcMethodHandler[Any, Any]  # Any: each method has its own messages, most are bytes here.
    Context = grpc.aio.ServicerContext[bytes, bytes]

PUBLIC_SERVICES: Final[tuple[ServiceDescriptor, ...]] = (
    training_pb2.DESCRIPTOR.services_by_name["TrainingService"],
    sampling_pb2.DESCRIPTOR.services_by_name["SamplingService"],
    adapters_pb2.DESCRIPTOR.services_by_name["AdapterService"],
    datasets_pb2.DESCRIPTOR.services_by_name["DatasetService"],
    admin_pb2.DESCRIPTOR.services_by_name["AdminService"],
    metrics_pb2.DESCRIPTOR.services_by_name["MetricsService"],
    timeline_pb2.DESCRIPTOR.services_by_name["TimelineService"],
)
RUN_HEADER: Final = "x-treadle-run"
MODEL_HEADER: Final = "x-treadle-model"
_HELLO_SECONDS: Final = 30.0
# Upstream refusals that mean that the run is elsewhere now.
_MOVED: Final = frozenset({"LEASE_HELD", "STALE_LEASE", "WORKER_LOST", "DRAINING", "RUN_NOT_FOUND"})


class Gateway:
    """Chooses an upstream for each call and has it forwarded."""

    def __init__(self, directory: Directory, forwarder: Forwarder, store_address: str) -> None:
        self._directory = directory
        self._forwarder = forwarder
        self._store_address = store_address
        self._runs = RunService(directory, forwarder.upstreams)
        self._timeline = Timeline(directory, forwarder.upstreams)

    def handlers(self) -> dict[str, "Handler"]:
        """Returns the handlers of all public methods by path."""
        own = self._runs.handlers() | self._timeline.handlers()
        methods = [method for service in PUBLIC_SERVICES for method in service.methods]
        return {path(method): own.get(path(method)) or self._raw(method) for method in methods}

    def generic_handlers(self) -> list[grpc.GenericRpcHandler]:
        """Returns one handler per public service."""
        handlers = self.handlers()
        return [
            grpc.method_handlers_generic_handler(
                service.full_name, {method.name: handlers[path(method)] for method in service.methods}
            )
            for service in PUBLIC_SERVICES
        ]

    async def cut_lost_streams(self) -> None:
        """Ends streams to trainers that show no sign of life and have lost the run: a frozen one never would."""
        live = frozenset(worker.address for worker in self._directory.table.workers)
        for target in self._forwarder.streams_outside(live):
            if not await self._directory.holds(target.run, target.address):
                self._forwarder.cut(target)

    def _raw(self, method: MethodDescriptor) -> "Handler":
        """Returns the handler that forwards `method` as bytes, whichever of the four kinds it is."""
        where = path(method)
        if method.client_streaming and method.server_streaming:

            async def stream(requests: AsyncIterator[bytes], context: "Context") -> AsyncIterator[bytes]:
                first = await _first_frame(requests)
                failpoints.reach("gateway.hello")
                target = await self._run_target(_run_of_stream(first))
                async with contextlib.aclosing(
                    self._forwarder.stream(where, _chain(first, requests), context, target)
                ) as responses:
                    async for response in responses:
                        failpoints.reach("gateway.answer")
                        yield response

            return _make(grpc.stream_stream_rpc_method_handler, stream)
        if method.client_streaming:

            async def client_stream(requests: AsyncIterator[bytes], context: "Context") -> bytes:
                return await self._forwarder.client_stream(where, requests, context, self._store_target())

            return _make(grpc.stream_unary_rpc_method_handler, client_stream)
        if method.server_streaming:

            async def server_stream(request: bytes, context: "Context") -> AsyncIterator[bytes]:
                target = await self._target(method, request, context)
                async with contextlib.aclosing(
                    self._forwarder.server_stream(where, request, context, target)
                ) as responses:
                    async for response in responses:
                        yield response

            return _make(grpc.unary_stream_rpc_method_handler, server_stream)

        async def unary(request: bytes, context: "Context") -> bytes:
            target = await self._target(method, request, context)
            return await self._forwarder.unary(where, request, context, target)

        return _make(grpc.unary_unary_rpc_method_handler, unary)

    async def _target(self, method: MethodDescriptor, request: bytes, context: "Context") -> Target:
        service = method.containing_service.name
        if service == "TrainingService":
            return await self._run_target(_header(context, RUN_HEADER) or _parse(method, request).run)
        if service == "SamplingService":
            return await self._model_target(_header(context, MODEL_HEADER) or _model_of(_parse(method, request)))
        return self._store_target()

    async def _run_target(self, run: str) -> Target:
        principal = current_principal()
        address = await self._directory.trainer_of(run, principal)

        def lost() -> TreadleError:
            self._directory.lost(address)
            self._directory.forget_run(run)
            return make_error("WORKER_LOST", f"the trainer of {run} went away; connect again and resume", 0.2)

        def refused(error: TreadleError) -> None:
            if error.reason in _MOVED:
                self._directory.forget_run(run)
            if error.reason == "DRAINING":
                # It says so for as long as it lives, and the list of workers is a moment old.
                self._directory.lost(address)

        return Target(address, self._directory.internal_metadata(principal), lost, refused, run)

    async def _model_target(self, model: str) -> Target:
        principal = current_principal()
        base, adapter = await self._directory.base_of_model(model, principal)
        table = await self._directory.table_for("sampler", base)
        address = pick_sampler(table, base, adapter, self._forwarder.upstreams.in_flight)

        def lost() -> TreadleError:
            self._directory.lost(address)
            return make_error("WORKER_LOST", "the sampler went away; send the same request again", 0.2)

        return Target(address, self._directory.internal_metadata(principal), lost)

    def _store_target(self) -> Target:
        def lost() -> TreadleError:
            return make_error("UNAVAILABLE", "the adapter store cannot be reached now; try again", RETRY_SECONDS)

        return Target(self._store_address, self._directory.internal_metadata(current_principal()), lost)


def path(method: MethodDescriptor) -> str:
    """Returns a method's path on the wire, `/package.Service/Method`."""
    return f"/{method.containing_service.full_name}/{method.name}"


async def _first_frame(requests: AsyncIterator[bytes]) -> bytes:
    """Returns the first frame, empty if there is none; who opens a stream and stays silent does not keep it."""
    try:
        async with asyncio.timeout(_HELLO_SECONDS):
            return await anext(requests, b"")
    except TimeoutError as error:
        raise make_error("BAD_FRAME", f"no Hello came within {_HELLO_SECONDS:.0f} s of opening the stream") from error


async def _chain(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for frame in rest:
        failpoints.reach("gateway.forward")
        yield frame


def _run_of_stream(first: bytes) -> str:
    try:
        frame = training_pb2.StreamOperationsRequest.FromString(first)
    except DecodeError as error:
        raise make_error("BAD_FRAME", "the first frame is not a StreamOperationsRequest") from error
    if frame.WhichOneof("frame") != "hello":
        raise make_error("BAD_FRAME", "a stream of operations begins with a Hello that names the run")
    return frame.hello.run


def _parse(method: MethodDescriptor, request: bytes) -> Any:  # Any: the method's own request, known by its fields.
    message = GetMessageClass(method.input_type)()
    try:
        message.ParseFromString(request)
    except DecodeError as error:
        raise make_error("BAD_VALUE", f"the request is not a {method.input_type.full_name}") from error
    return message


def _model_of(request: Any) -> str:  # Any: one of the requests of the SamplingService.
    model: str = request.request.model if isinstance(request, sampling_pb2.StreamSampleRequest) else request.model
    return model


def _header(context: "Context", name: str) -> str:
    metadata: Mapping[str, Any] = dict(context.invocation_metadata() or ())
    value = metadata.get(name, "")
    return value if isinstance(value, str) else ""


def _make(kind: Any, behaviour: Any) -> "Handler":
    """Returns a handler without serializers; Any because types-grpcio knows only the synchronous behaviours."""
    handler: Handler = kind(behaviour)
    return handler
