"""The JSON bodies that the Tinker SDK sends, checked as strictly as it writes them.

Knows nothing of what is done with them.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request

from treadle.errors import make_error

MAX_BODY_BYTES = 64 * 2**20
_Seq = Annotated[int, Field(ge=1, lt=2**31 - 1)]
_Slot = Annotated[int, Field(ge=0, lt=10**9)]
_Ttl = Annotated[int, Field(ge=3600, le=10 * 366 * 86400)] | None


class Body(BaseModel):
    """Any body: what is not known is refused, so that nothing silently does nothing."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), frozen=True)

    type: str = ""


class ClientConfig(Body):
    """POST client/config and client/dynamic_config."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    sdk_version: str = ""


class CreateSession(Body):
    """POST create_session."""

    tags: list[str] = []
    user_metadata: dict[str, Any] | None = None
    sdk_version: str = ""
    project_id: str | None = None
    display_name: str | None = None


class SessionHeartbeat(Body):
    """POST session_heartbeat."""

    session_id: str


class Lora(Body):
    """Shape of an adapter."""

    rank: int
    seed: int | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class Optimizer(Body):
    """Which optimizer a model has."""

    model_config = ConfigDict(extra="allow", frozen=True)

    type: str = "adamw"


class CreateModel(Body):
    """POST create_model."""

    session_id: str
    model_seq_id: _Slot
    base_model: str
    user_metadata: dict[str, Any] | None = None
    lora_config: Lora | None = None
    optimizer_config: Optimizer = Optimizer()


class GetInfo(Body):
    """POST get_info."""

    model_id: str


class Adam(Body):
    """Settings of a step."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


class OptimStep(Body):
    """POST optim_step."""

    model_id: str
    seq_id: _Seq
    adam_params: Adam | None = None
    optimizer_params: dict[str, Any] | None = None


class SaveWeights(Body):
    """POST save_weights."""

    model_id: str
    seq_id: _Seq
    path: str | None = None
    ttl_seconds: _Ttl = None
    overwrite: bool = False
    user_metadata: dict[str, str] | None = None


class SaveWeightsForSampler(Body):
    """POST save_weights_for_sampler."""

    model_id: str
    seq_id: _Seq
    path: str | None = None
    sampling_session_seq_id: _Slot | None = None
    kind: str = "snapshot"
    ttl_seconds: _Ttl = None
    user_metadata: dict[str, str] | None = None


class SaveWeightsExternal(Body):
    """POST save_weights_external."""

    model_id: str
    seq_id: _Seq
    path: str
    ttl_seconds: _Ttl = None
    age_encryption_recipients: list[str] | None = None


class LoadWeights(Body):
    """POST load_weights: into a live model, or into a new one."""

    path: str
    optimizer: bool
    model_id: str | None = None
    seq_id: _Seq | None = None
    session_id: str | None = None
    model_seq_id: _Slot | None = None
    base_model: str | None = None
    user_metadata: dict[str, Any] | None = None
    optimizer_config: Optimizer | None = None
    weights_access_token: str | None = None


class CopyWeights(Body):
    """POST copy_weights."""

    source_path: str
    session_id: str | None = None
    model_seq_id: _Slot | None = None
    destination_project_id: str | None = None
    ttl_seconds: _Ttl = None
    weights_access_token: str | None = None


class WeightsInfo(Body):
    """POST weights_info."""

    tinker_path: str


class CreateSamplingSession(Body):
    """POST create_sampling_session."""

    session_id: str
    sampling_session_seq_id: _Slot
    base_model: str | None = None
    model_path: str | None = None


class JoinSamplingSession(Body):
    """POST join_sampling_session."""

    sampling_session_id: str


class Chunk(Body):
    """A piece of a prompt."""

    model_config = ConfigDict(extra="allow", frozen=True)

    type: str = "encoded_text"
    tokens: list[int] = []


class Prompt(Body):
    """What is to be continued."""

    chunks: list[Chunk]


class Params(Body):
    """How to draw."""

    max_tokens: int | None = None
    seed: int | None = None
    stop: str | list[str] | list[int] | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0


class TensorBody(Body):
    """An array as JSON."""

    data: list[int] | list[float]
    dtype: Literal["int64", "float32"]
    shape: list[int] | None = None
    sparse_crow_indices: list[int] | None = None
    sparse_col_indices: list[int] | None = None


class Sample(Body):
    """POST asample."""

    prompt: Prompt
    sampling_params: Params
    num_samples: Annotated[int, Field(ge=1, le=1024)] = 1
    base_model: str | None = None
    model_path: str | None = None
    sampling_session_id: str | None = None
    seq_id: int | None = None
    prompt_logprobs: bool | None = None
    topk_prompt_logprobs: Annotated[int, Field(ge=0)] = 0
    topk_sample_logprobs: Annotated[int, Field(ge=0)] = 0
    target_prompt_logprobs: TensorBody | None = None
    prompt_alt_tokens_k: int = 0
    prompt_logprobs_last_n: int | None = None
    record_stability_info: bool | None = None


class RetrieveFuture(Body):
    """POST retrieve_future and cancel_future."""

    request_id: str
    allow_metadata_only: bool = False


class FuturesTarget(Body):
    """A client of a sampling session."""

    sampling_session_id: str
    cloned_sampler_id: int = 0


class RetrieveFutures(Body):
    """POST retrieve_futures."""

    target: FuturesTarget
    prev_cursor: int = 0
    timeout: float | None = None
    retrieved_request_ids: list[str] = []


class Ttl(Body):
    """PUT ttl."""

    ttl_seconds: _Ttl = None


BodyT = TypeVar("BodyT", bound=Body)


async def read_bytes(request: Request) -> bytes:
    """Returns the body; OPERATION_TOO_LARGE beyond what one request may have."""
    if int(request.headers.get("content-length") or 0) > MAX_BODY_BYTES:
        raise _too_large()
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_BODY_BYTES:
            raise _too_large()
        parts.append(part)
    return b"".join(parts)


async def read(request: Request, body: type[BodyT]) -> BodyT:
    """Returns a JSON body; BAD_VALUE with what is wrong in it."""
    data = await read_bytes(request)
    try:
        return body.model_validate_json(data or b"{}")
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise make_error("BAD_VALUE", f"{where or 'body'}: {first['msg']}") from error


def _too_large() -> Exception:
    return make_error("OPERATION_TOO_LARGE", f"a request has at most {MAX_BODY_BYTES} bytes; send smaller chunks")
