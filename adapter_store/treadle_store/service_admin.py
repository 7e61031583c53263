"""AdminService: translates calls to tenants, keys, quotas, usage and the worker registry.

All but GetCapabilities need `admin`; GetQuota and GetUsage do for another tenant than the caller's.
"""

from functools import partial
from importlib.metadata import version
from typing import Final

from treadle.v1 import admin_pb2, admin_pb2_grpc
from treadle_service.principal import current_principal
from treadle_store import identity, quotas, usage
from treadle_store.clock import Clock
from treadle_store.database import Database
from treadle_store.pages import PageRequest
from treadle_store.workers import WorkerRegistry

LOSSES: Final = ("cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "gspo", "stable_reinforce")
MAX_FRAME_BYTES: Final = 2**20
MAX_OPERATION_BYTES: Final = 32 * 2**20


class AdminService(admin_pb2_grpc.AdminServiceServicer):
    """Manages tenants and keys, and says what the deployment can do."""

    def __init__(self, database: Database, workers: WorkerRegistry, clock: Clock) -> None:
        self._database = database
        self._workers = workers
        self._clock = clock

    async def CreateTenant(
        self, request: admin_pb2.CreateTenantRequest, context: object
    ) -> admin_pb2.CreateTenantResponse:
        """Creates a tenant."""
        current_principal().require("admin")
        body = partial(identity.create_tenant, tenant=request.tenant, now_us=self._clock())
        return admin_pb2.CreateTenantResponse(tenant=await self._database.write(body))

    async def UpdateTenant(
        self, request: admin_pb2.UpdateTenantRequest, context: object
    ) -> admin_pb2.UpdateTenantResponse:
        """Changes settings of a tenant."""
        current_principal().require("admin")
        consent = request.store_completions if request.HasField("store_completions") else None
        body = partial(identity.update_tenant, tenant=request.tenant, store_completions=consent)
        return admin_pb2.UpdateTenantResponse(tenant=await self._database.write(body))

    async def ListTenants(
        self, request: admin_pb2.ListTenantsRequest, context: object
    ) -> admin_pb2.ListTenantsResponse:
        """Lists all tenants."""
        current_principal().require("admin")
        return admin_pb2.ListTenantsResponse(tenants=await self._database.read(identity.list_tenants))

    async def CreateKey(self, request: admin_pb2.CreateKeyRequest, context: object) -> admin_pb2.CreateKeyResponse:
        """Issues an API key and shows its secret this once."""
        current_principal().require("admin")
        now_us = self._clock()
        expires_us = request.expires.ToMicroseconds() if request.HasField("expires") else None
        key = identity.make_key(request.tenant, request.scopes, expires_us, now_us)
        stored = await self._database.write(partial(identity.add_key, key=key, now_us=now_us))
        return admin_pb2.CreateKeyResponse(key=stored, secret=key.secret)

    async def ListKeys(self, request: admin_pb2.ListKeysRequest, context: object) -> admin_pb2.ListKeysResponse:
        """Lists keys without their secrets."""
        current_principal().require("admin")
        keys = await self._database.read(partial(identity.list_keys, tenant=request.tenant))
        return admin_pb2.ListKeysResponse(keys=keys)

    async def RevokeKey(self, request: admin_pb2.RevokeKeyRequest, context: object) -> admin_pb2.RevokeKeyResponse:
        """Revokes a key."""
        current_principal().require("admin")
        await self._database.write(partial(identity.revoke_key, key_id=request.key_id))
        return admin_pb2.RevokeKeyResponse()

    async def GetCapabilities(
        self, request: admin_pb2.GetCapabilitiesRequest, context: object
    ) -> admin_pb2.GetCapabilitiesResponse:
        """Says which bases are served and with which limits."""
        return admin_pb2.GetCapabilitiesResponse(
            bases=self._workers.bases(),
            version=version("treadle"),
            losses=LOSSES,
            max_frame_bytes=MAX_FRAME_BYTES,
            max_operation_bytes=MAX_OPERATION_BYTES,
            tenant=current_principal().tenant,
        )

    async def ListWorkers(
        self, request: admin_pb2.ListWorkersRequest, context: object
    ) -> admin_pb2.ListWorkersResponse:
        """Lists the live workers."""
        current_principal().require("admin")
        return admin_pb2.ListWorkersResponse(workers=[entry.worker for entry in self._workers.live()])

    async def SetQuota(self, request: admin_pb2.SetQuotaRequest, context: object) -> admin_pb2.SetQuotaResponse:
        """Sets what a tenant may use."""
        current_principal().require("admin")
        body = partial(quotas.set_quota, tenant=request.tenant, quota=request.quota, now_us=self._clock())
        return admin_pb2.SetQuotaResponse(quota=await self._database.write(body))

    async def GetQuota(self, request: admin_pb2.GetQuotaRequest, context: object) -> admin_pb2.GetQuotaResponse:
        """Returns what a tenant may use."""
        body = partial(quotas.get_quota, tenant=_own_tenant(request.tenant))
        return admin_pb2.GetQuotaResponse(quota=await self._database.read(body))

    async def GetUsage(self, request: admin_pb2.GetUsageRequest, context: object) -> admin_pb2.GetUsageResponse:
        """Returns what a tenant has used."""
        first = request.since.ToMicroseconds() // usage.DAY_US
        last = (request.until.ToMicroseconds() if request.HasField("until") else self._clock()) // usage.DAY_US
        body = partial(
            usage.read_usage,
            tenant=_own_tenant(request.tenant),
            span=usage.Span(first, last),
            page=PageRequest(request.page_size, request.page_token),
            now_us=self._clock(),
        )
        return await self._database.read(body)


def _own_tenant(asked: str) -> str:
    """Returns the tenant that is asked about; raises PERMISSION_DENIED for another's, whether there is one or not."""
    principal = current_principal()
    if asked not in ("", principal.tenant):
        principal.require("admin")
    return asked or principal.tenant
