"""What a key must be allowed to do, per method of the public services; a method that is not listed is refused.

Knows nothing of keys or tenants.
"""

from typing import Final

from treadle.errors import make_error
from treadle_service.principal import Principal

TRAIN: Final = ("train",)
SAMPLE: Final = ("sample",)
READ: Final = ("train", "sample")
ADMIN: Final = ("admin",)
ANY_KEY: Final = ("train", "sample", "admin")

# Any one of the scopes is enough.
METHOD_SCOPES: Final[dict[str, tuple[str, ...]]] = {
    "/treadle.v1.TrainingService/CreateRun": TRAIN,
    "/treadle.v1.TrainingService/GetRun": TRAIN,
    "/treadle.v1.TrainingService/ListRuns": TRAIN,
    "/treadle.v1.TrainingService/DeleteRun": TRAIN,
    "/treadle.v1.TrainingService/StreamOperations": TRAIN,
    "/treadle.v1.TrainingService/SubmitOperation": TRAIN,
    "/treadle.v1.TrainingService/WaitOperation": TRAIN,
    "/treadle.v1.TrainingService/CancelOperations": TRAIN,
    "/treadle.v1.SamplingService/Sample": SAMPLE,
    "/treadle.v1.SamplingService/StreamSample": SAMPLE,
    "/treadle.v1.SamplingService/ComputeLogprobs": SAMPLE,
    "/treadle.v1.SamplingService/GetTokenizer": READ,
    # A key that may only sample, in some application, adds to what is kept; it does not read what others have asked.
    "/treadle.v1.DatasetService/CreateCompletion": SAMPLE,
    "/treadle.v1.DatasetService/ListCompletions": TRAIN,
    "/treadle.v1.DatasetService/GetCompletion": TRAIN,
    "/treadle.v1.DatasetService/UpdateCompletion": TRAIN,
    "/treadle.v1.DatasetService/DeleteCompletion": TRAIN,
    "/treadle.v1.DatasetService/DeleteCompletions": TRAIN,
    "/treadle.v1.AdapterService/ListRevisions": READ,
    "/treadle.v1.AdapterService/GetRevision": READ,
    "/treadle.v1.AdapterService/DeleteRevision": TRAIN,
    "/treadle.v1.AdapterService/ListCheckpoints": READ,
    "/treadle.v1.AdapterService/GetCheckpoint": READ,
    "/treadle.v1.AdapterService/DeleteCheckpoint": TRAIN,
    "/treadle.v1.AdapterService/SetAdapterTtl": TRAIN,
    "/treadle.v1.AdapterService/SetAdapterPublic": TRAIN,
    "/treadle.v1.AdapterService/CopyAdapter": TRAIN,
    # A key that may only sample must not carry the weights away.
    "/treadle.v1.AdapterService/PullAdapter": TRAIN,
    "/treadle.v1.AdapterService/PushAdapter": TRAIN,
    "/treadle.v1.MetricsService/LogMetrics": TRAIN,
    "/treadle.v1.MetricsService/ListMetrics": TRAIN,
    "/treadle.v1.MetricsService/ListSamples": TRAIN,
    "/treadle.v1.TimelineService/ListSpans": ANY_KEY,
    "/treadle.v1.AdminService/CreateTenant": ADMIN,
    "/treadle.v1.AdminService/UpdateTenant": ADMIN,
    "/treadle.v1.AdminService/ListTenants": ADMIN,
    "/treadle.v1.AdminService/CreateKey": ADMIN,
    "/treadle.v1.AdminService/ListKeys": ADMIN,
    "/treadle.v1.AdminService/RevokeKey": ADMIN,
    "/treadle.v1.AdminService/GetCapabilities": ANY_KEY,
    "/treadle.v1.AdminService/ListWorkers": ADMIN,
    "/treadle.v1.AdminService/SetQuota": ADMIN,
    # Of the key's own tenant; of another one the store wants the scope admin.
    "/treadle.v1.AdminService/GetQuota": ANY_KEY,
    "/treadle.v1.AdminService/GetUsage": ANY_KEY,
}


def check_scope(principal: Principal, method: str) -> None:
    """Raises PERMISSION_DENIED unless `principal` may call `method` (`/package.Service/Method`)."""
    wanted = METHOD_SCOPES.get(method, ())
    if principal.scopes.isdisjoint(wanted):
        need = " or ".join(map(repr, wanted)) or "that no key has"
        raise make_error("PERMISSION_DENIED", f"{method.rpartition('/')[2]} needs a key with the scope {need}")
