from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class GetSamplerStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetSamplerStatusResponse(_message.Message):
    __slots__ = ("cached_revisions", "active_sequences", "waiting_sequences", "num_steps", "num_tokens")
    CACHED_REVISIONS_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    WAITING_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    cached_revisions: _containers.RepeatedScalarFieldContainer[str]
    active_sequences: int
    waiting_sequences: int
    num_steps: int
    num_tokens: int
    def __init__(self, cached_revisions: _Optional[_Iterable[str]] = ..., active_sequences: _Optional[int] = ..., waiting_sequences: _Optional[int] = ..., num_steps: _Optional[int] = ..., num_tokens: _Optional[int] = ...) -> None: ...

class PrefetchRevisionRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class PrefetchRevisionResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
