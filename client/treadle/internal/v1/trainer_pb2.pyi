import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from treadle.v1 import admin_pb2 as _admin_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetTrainerStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetTrainerStatusResponse(_message.Message):
    __slots__ = ("resident_runs", "queued_operations", "num_passes", "num_tokens", "busy", "num_shared_passes", "max_tokens_per_pass", "pass_cost", "pace", "target_pass")
    RESIDENT_RUNS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_OPERATIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_PASSES_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BUSY_FIELD_NUMBER: _ClassVar[int]
    NUM_SHARED_PASSES_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_PER_PASS_FIELD_NUMBER: _ClassVar[int]
    PASS_COST_FIELD_NUMBER: _ClassVar[int]
    PACE_FIELD_NUMBER: _ClassVar[int]
    TARGET_PASS_FIELD_NUMBER: _ClassVar[int]
    resident_runs: _containers.RepeatedScalarFieldContainer[str]
    queued_operations: int
    num_passes: int
    num_tokens: int
    busy: _duration_pb2.Duration
    num_shared_passes: int
    max_tokens_per_pass: int
    pass_cost: _admin_pb2.PassCost
    pace: float
    target_pass: _duration_pb2.Duration
    def __init__(self, resident_runs: _Optional[_Iterable[str]] = ..., queued_operations: _Optional[int] = ..., num_passes: _Optional[int] = ..., num_tokens: _Optional[int] = ..., busy: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., num_shared_passes: _Optional[int] = ..., max_tokens_per_pass: _Optional[int] = ..., pass_cost: _Optional[_Union[_admin_pb2.PassCost, _Mapping]] = ..., pace: _Optional[float] = ..., target_pass: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class ListPassesRequest(_message.Message):
    __slots__ = ("limit", "after")
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    limit: int
    after: _timestamp_pb2.Timestamp
    def __init__(self, limit: _Optional[int] = ..., after: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class PassShare(_message.Message):
    __slots__ = ("run", "num_tokens", "seqs")
    RUN_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SEQS_FIELD_NUMBER: _ClassVar[int]
    run: str
    num_tokens: int
    seqs: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, run: _Optional[str] = ..., num_tokens: _Optional[int] = ..., seqs: _Optional[_Iterable[int]] = ...) -> None: ...

class Pass(_message.Message):
    __slots__ = ("started", "took", "shares", "num_steps_beside", "expected")
    STARTED_FIELD_NUMBER: _ClassVar[int]
    TOOK_FIELD_NUMBER: _ClassVar[int]
    SHARES_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_BESIDE_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_FIELD_NUMBER: _ClassVar[int]
    started: _timestamp_pb2.Timestamp
    took: _duration_pb2.Duration
    shares: _containers.RepeatedCompositeFieldContainer[PassShare]
    num_steps_beside: int
    expected: _duration_pb2.Duration
    def __init__(self, started: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., took: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., shares: _Optional[_Iterable[_Union[PassShare, _Mapping]]] = ..., num_steps_beside: _Optional[int] = ..., expected: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class ListPassesResponse(_message.Message):
    __slots__ = ("passes",)
    PASSES_FIELD_NUMBER: _ClassVar[int]
    passes: _containers.RepeatedCompositeFieldContainer[Pass]
    def __init__(self, passes: _Optional[_Iterable[_Union[Pass, _Mapping]]] = ...) -> None: ...

class EvictRunRequest(_message.Message):
    __slots__ = ("run",)
    RUN_FIELD_NUMBER: _ClassVar[int]
    run: str
    def __init__(self, run: _Optional[str] = ...) -> None: ...

class EvictRunResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class OfferRunRequest(_message.Message):
    __slots__ = ("run", "base", "demand", "load", "state_bytes")
    RUN_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    DEMAND_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    STATE_BYTES_FIELD_NUMBER: _ClassVar[int]
    run: str
    base: str
    demand: float
    load: float
    state_bytes: int
    def __init__(self, run: _Optional[str] = ..., base: _Optional[str] = ..., demand: _Optional[float] = ..., load: _Optional[float] = ..., state_bytes: _Optional[int] = ...) -> None: ...

class OfferRunResponse(_message.Message):
    __slots__ = ("accepted",)
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    accepted: bool
    def __init__(self, accepted: bool = ...) -> None: ...

class TakeRunRequest(_message.Message):
    __slots__ = ("run",)
    RUN_FIELD_NUMBER: _ClassVar[int]
    run: str
    def __init__(self, run: _Optional[str] = ...) -> None: ...

class TakeRunResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
