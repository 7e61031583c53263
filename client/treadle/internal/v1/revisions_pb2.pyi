from treadle.v1 import adapters_pb2 as _adapters_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WatchRevisionsRequest(_message.Message):
    __slots__ = ("base", "worker", "feed", "after")
    BASE_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    FEED_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    base: str
    worker: str
    feed: str
    after: int
    def __init__(self, base: _Optional[str] = ..., worker: _Optional[str] = ..., feed: _Optional[str] = ..., after: _Optional[int] = ...) -> None: ...

class WatchStarted(_message.Message):
    __slots__ = ("feed", "resumed")
    FEED_FIELD_NUMBER: _ClassVar[int]
    RESUMED_FIELD_NUMBER: _ClassVar[int]
    feed: str
    resumed: bool
    def __init__(self, feed: _Optional[str] = ..., resumed: bool = ...) -> None: ...

class RevisionArriving(_message.Message):
    __slots__ = ("run", "file", "size", "config")
    RUN_FIELD_NUMBER: _ClassVar[int]
    FILE_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    run: str
    file: str
    size: int
    config: bytes
    def __init__(self, run: _Optional[str] = ..., file: _Optional[str] = ..., size: _Optional[int] = ..., config: _Optional[bytes] = ...) -> None: ...

class WatchRevisionsResponse(_message.Message):
    __slots__ = ("position", "preferred", "started", "published", "removed", "arriving")
    POSITION_FIELD_NUMBER: _ClassVar[int]
    PREFERRED_FIELD_NUMBER: _ClassVar[int]
    STARTED_FIELD_NUMBER: _ClassVar[int]
    PUBLISHED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    ARRIVING_FIELD_NUMBER: _ClassVar[int]
    position: int
    preferred: bool
    started: WatchStarted
    published: _adapters_pb2.Adapter
    removed: str
    arriving: RevisionArriving
    def __init__(self, position: _Optional[int] = ..., preferred: bool = ..., started: _Optional[_Union[WatchStarted, _Mapping]] = ..., published: _Optional[_Union[_adapters_pb2.Adapter, _Mapping]] = ..., removed: _Optional[str] = ..., arriving: _Optional[_Union[RevisionArriving, _Mapping]] = ...) -> None: ...

class AnnounceRevisionRequest(_message.Message):
    __slots__ = ("base", "revision")
    BASE_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    base: str
    revision: RevisionArriving
    def __init__(self, base: _Optional[str] = ..., revision: _Optional[_Union[RevisionArriving, _Mapping]] = ...) -> None: ...

class AnnounceRevisionResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
