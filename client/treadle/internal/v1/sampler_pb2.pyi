import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetSamplerStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetSamplerStatusResponse(_message.Message):
    __slots__ = ("cached_revisions", "active_sequences", "waiting_sequences", "num_steps", "num_tokens", "busy")
    CACHED_REVISIONS_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    WAITING_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BUSY_FIELD_NUMBER: _ClassVar[int]
    cached_revisions: _containers.RepeatedScalarFieldContainer[str]
    active_sequences: int
    waiting_sequences: int
    num_steps: int
    num_tokens: int
    busy: _duration_pb2.Duration
    def __init__(self, cached_revisions: _Optional[_Iterable[str]] = ..., active_sequences: _Optional[int] = ..., waiting_sequences: _Optional[int] = ..., num_steps: _Optional[int] = ..., num_tokens: _Optional[int] = ..., busy: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class PrefetchRevisionRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class PrefetchRevisionResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListDecodeStepsRequest(_message.Message):
    __slots__ = ("limit", "after")
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    limit: int
    after: _timestamp_pb2.Timestamp
    def __init__(self, limit: _Optional[int] = ..., after: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class DecodeStep(_message.Message):
    __slots__ = ("started", "took", "num_sequences", "num_tokens", "sequences_by_tenant")
    class SequencesByTenantEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    STARTED_FIELD_NUMBER: _ClassVar[int]
    TOOK_FIELD_NUMBER: _ClassVar[int]
    NUM_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_BY_TENANT_FIELD_NUMBER: _ClassVar[int]
    started: _timestamp_pb2.Timestamp
    took: _duration_pb2.Duration
    num_sequences: int
    num_tokens: int
    sequences_by_tenant: _containers.ScalarMap[str, int]
    def __init__(self, started: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., took: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., num_sequences: _Optional[int] = ..., num_tokens: _Optional[int] = ..., sequences_by_tenant: _Optional[_Mapping[str, int]] = ...) -> None: ...

class ListDecodeStepsResponse(_message.Message):
    __slots__ = ("steps",)
    STEPS_FIELD_NUMBER: _ClassVar[int]
    steps: _containers.RepeatedCompositeFieldContainer[DecodeStep]
    def __init__(self, steps: _Optional[_Iterable[_Union[DecodeStep, _Mapping]]] = ...) -> None: ...
