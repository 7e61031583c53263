"""What goes into and comes out of the SDK's calls: plain dataclasses with Tinker's names.

Token ids, loss inputs and log-probabilities may be lists, numpy arrays or torch tensors; they are kept as numpy
arrays. Knows nothing of the wire, of the network, or of which losses and bases a deployment offers.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from treadle.errors import BadBatchError, BadInputError, BadSamplingParamsError

# Elements may be of any number type: the constructors below turn them into int64 or float32.
AnyArray = NDArray[Any]
DataType = Literal["int64", "float32"]
StopReason = Literal["stop", "length"]


@runtime_checkable
class TorchTensorLike(Protocol):
    """The part of torch.Tensor that is used here, so that torch need not be installed."""

    def detach(self) -> "TorchTensorLike":
        """Returns it without its gradient."""

    def cpu(self) -> "TorchTensorLike":
        """Returns it in main memory."""

    def float(self) -> "TorchTensorLike":
        """Returns it as float32."""

    def is_floating_point(self) -> bool:
        """Tells whether its elements are floats."""

    def numpy(self) -> AnyArray:
        """Returns it as a numpy array that shares its memory."""


ArrayInput = ArrayLike | TorchTensorLike


def to_array(value: ArrayInput) -> AnyArray:
    """Returns a list, numpy array or torch tensor as a numpy array, without a copy where that is possible."""
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, TorchTensorLike):
        on_cpu = value.detach().cpu()
        # numpy has no bfloat16, so floats of any width go through float32.
        return on_cpu.float().numpy() if on_cpu.is_floating_point() else on_cpu.numpy()
    return np.asarray(value)


class TensorData:
    """A dense array of int64 or float32 elements; `data` may be flat when `shape` is given."""

    def __init__(self, data: ArrayInput, dtype: DataType | None = None, shape: Sequence[int] | None = None) -> None:
        array = to_array(data)
        if array.dtype.kind not in "iufb":
            raise BadBatchError(f"a tensor holds numbers, not elements of type {array.dtype}", "BAD_SHAPE")
        self.dtype: DataType = dtype or ("float32" if array.dtype.kind == "f" else "int64")
        array = array.astype(self.dtype, copy=False)
        if shape is not None and tuple(shape) != array.shape:
            if array.size != math.prod(shape):
                raise BadBatchError(f"{array.size} elements do not fill the shape {list(shape)}", "BAD_SHAPE")
            array = array.reshape(shape)
        self.data: AnyArray = array

    def __repr__(self) -> str:
        return f"TensorData(dtype={self.dtype!r}, shape={self.shape})"

    @property
    def shape(self) -> tuple[int, ...]:
        """The dimensions, outermost first."""
        return self.data.shape

    @classmethod
    def from_numpy(cls, array: AnyArray) -> "TensorData":
        """Returns a tensor with the array's elements as int64 or float32."""
        return cls(array)

    @classmethod
    def from_torch(cls, tensor: TorchTensorLike) -> "TensorData":
        """Returns a tensor with the torch tensor's elements as int64 or float32."""
        return cls(tensor)

    def to_numpy(self) -> AnyArray:
        """Returns the elements; the array may be read-only."""
        return self.data

    def tolist(self) -> list[Any]:
        """Returns the elements as (nested) lists of Python numbers."""
        elements: list[Any] = self.to_numpy().tolist()
        return elements


@dataclass(eq=False)
class EncodedTextChunk:
    """A piece of a model input: token ids."""

    tokens: Sequence[int] | AnyArray

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self.tokens)


@dataclass(eq=False)
class ModelInput:
    """A sequence of tokens, in one or more chunks."""

    chunks: list[EncodedTextChunk] = field(default_factory=list)

    @classmethod
    def from_ints(cls, tokens: Sequence[int] | AnyArray) -> "ModelInput":
        """Returns an input of one chunk."""
        return cls([EncodedTextChunk(tokens)])

    @classmethod
    def empty(cls) -> "ModelInput":
        """Returns an input of no tokens."""
        return cls([])

    @property
    def length(self) -> int:
        """Number of tokens."""
        return sum(chunk.length for chunk in self.chunks)

    def append(self, chunk: EncodedTextChunk) -> "ModelInput":
        """Returns a longer input; this one stays as it is."""
        return ModelInput([*self.chunks, chunk])

    def append_int(self, token: int) -> "ModelInput":
        """Returns an input with one more token; this one stays as it is."""
        return self.append(EncodedTextChunk([token]))

    def to_ints(self) -> list[int]:
        """Returns the tokens as Python integers."""
        ints: list[int] = self.to_numpy().tolist()
        return ints

    def to_numpy(self) -> NDArray[np.int32]:
        """Returns the tokens as int32[n]; raises BadBatchError for what is not a token id."""
        parts = [as_token_ids(chunk.tokens) for chunk in self.chunks]
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.int32), *parts])


def as_token_ids(tokens: ArrayInput) -> NDArray[np.int32]:
    """Returns token ids (or targets, with -1) as int32 of the same shape; raises BadBatchError when they do not fit."""
    array = to_array(tokens)
    if array.dtype == np.int32:
        return array
    if array.size == 0:
        return array.astype(np.int32)
    if array.dtype.kind not in "iu":
        raise BadBatchError(f"token ids are integers, not elements of type {array.dtype}", "BAD_SHAPE")
    if int(array.min()) < -(2**31) or int(array.max()) >= 2**31:
        raise BadBatchError("token ids must fit into 32 bits", "TOKEN_OUT_OF_RANGE")
    return array.astype(np.int32)


class Datum:
    """One training sequence: the tokens that go in and, per position, what its loss needs.

    `loss_fn_inputs` has `target_tokens` (the token that should follow each position; -1 is ignored; one or K per
    position) and the loss's own inputs, for example `weights`, `logprobs` or `advantages`.
    """

    def __init__(self, model_input: ModelInput, loss_fn_inputs: Mapping[str, TensorData | ArrayInput]) -> None:
        self.model_input = model_input
        self.loss_fn_inputs = {name: _loss_input(name, value) for name, value in loss_fn_inputs.items()}

    def __repr__(self) -> str:
        return f"Datum({self.model_input.length} tokens, {self.loss_fn_inputs})"

    def array(self, name: str) -> AnyArray:
        """Returns one of the loss inputs."""
        return self.loss_fn_inputs[name].data


def _loss_input(name: str, value: TensorData | ArrayInput) -> TensorData:
    if isinstance(value, TensorData):
        return value
    return TensorData(value, "int64" if name == "target_tokens" else "float32")


@dataclass(frozen=True)
class LoraConfig:
    """Shape and start of an adapter."""

    rank: int = 32
    seed: int | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True
    alpha: float = 32.0

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= 512:
            raise BadInputError(f"rank is {self.rank}; it must be from 1 to 512", "BAD_LORA_CONFIG")
        if not (self.train_unembed or self.train_mlp or self.train_attn):
            raise BadInputError(
                "at least one of train_unembed, train_mlp and train_attn must be True", "BAD_LORA_CONFIG"
            )


@dataclass(frozen=True)
class AdamParams:
    """AdamW with decoupled weight decay and clipping of the gradient's global norm (0: off)."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


@dataclass(frozen=True)
class SamplingParams:
    """How to draw tokens. `stop` is text or token ids; `[]` also goes on past the end-of-sequence tokens.

    Bias, penalties and temperature shape the distribution that log-probabilities are of; `top_k`, `top_p` and `min_p`
    then cut it. The repetition penalty counts the prompt too, the other two the sample alone.
    """

    max_tokens: int | None = None
    seed: int | None = None
    stop: str | Sequence[str] | Sequence[int] | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens <= 0:
            raise BadSamplingParamsError(f"max_tokens is {self.max_tokens}; it must be at least 1")
        if not self.temperature >= 0:
            raise BadSamplingParamsError(f"temperature is {self.temperature}; it must be 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise BadSamplingParamsError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise BadSamplingParamsError(f"min_p is {self.min_p}; it must be from 0 to 1")
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise BadSamplingParamsError(f"seed is {self.seed}; it must be from 0 to 2**64 - 1")

    def stops(self) -> tuple[list[str], list[int]]:
        """Returns the stop strings and the stop tokens."""
        if self.stop is None:
            return [], []
        entries: Iterable[str | int] = [self.stop] if isinstance(self.stop, str) else self.stop
        texts, tokens = [], []
        for entry in entries:
            if isinstance(entry, str):
                texts.append(entry)
            else:
                tokens.append(int(entry))
        return texts, tokens


@dataclass(eq=False)
class ForwardBackwardOutput:
    """Per-datum outputs in the order of the data (`logprobs`), and metrics named `name:reduction`."""

    loss_fn_outputs: list[dict[str, TensorData]]
    metrics: dict[str, float]
    loss_fn_output_type: str = "ArrayRecord"


@dataclass
class OptimStepResponse:
    """What an optimizer step reports."""

    metrics: dict[str, float]
    step: int = 0


@dataclass
class SaveStateResponse:
    """A saved checkpoint."""

    path: str


@dataclass
class SaveWeightsForSamplerResponse:
    """A published revision."""

    path: str


@dataclass
class LoadStateResponse:
    """A loaded state: the optimizer steps that it had done."""

    step: int


@dataclass
class BarrierResponse:
    """How many operations failed since the barrier before."""

    num_failed: int


@dataclass(eq=False)
class TopLogprobs:
    """The k likeliest tokens of n positions: `tokens` int32 [n, k], -1 for none; `logprobs` float32 [n, k], NaN."""

    tokens: NDArray[np.int32]
    logprobs: NDArray[np.float32]

    def at(self, position: int) -> list[tuple[int, float]] | None:
        """Returns (token, log-probability) of one position, likeliest first; None where there is none."""
        if self.tokens.shape[1] == 0 or self.tokens[position, 0] < 0:
            return None
        return list(zip(self.tokens[position].tolist(), self.logprobs[position].tolist(), strict=True))


@dataclass(eq=False)
class SampledSequence:
    """One continuation: its tokens (the stop token included) and their log-probabilities."""

    stop_reason: StopReason
    tokens: list[int]
    logprobs: list[float]
    topk_logprobs: TopLogprobs | None = None


@dataclass(eq=False)
class SampleResponse:
    """All continuations, and what was asked for about the prompt (None or NaN for its first token).

    `target_prompt_logprobs` is float32 [n, k]; `prompt_cache_hit_tokens` of the prompt did not have to be computed.
    """

    sequences: list[SampledSequence]
    prompt_logprobs: list[float | None] | None = None
    model: str = ""
    topk_prompt_logprobs: TopLogprobs | None = None
    target_prompt_logprobs: NDArray[np.float32] | None = None
    prompt_cache_hit_tokens: int = 0


@dataclass(eq=False)
class SampleDelta:
    """New tokens of one continuation; `stop_reason` is set with the last ones."""

    index: int
    tokens: list[int]
    logprobs: list[float]
    stop_reason: StopReason | None = None
