import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from treadle.v1 import admin_pb2 as _admin_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class HeartbeatRequest(_message.Message):
    __slots__ = ("worker", "base", "ttl")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    TTL_FIELD_NUMBER: _ClassVar[int]
    worker: _admin_pb2.Worker
    base: _admin_pb2.BaseModel
    ttl: _duration_pb2.Duration
    def __init__(self, worker: _Optional[_Union[_admin_pb2.Worker, _Mapping]] = ..., base: _Optional[_Union[_admin_pb2.BaseModel, _Mapping]] = ..., ttl: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class HeartbeatResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ScanWorkersRequest(_message.Message):
    __slots__ = ("kind", "base")
    KIND_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    kind: _admin_pb2.WorkerKind
    base: str
    def __init__(self, kind: _Optional[_Union[_admin_pb2.WorkerKind, str]] = ..., base: _Optional[str] = ...) -> None: ...

class WorkerEntry(_message.Message):
    __slots__ = ("worker", "base")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    worker: _admin_pb2.Worker
    base: _admin_pb2.BaseModel
    def __init__(self, worker: _Optional[_Union[_admin_pb2.Worker, _Mapping]] = ..., base: _Optional[_Union[_admin_pb2.BaseModel, _Mapping]] = ...) -> None: ...

class ScanWorkersResponse(_message.Message):
    __slots__ = ("workers",)
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    workers: _containers.RepeatedCompositeFieldContainer[WorkerEntry]
    def __init__(self, workers: _Optional[_Iterable[_Union[WorkerEntry, _Mapping]]] = ...) -> None: ...

class UnregisterRequest(_message.Message):
    __slots__ = ("worker",)
    WORKER_FIELD_NUMBER: _ClassVar[int]
    worker: str
    def __init__(self, worker: _Optional[str] = ...) -> None: ...

class UnregisterResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
