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

class SpanShare(_message.Message):
    __slots__ = ("tenant", "run", "num_tokens", "num_sequences")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    run: str
    num_tokens: int
    num_sequences: int
    def __init__(self, tenant: _Optional[str] = ..., run: _Optional[str] = ..., num_tokens: _Optional[int] = ..., num_sequences: _Optional[int] = ...) -> None: ...

class Span(_message.Message):
    __slots__ = ("started", "took", "shares", "num_steps_beside", "num_decode_steps", "num_tokens")
    STARTED_FIELD_NUMBER: _ClassVar[int]
    TOOK_FIELD_NUMBER: _ClassVar[int]
    SHARES_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_BESIDE_FIELD_NUMBER: _ClassVar[int]
    NUM_DECODE_STEPS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    started: _timestamp_pb2.Timestamp
    took: _duration_pb2.Duration
    shares: _containers.RepeatedCompositeFieldContainer[SpanShare]
    num_steps_beside: int
    num_decode_steps: int
    num_tokens: int
    def __init__(self, started: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., took: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., shares: _Optional[_Iterable[_Union[SpanShare, _Mapping]]] = ..., num_steps_beside: _Optional[int] = ..., num_decode_steps: _Optional[int] = ..., num_tokens: _Optional[int] = ...) -> None: ...

class WorkerTimeline(_message.Message):
    __slots__ = ("worker", "kind", "base", "spans")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    SPANS_FIELD_NUMBER: _ClassVar[int]
    worker: str
    kind: _admin_pb2.WorkerKind
    base: str
    spans: _containers.RepeatedCompositeFieldContainer[Span]
    def __init__(self, worker: _Optional[str] = ..., kind: _Optional[_Union[_admin_pb2.WorkerKind, str]] = ..., base: _Optional[str] = ..., spans: _Optional[_Iterable[_Union[Span, _Mapping]]] = ...) -> None: ...

class ListSpansRequest(_message.Message):
    __slots__ = ("after", "limit")
    AFTER_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    after: _timestamp_pb2.Timestamp
    limit: int
    def __init__(self, after: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., limit: _Optional[int] = ...) -> None: ...

class ListSpansResponse(_message.Message):
    __slots__ = ("workers",)
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    workers: _containers.RepeatedCompositeFieldContainer[WorkerTimeline]
    def __init__(self, workers: _Optional[_Iterable[_Union[WorkerTimeline, _Mapping]]] = ...) -> None: ...
