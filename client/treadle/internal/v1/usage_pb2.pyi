import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Allowance(_message.Message):
    __slots__ = ("tokens_per_minute", "debt")
    TOKENS_PER_MINUTE_FIELD_NUMBER: _ClassVar[int]
    DEBT_FIELD_NUMBER: _ClassVar[int]
    tokens_per_minute: int
    debt: _duration_pb2.Duration
    def __init__(self, tokens_per_minute: _Optional[int] = ..., debt: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class Budget(_message.Message):
    __slots__ = ("tenant", "training", "sampling", "max_unfinished_operations")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    TRAINING_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    MAX_UNFINISHED_OPERATIONS_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    training: Allowance
    sampling: Allowance
    max_unfinished_operations: int
    def __init__(self, tenant: _Optional[str] = ..., training: _Optional[_Union[Allowance, _Mapping]] = ..., sampling: _Optional[_Union[Allowance, _Mapping]] = ..., max_unfinished_operations: _Optional[int] = ...) -> None: ...

class GetBudgetsRequest(_message.Message):
    __slots__ = ("tenants",)
    TENANTS_FIELD_NUMBER: _ClassVar[int]
    tenants: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, tenants: _Optional[_Iterable[str]] = ...) -> None: ...

class GetBudgetsResponse(_message.Message):
    __slots__ = ("budgets",)
    BUDGETS_FIELD_NUMBER: _ClassVar[int]
    budgets: _containers.RepeatedCompositeFieldContainer[Budget]
    def __init__(self, budgets: _Optional[_Iterable[_Union[Budget, _Mapping]]] = ...) -> None: ...

class SamplingUse(_message.Message):
    __slots__ = ("tenant", "run", "num_requests", "prompt_tokens", "sampled_tokens", "device_us")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    NUM_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_US_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    run: str
    num_requests: int
    prompt_tokens: int
    sampled_tokens: int
    device_us: int
    def __init__(self, tenant: _Optional[str] = ..., run: _Optional[str] = ..., num_requests: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., sampled_tokens: _Optional[int] = ..., device_us: _Optional[int] = ...) -> None: ...

class ReportUsageRequest(_message.Message):
    __slots__ = ("reporter", "seq", "uses")
    REPORTER_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    USES_FIELD_NUMBER: _ClassVar[int]
    reporter: str
    seq: int
    uses: _containers.RepeatedCompositeFieldContainer[SamplingUse]
    def __init__(self, reporter: _Optional[str] = ..., seq: _Optional[int] = ..., uses: _Optional[_Iterable[_Union[SamplingUse, _Mapping]]] = ...) -> None: ...

class ReportUsageResponse(_message.Message):
    __slots__ = ("budgets",)
    BUDGETS_FIELD_NUMBER: _ClassVar[int]
    budgets: _containers.RepeatedCompositeFieldContainer[Budget]
    def __init__(self, budgets: _Optional[_Iterable[_Union[Budget, _Mapping]]] = ...) -> None: ...
