import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from treadle.v1 import metrics_pb2 as _metrics_pb2
from treadle.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RunState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RUN_STATE_UNSPECIFIED: _ClassVar[RunState]
    RUN_STATE_ACTIVE: _ClassVar[RunState]
    RUN_STATE_DIVERGED: _ClassVar[RunState]
RUN_STATE_UNSPECIFIED: RunState
RUN_STATE_ACTIVE: RunState
RUN_STATE_DIVERGED: RunState

class Run(_message.Message):
    __slots__ = ("name", "base", "lora", "created", "next_seq", "last_done_seq", "metadata", "worker", "epoch", "state", "divergence", "latest")
    class MetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    LORA_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    NEXT_SEQ_FIELD_NUMBER: _ClassVar[int]
    LAST_DONE_SEQ_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    DIVERGENCE_FIELD_NUMBER: _ClassVar[int]
    LATEST_FIELD_NUMBER: _ClassVar[int]
    name: str
    base: str
    lora: _types_pb2.LoraConfig
    created: _timestamp_pb2.Timestamp
    next_seq: int
    last_done_seq: int
    metadata: _containers.ScalarMap[str, str]
    worker: str
    epoch: int
    state: RunState
    divergence: Divergence
    latest: _metrics_pb2.MetricPoint
    def __init__(self, name: _Optional[str] = ..., base: _Optional[str] = ..., lora: _Optional[_Union[_types_pb2.LoraConfig, _Mapping]] = ..., created: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., next_seq: _Optional[int] = ..., last_done_seq: _Optional[int] = ..., metadata: _Optional[_Mapping[str, str]] = ..., worker: _Optional[str] = ..., epoch: _Optional[int] = ..., state: _Optional[_Union[RunState, str]] = ..., divergence: _Optional[_Union[Divergence, _Mapping]] = ..., latest: _Optional[_Union[_metrics_pb2.MetricPoint, _Mapping]] = ...) -> None: ...

class Divergence(_message.Message):
    __slots__ = ("seq", "recorded_digest", "replayed_digest", "message", "found")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    RECORDED_DIGEST_FIELD_NUMBER: _ClassVar[int]
    REPLAYED_DIGEST_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    FOUND_FIELD_NUMBER: _ClassVar[int]
    seq: int
    recorded_digest: bytes
    replayed_digest: bytes
    message: str
    found: _timestamp_pb2.Timestamp
    def __init__(self, seq: _Optional[int] = ..., recorded_digest: _Optional[bytes] = ..., replayed_digest: _Optional[bytes] = ..., message: _Optional[str] = ..., found: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class CreateRunRequest(_message.Message):
    __slots__ = ("base", "lora", "request_id", "metadata", "from_adapter", "run_id")
    class MetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    BASE_FIELD_NUMBER: _ClassVar[int]
    LORA_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    FROM_ADAPTER_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    base: str
    lora: _types_pb2.LoraConfig
    request_id: str
    metadata: _containers.ScalarMap[str, str]
    from_adapter: str
    run_id: str
    def __init__(self, base: _Optional[str] = ..., lora: _Optional[_Union[_types_pb2.LoraConfig, _Mapping]] = ..., request_id: _Optional[str] = ..., metadata: _Optional[_Mapping[str, str]] = ..., from_adapter: _Optional[str] = ..., run_id: _Optional[str] = ...) -> None: ...

class CreateRunResponse(_message.Message):
    __slots__ = ("run", "replayed")
    RUN_FIELD_NUMBER: _ClassVar[int]
    REPLAYED_FIELD_NUMBER: _ClassVar[int]
    run: Run
    replayed: bool
    def __init__(self, run: _Optional[_Union[Run, _Mapping]] = ..., replayed: bool = ...) -> None: ...

class GetRunRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class GetRunResponse(_message.Message):
    __slots__ = ("run",)
    RUN_FIELD_NUMBER: _ClassVar[int]
    run: Run
    def __init__(self, run: _Optional[_Union[Run, _Mapping]] = ...) -> None: ...

class ListRunsRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListRunsResponse(_message.Message):
    __slots__ = ("runs", "next_page_token")
    RUNS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    runs: _containers.RepeatedCompositeFieldContainer[Run]
    next_page_token: str
    def __init__(self, runs: _Optional[_Iterable[_Union[Run, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class DeleteRunRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class DeleteRunResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Operation(_message.Message):
    __slots__ = ("seq", "digest", "queue_timeout", "group_seq", "refused", "forward", "forward_backward", "optim_step", "save_state", "load_state", "save_weights_for_sampler", "barrier")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    QUEUE_TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    GROUP_SEQ_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    FORWARD_FIELD_NUMBER: _ClassVar[int]
    FORWARD_BACKWARD_FIELD_NUMBER: _ClassVar[int]
    OPTIM_STEP_FIELD_NUMBER: _ClassVar[int]
    SAVE_STATE_FIELD_NUMBER: _ClassVar[int]
    LOAD_STATE_FIELD_NUMBER: _ClassVar[int]
    SAVE_WEIGHTS_FOR_SAMPLER_FIELD_NUMBER: _ClassVar[int]
    BARRIER_FIELD_NUMBER: _ClassVar[int]
    seq: int
    digest: int
    queue_timeout: _duration_pb2.Duration
    group_seq: int
    refused: _types_pb2.OperationError
    forward: Forward
    forward_backward: ForwardBackward
    optim_step: OptimStep
    save_state: SaveState
    load_state: LoadState
    save_weights_for_sampler: SaveWeightsForSampler
    barrier: Barrier
    def __init__(self, seq: _Optional[int] = ..., digest: _Optional[int] = ..., queue_timeout: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., group_seq: _Optional[int] = ..., refused: _Optional[_Union[_types_pb2.OperationError, _Mapping]] = ..., forward: _Optional[_Union[Forward, _Mapping]] = ..., forward_backward: _Optional[_Union[ForwardBackward, _Mapping]] = ..., optim_step: _Optional[_Union[OptimStep, _Mapping]] = ..., save_state: _Optional[_Union[SaveState, _Mapping]] = ..., load_state: _Optional[_Union[LoadState, _Mapping]] = ..., save_weights_for_sampler: _Optional[_Union[SaveWeightsForSampler, _Mapping]] = ..., barrier: _Optional[_Union[Barrier, _Mapping]] = ...) -> None: ...

class Forward(_message.Message):
    __slots__ = ("batch", "loss_fn")
    BATCH_FIELD_NUMBER: _ClassVar[int]
    LOSS_FN_FIELD_NUMBER: _ClassVar[int]
    batch: _types_pb2.Batch
    loss_fn: LossFn
    def __init__(self, batch: _Optional[_Union[_types_pb2.Batch, _Mapping]] = ..., loss_fn: _Optional[_Union[LossFn, _Mapping]] = ...) -> None: ...

class ForwardBackward(_message.Message):
    __slots__ = ("batch", "loss_fn")
    BATCH_FIELD_NUMBER: _ClassVar[int]
    LOSS_FN_FIELD_NUMBER: _ClassVar[int]
    batch: _types_pb2.Batch
    loss_fn: LossFn
    def __init__(self, batch: _Optional[_Union[_types_pb2.Batch, _Mapping]] = ..., loss_fn: _Optional[_Union[LossFn, _Mapping]] = ...) -> None: ...

class LossFn(_message.Message):
    __slots__ = ("name", "config")
    class ConfigEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    name: str
    config: _containers.ScalarMap[str, float]
    def __init__(self, name: _Optional[str] = ..., config: _Optional[_Mapping[str, float]] = ...) -> None: ...

class OptimStep(_message.Message):
    __slots__ = ("adam",)
    ADAM_FIELD_NUMBER: _ClassVar[int]
    adam: _types_pb2.AdamParams
    def __init__(self, adam: _Optional[_Union[_types_pb2.AdamParams, _Mapping]] = ...) -> None: ...

class SaveState(_message.Message):
    __slots__ = ("checkpoint_id", "ttl", "overwrite", "metadata")
    class MetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    CHECKPOINT_ID_FIELD_NUMBER: _ClassVar[int]
    TTL_FIELD_NUMBER: _ClassVar[int]
    OVERWRITE_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    checkpoint_id: str
    ttl: _duration_pb2.Duration
    overwrite: bool
    metadata: _containers.ScalarMap[str, str]
    def __init__(self, checkpoint_id: _Optional[str] = ..., ttl: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., overwrite: bool = ..., metadata: _Optional[_Mapping[str, str]] = ...) -> None: ...

class LoadState(_message.Message):
    __slots__ = ("adapter", "with_optimizer")
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    WITH_OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    adapter: str
    with_optimizer: bool
    def __init__(self, adapter: _Optional[str] = ..., with_optimizer: bool = ...) -> None: ...

class SaveWeightsForSampler(_message.Message):
    __slots__ = ("revision_id", "ttl", "metadata")
    class MetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    REVISION_ID_FIELD_NUMBER: _ClassVar[int]
    TTL_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    revision_id: str
    ttl: _duration_pb2.Duration
    metadata: _containers.ScalarMap[str, str]
    def __init__(self, revision_id: _Optional[str] = ..., ttl: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., metadata: _Optional[_Mapping[str, str]] = ...) -> None: ...

class Barrier(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class OperationResult(_message.Message):
    __slots__ = ("seq", "replayed", "queued", "ran", "error", "failed_seq", "forward", "forward_backward", "optim_step", "save_state", "load_state", "save_weights_for_sampler", "barrier")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    REPLAYED_FIELD_NUMBER: _ClassVar[int]
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    RAN_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    FAILED_SEQ_FIELD_NUMBER: _ClassVar[int]
    FORWARD_FIELD_NUMBER: _ClassVar[int]
    FORWARD_BACKWARD_FIELD_NUMBER: _ClassVar[int]
    OPTIM_STEP_FIELD_NUMBER: _ClassVar[int]
    SAVE_STATE_FIELD_NUMBER: _ClassVar[int]
    LOAD_STATE_FIELD_NUMBER: _ClassVar[int]
    SAVE_WEIGHTS_FOR_SAMPLER_FIELD_NUMBER: _ClassVar[int]
    BARRIER_FIELD_NUMBER: _ClassVar[int]
    seq: int
    replayed: bool
    queued: _duration_pb2.Duration
    ran: _duration_pb2.Duration
    error: _types_pb2.OperationError
    failed_seq: int
    forward: ForwardResult
    forward_backward: ForwardBackwardResult
    optim_step: OptimStepResult
    save_state: SaveStateResult
    load_state: LoadStateResult
    save_weights_for_sampler: SaveWeightsForSamplerResult
    barrier: BarrierResult
    def __init__(self, seq: _Optional[int] = ..., replayed: bool = ..., queued: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., ran: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., error: _Optional[_Union[_types_pb2.OperationError, _Mapping]] = ..., failed_seq: _Optional[int] = ..., forward: _Optional[_Union[ForwardResult, _Mapping]] = ..., forward_backward: _Optional[_Union[ForwardBackwardResult, _Mapping]] = ..., optim_step: _Optional[_Union[OptimStepResult, _Mapping]] = ..., save_state: _Optional[_Union[SaveStateResult, _Mapping]] = ..., load_state: _Optional[_Union[LoadStateResult, _Mapping]] = ..., save_weights_for_sampler: _Optional[_Union[SaveWeightsForSamplerResult, _Mapping]] = ..., barrier: _Optional[_Union[BarrierResult, _Mapping]] = ...) -> None: ...

class LossOutputs(_message.Message):
    __slots__ = ("lengths", "logprobs", "logprobs_list", "metrics")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_LIST_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    lengths: bytes
    logprobs: _types_pb2.Tensor
    logprobs_list: _containers.RepeatedCompositeFieldContainer[_types_pb2.FloatList]
    metrics: _containers.ScalarMap[str, float]
    def __init__(self, lengths: _Optional[bytes] = ..., logprobs: _Optional[_Union[_types_pb2.Tensor, _Mapping]] = ..., logprobs_list: _Optional[_Iterable[_Union[_types_pb2.FloatList, _Mapping]]] = ..., metrics: _Optional[_Mapping[str, float]] = ...) -> None: ...

class ForwardResult(_message.Message):
    __slots__ = ("outputs",)
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    outputs: LossOutputs
    def __init__(self, outputs: _Optional[_Union[LossOutputs, _Mapping]] = ...) -> None: ...

class ForwardBackwardResult(_message.Message):
    __slots__ = ("outputs",)
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    outputs: LossOutputs
    def __init__(self, outputs: _Optional[_Union[LossOutputs, _Mapping]] = ...) -> None: ...

class OptimStepResult(_message.Message):
    __slots__ = ("step", "metrics")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    STEP_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    step: int
    metrics: _containers.ScalarMap[str, float]
    def __init__(self, step: _Optional[int] = ..., metrics: _Optional[_Mapping[str, float]] = ...) -> None: ...

class SaveStateResult(_message.Message):
    __slots__ = ("checkpoint",)
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    checkpoint: str
    def __init__(self, checkpoint: _Optional[str] = ...) -> None: ...

class LoadStateResult(_message.Message):
    __slots__ = ("step",)
    STEP_FIELD_NUMBER: _ClassVar[int]
    step: int
    def __init__(self, step: _Optional[int] = ...) -> None: ...

class SaveWeightsForSamplerResult(_message.Message):
    __slots__ = ("revision",)
    REVISION_FIELD_NUMBER: _ClassVar[int]
    revision: str
    def __init__(self, revision: _Optional[str] = ...) -> None: ...

class BarrierResult(_message.Message):
    __slots__ = ("num_failed",)
    NUM_FAILED_FIELD_NUMBER: _ClassVar[int]
    num_failed: int
    def __init__(self, num_failed: _Optional[int] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("protocol", "run", "acked_seq", "client_id")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    ACKED_SEQ_FIELD_NUMBER: _ClassVar[int]
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    run: str
    acked_seq: int
    client_id: str
    def __init__(self, protocol: _Optional[int] = ..., run: _Optional[str] = ..., acked_seq: _Optional[int] = ..., client_id: _Optional[str] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("next_seq", "last_done_seq", "credit", "max_frame_bytes", "epoch", "max_context")
    NEXT_SEQ_FIELD_NUMBER: _ClassVar[int]
    LAST_DONE_SEQ_FIELD_NUMBER: _ClassVar[int]
    CREDIT_FIELD_NUMBER: _ClassVar[int]
    MAX_FRAME_BYTES_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_FIELD_NUMBER: _ClassVar[int]
    next_seq: int
    last_done_seq: int
    credit: Credit
    max_frame_bytes: int
    epoch: int
    max_context: int
    def __init__(self, next_seq: _Optional[int] = ..., last_done_seq: _Optional[int] = ..., credit: _Optional[_Union[Credit, _Mapping]] = ..., max_frame_bytes: _Optional[int] = ..., epoch: _Optional[int] = ..., max_context: _Optional[int] = ...) -> None: ...

class Credit(_message.Message):
    __slots__ = ("max_seq", "max_unfinished_bytes")
    MAX_SEQ_FIELD_NUMBER: _ClassVar[int]
    MAX_UNFINISHED_BYTES_FIELD_NUMBER: _ClassVar[int]
    max_seq: int
    max_unfinished_bytes: int
    def __init__(self, max_seq: _Optional[int] = ..., max_unfinished_bytes: _Optional[int] = ...) -> None: ...

class Ack(_message.Message):
    __slots__ = ("acked_seq",)
    ACKED_SEQ_FIELD_NUMBER: _ClassVar[int]
    acked_seq: int
    def __init__(self, acked_seq: _Optional[int] = ...) -> None: ...

class OperationFragment(_message.Message):
    __slots__ = ("total_bytes", "offset", "data")
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    total_bytes: int
    offset: int
    data: bytes
    def __init__(self, total_bytes: _Optional[int] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class Drain(_message.Message):
    __slots__ = ("grace",)
    GRACE_FIELD_NUMBER: _ClassVar[int]
    grace: _duration_pb2.Duration
    def __init__(self, grace: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class Goodbye(_message.Message):
    __slots__ = ("last_seq",)
    LAST_SEQ_FIELD_NUMBER: _ClassVar[int]
    last_seq: int
    def __init__(self, last_seq: _Optional[int] = ...) -> None: ...

class StreamOperationsRequest(_message.Message):
    __slots__ = ("hello", "operation", "ack", "goodbye", "fragment")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    OPERATION_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    GOODBYE_FIELD_NUMBER: _ClassVar[int]
    FRAGMENT_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    operation: Operation
    ack: Ack
    goodbye: Goodbye
    fragment: OperationFragment
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., operation: _Optional[_Union[Operation, _Mapping]] = ..., ack: _Optional[_Union[Ack, _Mapping]] = ..., goodbye: _Optional[_Union[Goodbye, _Mapping]] = ..., fragment: _Optional[_Union[OperationFragment, _Mapping]] = ...) -> None: ...

class StreamOperationsResponse(_message.Message):
    __slots__ = ("welcome", "result", "credit", "drain", "goodbye")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    CREDIT_FIELD_NUMBER: _ClassVar[int]
    DRAIN_FIELD_NUMBER: _ClassVar[int]
    GOODBYE_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    result: OperationResult
    credit: Credit
    drain: Drain
    goodbye: Goodbye
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., result: _Optional[_Union[OperationResult, _Mapping]] = ..., credit: _Optional[_Union[Credit, _Mapping]] = ..., drain: _Optional[_Union[Drain, _Mapping]] = ..., goodbye: _Optional[_Union[Goodbye, _Mapping]] = ...) -> None: ...

class SubmitOperationRequest(_message.Message):
    __slots__ = ("run", "operation")
    RUN_FIELD_NUMBER: _ClassVar[int]
    OPERATION_FIELD_NUMBER: _ClassVar[int]
    run: str
    operation: Operation
    def __init__(self, run: _Optional[str] = ..., operation: _Optional[_Union[Operation, _Mapping]] = ...) -> None: ...

class SubmitOperationResponse(_message.Message):
    __slots__ = ("seq", "replayed")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    REPLAYED_FIELD_NUMBER: _ClassVar[int]
    seq: int
    replayed: bool
    def __init__(self, seq: _Optional[int] = ..., replayed: bool = ...) -> None: ...

class WaitOperationRequest(_message.Message):
    __slots__ = ("run", "seq", "timeout")
    RUN_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    run: str
    seq: int
    timeout: _duration_pb2.Duration
    def __init__(self, run: _Optional[str] = ..., seq: _Optional[int] = ..., timeout: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class WaitOperationResponse(_message.Message):
    __slots__ = ("done", "result")
    DONE_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    done: bool
    result: OperationResult
    def __init__(self, done: bool = ..., result: _Optional[_Union[OperationResult, _Mapping]] = ...) -> None: ...

class CancelOperationsRequest(_message.Message):
    __slots__ = ("run", "from_seq")
    RUN_FIELD_NUMBER: _ClassVar[int]
    FROM_SEQ_FIELD_NUMBER: _ClassVar[int]
    run: str
    from_seq: int
    def __init__(self, run: _Optional[str] = ..., from_seq: _Optional[int] = ...) -> None: ...

class CancelOperationsResponse(_message.Message):
    __slots__ = ("cancelled_seqs",)
    CANCELLED_SEQS_FIELD_NUMBER: _ClassVar[int]
    cancelled_seqs: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, cancelled_seqs: _Optional[_Iterable[int]] = ...) -> None: ...
