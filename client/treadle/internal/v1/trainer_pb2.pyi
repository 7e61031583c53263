import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from treadle.v1 import admin_pb2 as _admin_pb2
from treadle.v1 import training_pb2 as _training_pb2
from treadle.v1 import types_pb2 as _types_pb2
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

class ComputeChunksRequest(_message.Message):
    __slots__ = ("hello", "weights", "piece", "chunk", "take_back")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    PIECE_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    TAKE_BACK_FIELD_NUMBER: _ClassVar[int]
    hello: LendHello
    weights: LendWeights
    piece: FloatPiece
    chunk: LentChunk
    take_back: TakeBack
    def __init__(self, hello: _Optional[_Union[LendHello, _Mapping]] = ..., weights: _Optional[_Union[LendWeights, _Mapping]] = ..., piece: _Optional[_Union[FloatPiece, _Mapping]] = ..., chunk: _Optional[_Union[LentChunk, _Mapping]] = ..., take_back: _Optional[_Union[TakeBack, _Mapping]] = ...) -> None: ...

class LendHello(_message.Message):
    __slots__ = ("run", "epoch", "base", "lora")
    RUN_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    LORA_FIELD_NUMBER: _ClassVar[int]
    run: str
    epoch: int
    base: str
    lora: _types_pb2.LoraConfig
    def __init__(self, run: _Optional[str] = ..., epoch: _Optional[int] = ..., base: _Optional[str] = ..., lora: _Optional[_Union[_types_pb2.LoraConfig, _Mapping]] = ...) -> None: ...

class LendWeights(_message.Message):
    __slots__ = ("num_bytes", "digest")
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    num_bytes: int
    digest: bytes
    def __init__(self, num_bytes: _Optional[int] = ..., digest: _Optional[bytes] = ...) -> None: ...

class FloatPiece(_message.Message):
    __slots__ = ("crc32c", "data")
    CRC32C_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    crc32c: int
    data: bytes
    def __init__(self, crc32c: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class LentChunk(_message.Message):
    __slots__ = ("id", "seq", "lengths", "tokens", "targets", "num_targets", "columns", "loss_fn", "forward_only")
    class ColumnsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    ID_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    NUM_TARGETS_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    LOSS_FN_FIELD_NUMBER: _ClassVar[int]
    FORWARD_ONLY_FIELD_NUMBER: _ClassVar[int]
    id: int
    seq: int
    lengths: bytes
    tokens: bytes
    targets: bytes
    num_targets: int
    columns: _containers.ScalarMap[str, bytes]
    loss_fn: _training_pb2.LossFn
    forward_only: bool
    def __init__(self, id: _Optional[int] = ..., seq: _Optional[int] = ..., lengths: _Optional[bytes] = ..., tokens: _Optional[bytes] = ..., targets: _Optional[bytes] = ..., num_targets: _Optional[int] = ..., columns: _Optional[_Mapping[str, bytes]] = ..., loss_fn: _Optional[_Union[_training_pb2.LossFn, _Mapping]] = ..., forward_only: bool = ...) -> None: ...

class TakeBack(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: int
    def __init__(self, id: _Optional[int] = ...) -> None: ...

class ComputeChunksResponse(_message.Message):
    __slots__ = ("welcome", "begun", "refused", "computed", "piece")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    BEGUN_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_FIELD_NUMBER: _ClassVar[int]
    PIECE_FIELD_NUMBER: _ClassVar[int]
    welcome: LendWelcome
    begun: ChunkBegun
    refused: ChunkRefused
    computed: ChunkComputed
    piece: FloatPiece
    def __init__(self, welcome: _Optional[_Union[LendWelcome, _Mapping]] = ..., begun: _Optional[_Union[ChunkBegun, _Mapping]] = ..., refused: _Optional[_Union[ChunkRefused, _Mapping]] = ..., computed: _Optional[_Union[ChunkComputed, _Mapping]] = ..., piece: _Optional[_Union[FloatPiece, _Mapping]] = ...) -> None: ...

class LendWelcome(_message.Message):
    __slots__ = ("numerics",)
    NUMERICS_FIELD_NUMBER: _ClassVar[int]
    numerics: str
    def __init__(self, numerics: _Optional[str] = ...) -> None: ...

class ChunkBegun(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: int
    def __init__(self, id: _Optional[int] = ...) -> None: ...

class ChunkRefused(_message.Message):
    __slots__ = ("id", "reason")
    ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    id: int
    reason: str
    def __init__(self, id: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class ChunkComputed(_message.Message):
    __slots__ = ("id", "logprobs", "loss_sum", "metrics", "gradient_bytes", "device")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    LOSS_SUM_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    id: int
    logprobs: bytes
    loss_sum: float
    metrics: _containers.ScalarMap[str, float]
    gradient_bytes: int
    device: _duration_pb2.Duration
    def __init__(self, id: _Optional[int] = ..., logprobs: _Optional[bytes] = ..., loss_sum: _Optional[float] = ..., metrics: _Optional[_Mapping[str, float]] = ..., gradient_bytes: _Optional[int] = ..., device: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...
