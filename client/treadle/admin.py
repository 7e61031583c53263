"""Administration: tenants, keys, quotas, usage, workers, and what the deployment offers. Knows nothing of runs."""

from collections.abc import Sequence
from datetime import datetime
from typing import Final

from treadle.channel import Transport
from treadle.convert import capabilities_from, key_from, worker_from
from treadle.names import check_tenant
from treadle.records import CreatedKey, KeyInfo, ServerCapabilities, UsageInfo, Use, WorkerInfo
from treadle.v1 import admin_pb2, admin_pb2_grpc

_USAGE_PAGE: Final = 500


class AdminCalls:
    """The calls of a service client that administer; they wait for their answer and need the scope `admin`."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._admin = admin_pb2_grpc.AdminServiceStub(transport.ops_channel)

    def get_server_capabilities(self) -> ServerCapabilities:
        """Returns the bases, losses and limits of the deployment; needs no scope."""
        request = admin_pb2.GetCapabilitiesRequest()
        answer: admin_pb2.GetCapabilitiesResponse = self._transport.call(self._admin.GetCapabilities, request)
        return capabilities_from(answer)

    def create_tenant(self, tenant: str) -> str:
        """Creates a tenant and returns its name; raises ConflictError when it exists."""
        request = admin_pb2.CreateTenantRequest(tenant=check_tenant(tenant))
        answer: admin_pb2.CreateTenantResponse = self._transport.call(self._admin.CreateTenant, request, again=False)
        return answer.tenant.tenant

    def list_tenants(self) -> list[str]:
        """Lists all tenants by name."""
        answer: admin_pb2.ListTenantsResponse = self._transport.call(
            self._admin.ListTenants, admin_pb2.ListTenantsRequest()
        )
        return [tenant.tenant for tenant in answer.tenants]

    def create_key(self, tenant: str, scopes: Sequence[str] = (), expires: datetime | None = None) -> CreatedKey:
        """Issues a key (train and sample when no scopes are given); returns it and its secret, shown only here."""
        request = admin_pb2.CreateKeyRequest(tenant=check_tenant(tenant), scopes=scopes)
        if expires is not None:
            request.expires.FromDatetime(expires)
        answer: admin_pb2.CreateKeyResponse = self._transport.call(self._admin.CreateKey, request, again=False)
        return CreatedKey(key_from(answer.key), answer.secret)

    def list_keys(self, tenant: str = "") -> list[KeyInfo]:
        """Lists the keys of a tenant, or of all, without their secrets."""
        answer: admin_pb2.ListKeysResponse = self._transport.call(
            self._admin.ListKeys, admin_pb2.ListKeysRequest(tenant=tenant)
        )
        return [key_from(key) for key in answer.keys]

    def revoke_key(self, key_id: str) -> None:
        """Revokes a key by its public part; raises NotFoundError."""
        self._transport.call(self._admin.RevokeKey, admin_pb2.RevokeKeyRequest(key_id=key_id))

    def get_quota(self, tenant: str = "") -> dict[str, int]:
        """Returns the limits that a tenant has, by their names in `Quota`; the key's own tenant when empty."""
        request = admin_pb2.GetQuotaRequest(tenant=tenant)
        answer: admin_pb2.GetQuotaResponse = self._transport.call(self._admin.GetQuota, request)
        return {field.name: value for field, value in answer.quota.ListFields()}

    def set_quota(self, tenant: str, **limits: int) -> None:
        """Replaces a tenant's quota, for example `training_tokens_per_minute=10**6`; what is not given has no limit."""
        request = admin_pb2.SetQuotaRequest(tenant=check_tenant(tenant), quota=admin_pb2.Quota(**limits))
        self._transport.call(self._admin.SetQuota, request)

    def get_usage(self, tenant: str = "", since: datetime | None = None, until: datetime | None = None) -> UsageInfo:
        """Returns what a tenant (the key's own when empty) has used from one UTC day to another, both included."""
        request = admin_pb2.GetUsageRequest(tenant=tenant, page_size=_USAGE_PAGE)
        if since is not None:
            request.since.FromDatetime(since)
        if until is not None:
            request.until.FromDatetime(until)
        by_run: dict[str, Use] = {}
        while True:
            page: admin_pb2.GetUsageResponse = self._transport.call(self._admin.GetUsage, request)
            by_run |= {part.run: _use_from(part.usage) for part in page.runs}
            request.page_token = page.next_page_token
            if not request.page_token:
                break
        return UsageInfo(
            page.tenant, _use_from(page.total), by_run, page.stored_bytes, page.num_runs, page.num_active_runs
        )

    def list_workers(self) -> list[WorkerInfo]:
        """Lists the live trainers and samplers."""
        answer: admin_pb2.ListWorkersResponse = self._transport.call(
            self._admin.ListWorkers, admin_pb2.ListWorkersRequest()
        )
        return [worker_from(worker) for worker in answer.workers]


def _use_from(usage: admin_pb2.Usage) -> Use:
    return Use(
        usage.num_operations,
        usage.training_tokens,
        usage.prompt_tokens,
        usage.sampled_tokens,
        usage.device_time.ToMicroseconds() / 1e6,
    )
