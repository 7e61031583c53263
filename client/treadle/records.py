"""What the service tells about itself: bases, runs, saved adapters, keys, workers. Plain read-only values.

Knows nothing of the wire and nothing of how these are asked for.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Literal, NamedTuple

from treadle.types import LoraConfig


@dataclass(frozen=True)
class ModelData:
    """The base that a run trains."""

    model_name: str
    tokenizer_id: str
    arch: str = "lora"


@dataclass(frozen=True)
class GetInfoResponse:
    """What a training client trains."""

    model_data: ModelData
    model_id: str
    model_name: str
    lora_rank: int
    is_lora: bool = True


@dataclass(frozen=True)
class SupportedModel:
    """A base that the deployment serves."""

    model_name: str
    max_context_length: int
    trainable: bool
    sampleable: bool
    vocab_size: int
    tokenizer: str
    dtype: str
    num_parameters: int
    eos_token_ids: tuple[int, ...] = ()
    max_tokens_per_pass: int = 0
    """Most positions of one training pass and of one training sequence; 0 when no trainer holds the base."""


@dataclass(frozen=True)
class CompletionInfo:
    """A kept completion without its contents; `size` in bytes."""

    id: str
    model: str
    created: datetime
    metadata: dict[str, str]
    size: int


@dataclass(frozen=True)
class ExportInfo:
    """What was written, and how many answers were left out because they had been cut at their limit of tokens."""

    num_conversations: int
    num_cut: int


@dataclass(frozen=True)
class ServerCapabilities:
    """What the deployment offers, and the tenant that the key belongs to."""

    supported_models: list[SupportedModel]
    version: str
    losses: list[str]
    max_operation_bytes: int
    tenant: str


@dataclass(frozen=True)
class Divergence:
    """Where a replay gave other bits than the journal had recorded; digests are hexadecimal."""

    seq: int
    recorded_digest: str
    replayed_digest: str
    message: str
    found: datetime


@dataclass(frozen=True)
class MetricPoint:
    """The metrics of one step: as the service recorded them with an optimizer step, or as the user logged them."""

    step: int
    time: datetime
    source: Literal["service", "user"]
    values: dict[str, float]


@dataclass(frozen=True)
class MetricSeries:
    """Points in order of their last change; those that change later are behind `cursor`."""

    points: list[MetricPoint]
    cursor: int


@dataclass(frozen=True)
class TextSample:
    """A text that was sampled while a run trained."""

    prompt: str
    response: str
    reward: float | None = None


@dataclass(frozen=True)
class SampleSet:
    """The texts that were logged with a step."""

    step: int
    time: datetime
    samples: tuple[TextSample, ...]


@dataclass(frozen=True)
class RunInfo:
    """A run in the catalog."""

    name: str
    base: str
    lora: LoraConfig
    created: datetime
    next_seq: int
    last_done_seq: int
    metadata: dict[str, str]
    worker: str
    epoch: int
    state: Literal["active", "diverged"]
    divergence: Divergence | None = None
    latest: MetricPoint | None = None
    """The newest optimizer step; None before the first."""


@dataclass(frozen=True)
class AdapterFile:
    """A file of a saved adapter."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class AdapterInfo:
    """A saved revision or checkpoint."""

    name: str
    base: str
    lora: LoraConfig
    step: int
    created: datetime
    files: tuple[AdapterFile, ...]
    unnamed: bool = False
    """Saved without a name: it goes some time after its last use, unless it is one of the run's newest."""
    public: bool = False
    """Every tenant may read it."""


@dataclass(frozen=True)
class KeyInfo:
    """An API key without its secret."""

    key_id: str
    tenant: str
    scopes: tuple[str, ...]
    created: datetime
    expires: datetime | None
    revoked: bool


@dataclass(frozen=True)
class Use:
    """What was used: tokens, operations and requests, seconds on devices (a shared pass is split by its tokens)."""

    num_operations: int
    training_tokens: int
    prompt_tokens: int
    sampled_tokens: int
    device_seconds: float


@dataclass(frozen=True)
class UsageInfo:
    """What a tenant has used in a span of days, by run, and what it has stored now."""

    tenant: str
    total: Use
    by_run: dict[str, Use]
    """By the run's name; under an empty name, sampling from bases as they are."""
    stored_bytes: int
    num_runs: int
    num_active_runs: int


class CreatedKey(NamedTuple):
    """A new API key and its secret, which is shown only once."""

    key: KeyInfo
    secret: str


@dataclass(frozen=True)
class SpanShare:
    """A tenant's part in a span; without a name, that of all others together."""

    tenant: str
    run: str
    num_tokens: int
    num_sequences: int


@dataclass(frozen=True)
class Span:
    """Time in which a worker was busy: a pass, or decode steps without a pause in the same company.

    `started` is a Unix time, `took` a duration, both in seconds.
    """

    started: float
    took: float
    shares: tuple[SpanShare, ...]
    num_tokens: int
    num_steps_beside: int
    """Trainers: optimizer steps of other runs that were under way beside the pass."""
    num_decode_steps: int


@dataclass(frozen=True)
class WorkerTimeline:
    """What one worker did lately, oldest first."""

    worker: str
    kind: Literal["trainer", "sampler"]
    base: str
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class WorkerInfo:
    """A live trainer or sampler."""

    worker: str
    kind: Literal["trainer", "sampler"]
    base: str
    address: str
    num_resident: int
    queue_depth: int
    last_seen: datetime
    draining: bool
    load: float | None = None
    """Trainers: how many devices their runs would keep busy, lately."""
