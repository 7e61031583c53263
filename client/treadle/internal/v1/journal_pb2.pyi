import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from treadle.internal.v1 import usage_pb2 as _usage_pb2
from treadle.v1 import adapters_pb2 as _adapters_pb2
from treadle.v1 import training_pb2 as _training_pb2
from treadle.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Lease(_message.Message):
    __slots__ = ("holder", "address", "epoch", "remaining")
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REMAINING_FIELD_NUMBER: _ClassVar[int]
    holder: str
    address: str
    epoch: int
    remaining: _duration_pb2.Duration
    def __init__(self, holder: _Optional[str] = ..., address: _Optional[str] = ..., epoch: _Optional[int] = ..., remaining: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class RegisterRunRequest(_message.Message):
    __slots__ = ("tenant", "run")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    run: _training_pb2.CreateRunRequest
    def __init__(self, tenant: _Optional[str] = ..., run: _Optional[_Union[_training_pb2.CreateRunRequest, _Mapping]] = ...) -> None: ...

class RegisterRunResponse(_message.Message):
    __slots__ = ("run", "replayed")
    RUN_FIELD_NUMBER: _ClassVar[int]
    REPLAYED_FIELD_NUMBER: _ClassVar[int]
    run: _training_pb2.Run
    replayed: bool
    def __init__(self, run: _Optional[_Union[_training_pb2.Run, _Mapping]] = ..., replayed: bool = ...) -> None: ...

class LookupRunRequest(_message.Message):
    __slots__ = ("run",)
    RUN_FIELD_NUMBER: _ClassVar[int]
    run: str
    def __init__(self, run: _Optional[str] = ...) -> None: ...

class LookupRunResponse(_message.Message):
    __slots__ = ("run", "lease")
    RUN_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    run: _training_pb2.Run
    lease: Lease
    def __init__(self, run: _Optional[_Union[_training_pb2.Run, _Mapping]] = ..., lease: _Optional[_Union[Lease, _Mapping]] = ...) -> None: ...

class ScanRunsRequest(_message.Message):
    __slots__ = ("tenant", "page_size", "page_token")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    page_size: int
    page_token: str
    def __init__(self, tenant: _Optional[str] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ScanRunsResponse(_message.Message):
    __slots__ = ("runs", "next_page_token")
    RUNS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    runs: _containers.RepeatedCompositeFieldContainer[_training_pb2.Run]
    next_page_token: str
    def __init__(self, runs: _Optional[_Iterable[_Union[_training_pb2.Run, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class RemoveRunRequest(_message.Message):
    __slots__ = ("run",)
    RUN_FIELD_NUMBER: _ClassVar[int]
    run: str
    def __init__(self, run: _Optional[str] = ...) -> None: ...

class RemoveRunResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ClaimRunRequest(_message.Message):
    __slots__ = ("run", "holder", "address", "ttl")
    RUN_FIELD_NUMBER: _ClassVar[int]
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    TTL_FIELD_NUMBER: _ClassVar[int]
    run: str
    holder: str
    address: str
    ttl: _duration_pb2.Duration
    def __init__(self, run: _Optional[str] = ..., holder: _Optional[str] = ..., address: _Optional[str] = ..., ttl: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class ClaimRunResponse(_message.Message):
    __slots__ = ("run", "lease", "from_adapter", "budget")
    RUN_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    FROM_ADAPTER_FIELD_NUMBER: _ClassVar[int]
    BUDGET_FIELD_NUMBER: _ClassVar[int]
    run: _training_pb2.Run
    lease: Lease
    from_adapter: str
    budget: _usage_pb2.Budget
    def __init__(self, run: _Optional[_Union[_training_pb2.Run, _Mapping]] = ..., lease: _Optional[_Union[Lease, _Mapping]] = ..., from_adapter: _Optional[str] = ..., budget: _Optional[_Union[_usage_pb2.Budget, _Mapping]] = ...) -> None: ...

class RenewLeasesRequest(_message.Message):
    __slots__ = ("holder", "ttl")
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    TTL_FIELD_NUMBER: _ClassVar[int]
    holder: str
    ttl: _duration_pb2.Duration
    def __init__(self, holder: _Optional[str] = ..., ttl: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class RenewLeasesResponse(_message.Message):
    __slots__ = ("held",)
    class HeldEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    HELD_FIELD_NUMBER: _ClassVar[int]
    held: _containers.ScalarMap[str, int]
    def __init__(self, held: _Optional[_Mapping[str, int]] = ...) -> None: ...

class ReleaseRunRequest(_message.Message):
    __slots__ = ("run", "epoch")
    RUN_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    run: str
    epoch: int
    def __init__(self, run: _Optional[str] = ..., epoch: _Optional[int] = ...) -> None: ...

class ReleaseRunResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class JournalAppend(_message.Message):
    __slots__ = ("seq", "digest", "payload", "payload_sha256")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_SHA256_FIELD_NUMBER: _ClassVar[int]
    seq: int
    digest: int
    payload: bytes
    payload_sha256: str
    def __init__(self, seq: _Optional[int] = ..., digest: _Optional[int] = ..., payload: _Optional[bytes] = ..., payload_sha256: _Optional[str] = ...) -> None: ...

class JournalCommit(_message.Message):
    __slots__ = ("seq", "result", "state_digest", "num_tokens", "device_us", "metrics")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    STATE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_US_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    seq: int
    result: bytes
    state_digest: bytes
    num_tokens: int
    device_us: int
    metrics: StepMetrics
    def __init__(self, seq: _Optional[int] = ..., result: _Optional[bytes] = ..., state_digest: _Optional[bytes] = ..., num_tokens: _Optional[int] = ..., device_us: _Optional[int] = ..., metrics: _Optional[_Union[StepMetrics, _Mapping]] = ...) -> None: ...

class StepMetrics(_message.Message):
    __slots__ = ("step", "values")
    class ValuesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    STEP_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    step: int
    values: _containers.ScalarMap[str, float]
    def __init__(self, step: _Optional[int] = ..., values: _Optional[_Mapping[str, float]] = ...) -> None: ...

class JournalEntry(_message.Message):
    __slots__ = ("run", "epoch", "appends", "commits", "acked_seq")
    RUN_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    APPENDS_FIELD_NUMBER: _ClassVar[int]
    COMMITS_FIELD_NUMBER: _ClassVar[int]
    ACKED_SEQ_FIELD_NUMBER: _ClassVar[int]
    run: str
    epoch: int
    appends: _containers.RepeatedCompositeFieldContainer[JournalAppend]
    commits: _containers.RepeatedCompositeFieldContainer[JournalCommit]
    acked_seq: int
    def __init__(self, run: _Optional[str] = ..., epoch: _Optional[int] = ..., appends: _Optional[_Iterable[_Union[JournalAppend, _Mapping]]] = ..., commits: _Optional[_Iterable[_Union[JournalCommit, _Mapping]]] = ..., acked_seq: _Optional[int] = ...) -> None: ...

class WriteJournalRequest(_message.Message):
    __slots__ = ("entries",)
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[JournalEntry]
    def __init__(self, entries: _Optional[_Iterable[_Union[JournalEntry, _Mapping]]] = ...) -> None: ...

class WriteJournalResponse(_message.Message):
    __slots__ = ("errors", "budgets")
    ERRORS_FIELD_NUMBER: _ClassVar[int]
    BUDGETS_FIELD_NUMBER: _ClassVar[int]
    errors: _containers.RepeatedCompositeFieldContainer[_types_pb2.OperationError]
    budgets: _containers.RepeatedCompositeFieldContainer[_usage_pb2.Budget]
    def __init__(self, errors: _Optional[_Iterable[_Union[_types_pb2.OperationError, _Mapping]]] = ..., budgets: _Optional[_Iterable[_Union[_usage_pb2.Budget, _Mapping]]] = ...) -> None: ...

class ReadResultRequest(_message.Message):
    __slots__ = ("run", "seq")
    RUN_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    run: str
    seq: int
    def __init__(self, run: _Optional[str] = ..., seq: _Optional[int] = ...) -> None: ...

class ReadResultResponse(_message.Message):
    __slots__ = ("result",)
    RESULT_FIELD_NUMBER: _ClassVar[int]
    result: bytes
    def __init__(self, result: _Optional[bytes] = ...) -> None: ...

class Snapshot(_message.Message):
    __slots__ = ("seq", "step", "sha256", "size", "state_digest")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    STATE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    seq: int
    step: int
    sha256: str
    size: int
    state_digest: bytes
    def __init__(self, seq: _Optional[int] = ..., step: _Optional[int] = ..., sha256: _Optional[str] = ..., size: _Optional[int] = ..., state_digest: _Optional[bytes] = ...) -> None: ...

class WriteSnapshotRequest(_message.Message):
    __slots__ = ("run", "epoch", "snapshot")
    RUN_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    run: str
    epoch: int
    snapshot: Snapshot
    def __init__(self, run: _Optional[str] = ..., epoch: _Optional[int] = ..., snapshot: _Optional[_Union[Snapshot, _Mapping]] = ...) -> None: ...

class WriteSnapshotResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class MarkDivergedRequest(_message.Message):
    __slots__ = ("run", "epoch", "divergence")
    RUN_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    DIVERGENCE_FIELD_NUMBER: _ClassVar[int]
    run: str
    epoch: int
    divergence: _training_pb2.Divergence
    def __init__(self, run: _Optional[str] = ..., epoch: _Optional[int] = ..., divergence: _Optional[_Union[_training_pb2.Divergence, _Mapping]] = ...) -> None: ...

class MarkDivergedResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RecoverRunRequest(_message.Message):
    __slots__ = ("run", "epoch")
    RUN_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    run: str
    epoch: int
    def __init__(self, run: _Optional[str] = ..., epoch: _Optional[int] = ...) -> None: ...

class JournaledOperation(_message.Message):
    __slots__ = ("seq", "digest", "payload", "payload_sha256", "result", "state_digest")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_SHA256_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    STATE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    seq: int
    digest: int
    payload: bytes
    payload_sha256: str
    result: bytes
    state_digest: bytes
    def __init__(self, seq: _Optional[int] = ..., digest: _Optional[int] = ..., payload: _Optional[bytes] = ..., payload_sha256: _Optional[str] = ..., result: _Optional[bytes] = ..., state_digest: _Optional[bytes] = ...) -> None: ...

class RecoveryHeader(_message.Message):
    __slots__ = ("snapshot", "acked_seq", "last_seq")
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    ACKED_SEQ_FIELD_NUMBER: _ClassVar[int]
    LAST_SEQ_FIELD_NUMBER: _ClassVar[int]
    snapshot: Snapshot
    acked_seq: int
    last_seq: int
    def __init__(self, snapshot: _Optional[_Union[Snapshot, _Mapping]] = ..., acked_seq: _Optional[int] = ..., last_seq: _Optional[int] = ...) -> None: ...

class RecoverRunResponse(_message.Message):
    __slots__ = ("header", "operation")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    OPERATION_FIELD_NUMBER: _ClassVar[int]
    header: RecoveryHeader
    operation: JournaledOperation
    def __init__(self, header: _Optional[_Union[RecoveryHeader, _Mapping]] = ..., operation: _Optional[_Union[JournaledOperation, _Mapping]] = ...) -> None: ...

class RecordAdapterRequest(_message.Message):
    __slots__ = ("run", "epoch", "adapter", "seq", "overwrite")
    RUN_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    OVERWRITE_FIELD_NUMBER: _ClassVar[int]
    run: str
    epoch: int
    adapter: _adapters_pb2.Adapter
    seq: int
    overwrite: bool
    def __init__(self, run: _Optional[str] = ..., epoch: _Optional[int] = ..., adapter: _Optional[_Union[_adapters_pb2.Adapter, _Mapping]] = ..., seq: _Optional[int] = ..., overwrite: bool = ...) -> None: ...

class RecordAdapterResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LookupAdapterRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class LookupAdapterResponse(_message.Message):
    __slots__ = ("adapter",)
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    adapter: _adapters_pb2.Adapter
    def __init__(self, adapter: _Optional[_Union[_adapters_pb2.Adapter, _Mapping]] = ...) -> None: ...
