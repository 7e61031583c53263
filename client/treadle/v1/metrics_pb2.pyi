import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class MetricSource(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    METRIC_SOURCE_UNSPECIFIED: _ClassVar[MetricSource]
    METRIC_SOURCE_SERVICE: _ClassVar[MetricSource]
    METRIC_SOURCE_USER: _ClassVar[MetricSource]
METRIC_SOURCE_UNSPECIFIED: MetricSource
METRIC_SOURCE_SERVICE: MetricSource
METRIC_SOURCE_USER: MetricSource

class MetricPoint(_message.Message):
    __slots__ = ("step", "time", "source", "values")
    class ValuesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    STEP_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    step: int
    time: _timestamp_pb2.Timestamp
    source: MetricSource
    values: _containers.ScalarMap[str, float]
    def __init__(self, step: _Optional[int] = ..., time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., source: _Optional[_Union[MetricSource, str]] = ..., values: _Optional[_Mapping[str, float]] = ...) -> None: ...

class TextSample(_message.Message):
    __slots__ = ("prompt", "response", "reward")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    REWARD_FIELD_NUMBER: _ClassVar[int]
    prompt: str
    response: str
    reward: float
    def __init__(self, prompt: _Optional[str] = ..., response: _Optional[str] = ..., reward: _Optional[float] = ...) -> None: ...

class SampleSet(_message.Message):
    __slots__ = ("step", "time", "samples")
    STEP_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    step: int
    time: _timestamp_pb2.Timestamp
    samples: _containers.RepeatedCompositeFieldContainer[TextSample]
    def __init__(self, step: _Optional[int] = ..., time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., samples: _Optional[_Iterable[_Union[TextSample, _Mapping]]] = ...) -> None: ...

class LoggedStep(_message.Message):
    __slots__ = ("step", "values", "samples")
    class ValuesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    STEP_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    step: int
    values: _containers.ScalarMap[str, float]
    samples: _containers.RepeatedCompositeFieldContainer[TextSample]
    def __init__(self, step: _Optional[int] = ..., values: _Optional[_Mapping[str, float]] = ..., samples: _Optional[_Iterable[_Union[TextSample, _Mapping]]] = ...) -> None: ...

class LogMetricsRequest(_message.Message):
    __slots__ = ("run", "steps")
    RUN_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    run: str
    steps: _containers.RepeatedCompositeFieldContainer[LoggedStep]
    def __init__(self, run: _Optional[str] = ..., steps: _Optional[_Iterable[_Union[LoggedStep, _Mapping]]] = ...) -> None: ...

class LogMetricsResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListMetricsRequest(_message.Message):
    __slots__ = ("run", "after_cursor", "from_step", "page_size")
    RUN_FIELD_NUMBER: _ClassVar[int]
    AFTER_CURSOR_FIELD_NUMBER: _ClassVar[int]
    FROM_STEP_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    run: str
    after_cursor: int
    from_step: int
    page_size: int
    def __init__(self, run: _Optional[str] = ..., after_cursor: _Optional[int] = ..., from_step: _Optional[int] = ..., page_size: _Optional[int] = ...) -> None: ...

class ListMetricsResponse(_message.Message):
    __slots__ = ("points", "cursor", "more")
    POINTS_FIELD_NUMBER: _ClassVar[int]
    CURSOR_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    points: _containers.RepeatedCompositeFieldContainer[MetricPoint]
    cursor: int
    more: bool
    def __init__(self, points: _Optional[_Iterable[_Union[MetricPoint, _Mapping]]] = ..., cursor: _Optional[int] = ..., more: bool = ...) -> None: ...

class ListSamplesRequest(_message.Message):
    __slots__ = ("run", "after_cursor", "page_size")
    RUN_FIELD_NUMBER: _ClassVar[int]
    AFTER_CURSOR_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    run: str
    after_cursor: int
    page_size: int
    def __init__(self, run: _Optional[str] = ..., after_cursor: _Optional[int] = ..., page_size: _Optional[int] = ...) -> None: ...

class ListSamplesResponse(_message.Message):
    __slots__ = ("sets", "cursor", "more")
    SETS_FIELD_NUMBER: _ClassVar[int]
    CURSOR_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    sets: _containers.RepeatedCompositeFieldContainer[SampleSet]
    cursor: int
    more: bool
    def __init__(self, sets: _Optional[_Iterable[_Union[SampleSet, _Mapping]]] = ..., cursor: _Optional[int] = ..., more: bool = ...) -> None: ...
