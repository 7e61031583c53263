import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WorkerKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WORKER_KIND_UNSPECIFIED: _ClassVar[WorkerKind]
    WORKER_KIND_TRAINER: _ClassVar[WorkerKind]
    WORKER_KIND_SAMPLER: _ClassVar[WorkerKind]
WORKER_KIND_UNSPECIFIED: WorkerKind
WORKER_KIND_TRAINER: WorkerKind
WORKER_KIND_SAMPLER: WorkerKind

class Tenant(_message.Message):
    __slots__ = ("tenant", "created", "store_completions")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    STORE_COMPLETIONS_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    created: _timestamp_pb2.Timestamp
    store_completions: bool
    def __init__(self, tenant: _Optional[str] = ..., created: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., store_completions: bool = ...) -> None: ...

class Key(_message.Message):
    __slots__ = ("key_id", "tenant", "scopes", "created", "expires", "revoked")
    KEY_ID_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    SCOPES_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_FIELD_NUMBER: _ClassVar[int]
    REVOKED_FIELD_NUMBER: _ClassVar[int]
    key_id: str
    tenant: str
    scopes: _containers.RepeatedScalarFieldContainer[str]
    created: _timestamp_pb2.Timestamp
    expires: _timestamp_pb2.Timestamp
    revoked: bool
    def __init__(self, key_id: _Optional[str] = ..., tenant: _Optional[str] = ..., scopes: _Optional[_Iterable[str]] = ..., created: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., expires: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., revoked: bool = ...) -> None: ...

class Worker(_message.Message):
    __slots__ = ("worker", "kind", "base", "address", "num_resident", "queue_depth", "last_seen", "draining", "pass_cost", "max_tokens_per_pass", "load", "state_bytes", "max_state_bytes")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NUM_RESIDENT_FIELD_NUMBER: _ClassVar[int]
    QUEUE_DEPTH_FIELD_NUMBER: _ClassVar[int]
    LAST_SEEN_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    PASS_COST_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_PER_PASS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    STATE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_STATE_BYTES_FIELD_NUMBER: _ClassVar[int]
    worker: str
    kind: WorkerKind
    base: str
    address: str
    num_resident: int
    queue_depth: int
    last_seen: _timestamp_pb2.Timestamp
    draining: bool
    pass_cost: PassCost
    max_tokens_per_pass: int
    load: float
    state_bytes: int
    max_state_bytes: int
    def __init__(self, worker: _Optional[str] = ..., kind: _Optional[_Union[WorkerKind, str]] = ..., base: _Optional[str] = ..., address: _Optional[str] = ..., num_resident: _Optional[int] = ..., queue_depth: _Optional[int] = ..., last_seen: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., draining: bool = ..., pass_cost: _Optional[_Union[PassCost, _Mapping]] = ..., max_tokens_per_pass: _Optional[int] = ..., load: _Optional[float] = ..., state_bytes: _Optional[int] = ..., max_state_bytes: _Optional[int] = ...) -> None: ...

class PassCost(_message.Message):
    __slots__ = ("fixed_seconds", "seconds_per_token", "seconds_per_square", "bytes_per_token")
    FIXED_SECONDS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    SECONDS_PER_SQUARE_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    fixed_seconds: float
    seconds_per_token: float
    seconds_per_square: float
    bytes_per_token: int
    def __init__(self, fixed_seconds: _Optional[float] = ..., seconds_per_token: _Optional[float] = ..., seconds_per_square: _Optional[float] = ..., bytes_per_token: _Optional[int] = ...) -> None: ...

class BaseModel(_message.Message):
    __slots__ = ("name", "max_context", "vocab_size", "dtype", "trainable", "sampleable", "tokenizer", "num_parameters", "eos_token_ids", "max_tokens_per_pass")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    TRAINABLE_FIELD_NUMBER: _ClassVar[int]
    SAMPLEABLE_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    NUM_PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_PER_PASS_FIELD_NUMBER: _ClassVar[int]
    name: str
    max_context: int
    vocab_size: int
    dtype: str
    trainable: bool
    sampleable: bool
    tokenizer: str
    num_parameters: int
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    max_tokens_per_pass: int
    def __init__(self, name: _Optional[str] = ..., max_context: _Optional[int] = ..., vocab_size: _Optional[int] = ..., dtype: _Optional[str] = ..., trainable: bool = ..., sampleable: bool = ..., tokenizer: _Optional[str] = ..., num_parameters: _Optional[int] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., max_tokens_per_pass: _Optional[int] = ...) -> None: ...

class CreateTenantRequest(_message.Message):
    __slots__ = ("tenant",)
    TENANT_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    def __init__(self, tenant: _Optional[str] = ...) -> None: ...

class CreateTenantResponse(_message.Message):
    __slots__ = ("tenant",)
    TENANT_FIELD_NUMBER: _ClassVar[int]
    tenant: Tenant
    def __init__(self, tenant: _Optional[_Union[Tenant, _Mapping]] = ...) -> None: ...

class UpdateTenantRequest(_message.Message):
    __slots__ = ("tenant", "store_completions")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    STORE_COMPLETIONS_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    store_completions: bool
    def __init__(self, tenant: _Optional[str] = ..., store_completions: bool = ...) -> None: ...

class UpdateTenantResponse(_message.Message):
    __slots__ = ("tenant",)
    TENANT_FIELD_NUMBER: _ClassVar[int]
    tenant: Tenant
    def __init__(self, tenant: _Optional[_Union[Tenant, _Mapping]] = ...) -> None: ...

class ListTenantsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListTenantsResponse(_message.Message):
    __slots__ = ("tenants",)
    TENANTS_FIELD_NUMBER: _ClassVar[int]
    tenants: _containers.RepeatedCompositeFieldContainer[Tenant]
    def __init__(self, tenants: _Optional[_Iterable[_Union[Tenant, _Mapping]]] = ...) -> None: ...

class CreateKeyRequest(_message.Message):
    __slots__ = ("tenant", "scopes", "expires")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    SCOPES_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    scopes: _containers.RepeatedScalarFieldContainer[str]
    expires: _timestamp_pb2.Timestamp
    def __init__(self, tenant: _Optional[str] = ..., scopes: _Optional[_Iterable[str]] = ..., expires: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class CreateKeyResponse(_message.Message):
    __slots__ = ("key", "secret")
    KEY_FIELD_NUMBER: _ClassVar[int]
    SECRET_FIELD_NUMBER: _ClassVar[int]
    key: Key
    secret: str
    def __init__(self, key: _Optional[_Union[Key, _Mapping]] = ..., secret: _Optional[str] = ...) -> None: ...

class ListKeysRequest(_message.Message):
    __slots__ = ("tenant",)
    TENANT_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    def __init__(self, tenant: _Optional[str] = ...) -> None: ...

class ListKeysResponse(_message.Message):
    __slots__ = ("keys",)
    KEYS_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedCompositeFieldContainer[Key]
    def __init__(self, keys: _Optional[_Iterable[_Union[Key, _Mapping]]] = ...) -> None: ...

class RevokeKeyRequest(_message.Message):
    __slots__ = ("key_id",)
    KEY_ID_FIELD_NUMBER: _ClassVar[int]
    key_id: str
    def __init__(self, key_id: _Optional[str] = ...) -> None: ...

class RevokeKeyResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetCapabilitiesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetCapabilitiesResponse(_message.Message):
    __slots__ = ("bases", "version", "losses", "max_frame_bytes", "max_operation_bytes", "tenant")
    BASES_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    LOSSES_FIELD_NUMBER: _ClassVar[int]
    MAX_FRAME_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_OPERATION_BYTES_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    bases: _containers.RepeatedCompositeFieldContainer[BaseModel]
    version: str
    losses: _containers.RepeatedScalarFieldContainer[str]
    max_frame_bytes: int
    max_operation_bytes: int
    tenant: str
    def __init__(self, bases: _Optional[_Iterable[_Union[BaseModel, _Mapping]]] = ..., version: _Optional[str] = ..., losses: _Optional[_Iterable[str]] = ..., max_frame_bytes: _Optional[int] = ..., max_operation_bytes: _Optional[int] = ..., tenant: _Optional[str] = ...) -> None: ...

class ListWorkersRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListWorkersResponse(_message.Message):
    __slots__ = ("workers",)
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    workers: _containers.RepeatedCompositeFieldContainer[Worker]
    def __init__(self, workers: _Optional[_Iterable[_Union[Worker, _Mapping]]] = ...) -> None: ...

class Quota(_message.Message):
    __slots__ = ("max_runs", "max_active_runs", "max_unfinished_operations", "training_tokens_per_minute", "sampling_tokens_per_minute", "max_stored_bytes")
    MAX_RUNS_FIELD_NUMBER: _ClassVar[int]
    MAX_ACTIVE_RUNS_FIELD_NUMBER: _ClassVar[int]
    MAX_UNFINISHED_OPERATIONS_FIELD_NUMBER: _ClassVar[int]
    TRAINING_TOKENS_PER_MINUTE_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_TOKENS_PER_MINUTE_FIELD_NUMBER: _ClassVar[int]
    MAX_STORED_BYTES_FIELD_NUMBER: _ClassVar[int]
    max_runs: int
    max_active_runs: int
    max_unfinished_operations: int
    training_tokens_per_minute: int
    sampling_tokens_per_minute: int
    max_stored_bytes: int
    def __init__(self, max_runs: _Optional[int] = ..., max_active_runs: _Optional[int] = ..., max_unfinished_operations: _Optional[int] = ..., training_tokens_per_minute: _Optional[int] = ..., sampling_tokens_per_minute: _Optional[int] = ..., max_stored_bytes: _Optional[int] = ...) -> None: ...

class SetQuotaRequest(_message.Message):
    __slots__ = ("tenant", "quota")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    QUOTA_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    quota: Quota
    def __init__(self, tenant: _Optional[str] = ..., quota: _Optional[_Union[Quota, _Mapping]] = ...) -> None: ...

class SetQuotaResponse(_message.Message):
    __slots__ = ("quota",)
    QUOTA_FIELD_NUMBER: _ClassVar[int]
    quota: Quota
    def __init__(self, quota: _Optional[_Union[Quota, _Mapping]] = ...) -> None: ...

class GetQuotaRequest(_message.Message):
    __slots__ = ("tenant",)
    TENANT_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    def __init__(self, tenant: _Optional[str] = ...) -> None: ...

class GetQuotaResponse(_message.Message):
    __slots__ = ("quota",)
    QUOTA_FIELD_NUMBER: _ClassVar[int]
    quota: Quota
    def __init__(self, quota: _Optional[_Union[Quota, _Mapping]] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("num_operations", "training_tokens", "prompt_tokens", "sampled_tokens", "device_time")
    NUM_OPERATIONS_FIELD_NUMBER: _ClassVar[int]
    TRAINING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_TIME_FIELD_NUMBER: _ClassVar[int]
    num_operations: int
    training_tokens: int
    prompt_tokens: int
    sampled_tokens: int
    device_time: _duration_pb2.Duration
    def __init__(self, num_operations: _Optional[int] = ..., training_tokens: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., sampled_tokens: _Optional[int] = ..., device_time: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class RunUsage(_message.Message):
    __slots__ = ("run", "usage")
    RUN_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    run: str
    usage: Usage
    def __init__(self, run: _Optional[str] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ...) -> None: ...

class GetUsageRequest(_message.Message):
    __slots__ = ("tenant", "since", "until", "page_size", "page_token")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    UNTIL_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    since: _timestamp_pb2.Timestamp
    until: _timestamp_pb2.Timestamp
    page_size: int
    page_token: str
    def __init__(self, tenant: _Optional[str] = ..., since: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., until: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class GetUsageResponse(_message.Message):
    __slots__ = ("tenant", "total", "runs", "next_page_token", "stored_bytes", "num_runs", "num_active_runs")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    RUNS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    STORED_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNS_FIELD_NUMBER: _ClassVar[int]
    NUM_ACTIVE_RUNS_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    total: Usage
    runs: _containers.RepeatedCompositeFieldContainer[RunUsage]
    next_page_token: str
    stored_bytes: int
    num_runs: int
    num_active_runs: int
    def __init__(self, tenant: _Optional[str] = ..., total: _Optional[_Union[Usage, _Mapping]] = ..., runs: _Optional[_Iterable[_Union[RunUsage, _Mapping]]] = ..., next_page_token: _Optional[str] = ..., stored_bytes: _Optional[int] = ..., num_runs: _Optional[int] = ..., num_active_runs: _Optional[int] = ...) -> None: ...
