"""WorkerService and IdentityService: translate calls to the worker registry and to the keys."""

from functools import partial
from typing import Final

from treadle.errors import make_error
from treadle.internal.v1 import identity_pb2, identity_pb2_grpc, workers_pb2, workers_pb2_grpc
from treadle.v1 import admin_pb2
from treadle_store import identity
from treadle_store.clock import Clock
from treadle_store.database import Database
from treadle_store.workers import WorkerRegistry

MAX_TTL_SECONDS: Final = 3600.0
MAX_CHECKED_KEYS: Final = 1000


class WorkerService(workers_pb2_grpc.WorkerServiceServicer):
    """Keeps track of workers by heartbeat."""

    def __init__(self, workers: WorkerRegistry) -> None:
        self._workers = workers

    async def Heartbeat(self, request: workers_pb2.HeartbeatRequest, context: object) -> workers_pb2.HeartbeatResponse:
        """Registers a worker or renews its registration."""
        ttl_seconds = request.ttl.ToNanoseconds() / 1e9
        if not 0 < ttl_seconds <= MAX_TTL_SECONDS:
            raise make_error("BAD_VALUE", "ttl must be above 0 and at most an hour")
        self._workers.beat(workers_pb2.WorkerEntry(worker=request.worker, base=request.base), ttl_seconds)
        return workers_pb2.HeartbeatResponse()

    async def ScanWorkers(
        self, request: workers_pb2.ScanWorkersRequest, context: object
    ) -> workers_pb2.ScanWorkersResponse:
        """Lists the live workers, of one kind or base if asked so."""
        wanted = [
            entry
            for entry in self._workers.live()
            if request.kind in (entry.worker.kind, admin_pb2.WORKER_KIND_UNSPECIFIED)
            and request.base in (entry.worker.base, "")
        ]
        return workers_pb2.ScanWorkersResponse(workers=wanted)

    async def Unregister(
        self, request: workers_pb2.UnregisterRequest, context: object
    ) -> workers_pb2.UnregisterResponse:
        """Removes a worker at its own wish."""
        self._workers.remove(request.worker)
        return workers_pb2.UnregisterResponse()


class IdentityService(identity_pb2_grpc.IdentityServiceServicer):
    """Verifies API keys."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    async def Authenticate(
        self, request: identity_pb2.AuthenticateRequest, context: object
    ) -> identity_pb2.AuthenticateResponse:
        """Returns the principal of a key."""
        body = partial(identity.authenticate, secret=request.secret, now_us=self._clock())
        principal = await self._database.read(body)
        return identity_pb2.AuthenticateResponse(
            tenant=principal.tenant, scopes=sorted(principal.scopes), key_id=principal.key_id
        )

    async def CheckKeys(
        self, request: identity_pb2.CheckKeysRequest, context: object
    ) -> identity_pb2.CheckKeysResponse:
        """Tells which keys have ended."""
        if len(request.key_ids) > MAX_CHECKED_KEYS:
            raise make_error("BAD_VALUE", f"at most {MAX_CHECKED_KEYS} keys are checked at once")
        body = partial(identity.ended_keys, key_ids=request.key_ids, now_us=self._clock())
        return identity_pb2.CheckKeysResponse(ended_key_ids=await self._database.read(body))
