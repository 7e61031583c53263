"""What callers of the OpenAI face may send: every field is known, every value checked, before anything is done.

A field that is not known here is refused, and so is one that is known to OpenAI and would change the answer in a way
that this face cannot. Fields that only concern accounting elsewhere (`user` and the like) are taken and ignored.
Knows nothing of models, tokens and calls.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from treadle_gateway.http.openai.problems import FieldError

Json = dict[str, Any]
"""A JSON object; values of any type."""
M = TypeVar("M", bound=BaseModel)

_INT32: Final = 2**31 - 1
MAX_CHOICES: Final = 1024
MAX_TOP: Final = 1000
MAX_METADATA: Final = 16

Count = Annotated[int, Field(ge=0, le=_INT32)]
TokenId = Annotated[int, Field(ge=0, le=_INT32)]
Key = Annotated[str, Field(min_length=1, max_length=64)]
Value = Annotated[str, Field(max_length=512)]

# Known to OpenAI and not possible here, with the values that ask for nothing.
_NEUTRAL_CHAT: Final[Mapping[str, tuple[object, ...]]] = {
    "audio": (None,),
    "function_call": (None, "none"),
    "functions": (None, []),
    "modalities": (None, ["text"]),
    "moderation": (None,),
    "parallel_tool_calls": (None,),
    "prediction": (None,),
    "reasoning_effort": (None, "none"),
    "response_format": (None, {"type": "text"}),
    "tool_choice": (None, "none"),
    "tools": (None, []),
    "verbosity": (None, "medium"),
    "web_search_options": (None,),
}
_NEUTRAL_COMPLETION: Final[Mapping[str, tuple[object, ...]]] = {"suffix": (None, "")}
_NEUTRAL_MESSAGE: Final[Mapping[str, tuple[object, ...]]] = {
    "annotations": (None, []),
    "audio": (None,),
    "function_call": (None,),
    "refusal": (None,),
    "tool_calls": (None, []),
    "tool_call_id": (None,),
}
_IGNORED: Final = ("user", "safety_identifier", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention")
# What a chat template is given by the face, or never.
_OWN_VARIABLES: Final = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
_SERVICE_TIERS: Final = (None, "auto", "default")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())


class StreamOptions(_Strict):
    """What a stream tells besides the text."""

    include_usage: bool | None = None
    # Padding against eavesdroppers who measure; TLS to this gateway has none, so only its absence can be had.
    include_obfuscation: Literal[False] | None = None


class TextPart(_Strict):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class ChatMessage(_Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    reasoning_content: str | None = None

    @property
    def text(self) -> str:
        """The content as one text."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)

    def for_template(self) -> dict[str, str]:
        """Returns the message as chat templates read it, which know `developer` as `system`."""
        role = "system" if self.role == "developer" else self.role
        optional = {"name": self.name, "reasoning_content": self.reasoning_content}
        return {"role": role, "content": self.text} | {key: value for key, value in optional.items() if value}


class SamplingFields(_Strict):
    """Fields of both kinds of request. The last five are Treadle's own."""

    model: str = Field(min_length=1, max_length=512)
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    max_tokens: Count | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = Field(None, ge=-1, le=_INT32)
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool | None = None

    @property
    def choices(self) -> int:
        """How many choices per prompt."""
        return self.n or 1

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def biases(self) -> dict[int, float]:
        """What is added to logits, by token."""
        return {int(token): bias for token, bias in (self.logit_bias or {}).items()}

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk that says what was used."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise _Wrong("stream_options", "is only for `stream: true`")
        for token in self.logit_bias or {}:
            if not (token.isdecimal() and len(token) <= 10 and int(token) <= _INT32):
                raise _Wrong("logit_bias", f"has the key {token[:20]!r}, which is not a token id")
        return self


class CompletionRequest(SamplingFields):
    """A request to /v1/completions."""

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP)

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        """The prompts, as texts or as tokens."""
        prompt: Any = self.prompt  # The four forms of the union are told apart by their first element.
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
            return [prompt]
        return list(prompt)

    @property
    def drawn(self) -> int:
        """How many samples are drawn of each prompt."""
        return self.best_of or self.choices

    @model_validator(mode="after")
    def _check_choices(self) -> Self:
        if not self.prompts:
            raise _Wrong("prompt", "is empty; give a text or tokens")
        if self.drawn < self.choices:
            raise _Wrong("best_of", f"is {self.drawn}, fewer than the {self.choices} choices that `n` asks for")
        if self.drawn > self.choices and (self.stream or self.echo):
            raise _Wrong("best_of", "must equal `n` where choices are streamed or echoed")
        if len(self.prompts) * self.drawn > MAX_CHOICES:
            raise _Wrong(
                "prompt", f"has {len(self.prompts)} texts of {self.drawn} samples; at most {MAX_CHOICES} in all"
            )
        if self.max_tokens == 0 and (self.stream or not self.echo):
            raise _Wrong("max_tokens", "is 0, so there is nothing to draw; it may be 0 with `echo: true`, not streamed")
        return self


class ChatRequest(SamplingFields):
    """A request to /v1/chat/completions. The last three fields are Treadle's own."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=_INT32)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP)
    store: bool | None = None
    metadata: dict[Key, Value] | None = Field(None, max_length=MAX_METADATA)
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None  # Any: variables of a template.

    @property
    def limit(self) -> int | None:
        """Most tokens of a choice, None for as many as the context holds."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @model_validator(mode="after")
    def _check_chat(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise _Wrong("top_logprobs", "is only for `logprobs: true`")
        if self.max_tokens == 0:
            raise _Wrong("max_tokens", "must be at least 1")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise _Wrong("max_tokens", "and `max_completion_tokens` say different things; give one of them")
        if self.metadata and not self.store:
            raise _Wrong("metadata", "is only kept with `store: true`")
        for name in _OWN_VARIABLES & (self.chat_template_kwargs or {}).keys():
            raise _Wrong("chat_template_kwargs", f"must not have {name!r}, which this face sets itself")
        if self.continue_final_message and self.add_generation_prompt:
            raise _Wrong("continue_final_message", "and `add_generation_prompt` exclude each other")
        return self


class MetadataChange(_Strict):
    """A request that changes the metadata of a stored completion."""

    metadata: dict[Key, Value] = Field(max_length=MAX_METADATA)


class _Wrong(ValueError):  # noqa: N818  A finding that names its field, for pydantic to pass on.
    def __init__(self, field: str, what: str) -> None:
        super().__init__(f"`{field}` {what}")
        self.field = field


def read_chat(body: object) -> ChatRequest:
    """Returns a request to /v1/chat/completions; raises FieldError."""
    kept = _without_neutral(_object(body), _NEUTRAL_CHAT, "")
    messages = kept.get("messages")
    if isinstance(messages, list):
        kept["messages"] = [
            _without_neutral(message, _NEUTRAL_MESSAGE, f"messages[{place}].") if isinstance(message, dict) else message
            for place, message in enumerate(messages)
        ]
    return _read(ChatRequest, _without_ignored(kept))


def read_completion(body: object) -> CompletionRequest:
    """Returns a request to /v1/completions; raises FieldError."""
    return _read(CompletionRequest, _without_ignored(_without_neutral(_object(body), _NEUTRAL_COMPLETION, "")))


def read_metadata(body: object) -> dict[str, str]:
    """Returns the metadata of a request that changes it; raises FieldError."""
    return _read(MetadataChange, _object(body)).metadata


def _read(kind: type[M], body: Json) -> M:
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise _problem(error, body) from None


def _object(body: object) -> Json:
    if not isinstance(body, dict):
        raise FieldError("the body must be a JSON object")
    return body


def _without_neutral(body: Json, neutral: Mapping[str, tuple[object, ...]], where: str) -> Json:
    for name, values in neutral.items():
        if name in body and not any(body[name] == value for value in values):
            raise FieldError(f"`{where}{name}` is not supported here", where + name, "unsupported_parameter")
    return {name: value for name, value in body.items() if name not in neutral}


def _without_ignored(body: Json) -> Json:
    for name in _IGNORED[:3]:
        if not isinstance(body.get(name), str | None):
            raise FieldError(f"`{name}` must be a string", name, "invalid_type")
    if body.get("service_tier") not in _SERVICE_TIERS:
        raise FieldError("`service_tier`: there is one tier; leave it out", "service_tier", "unsupported_value")
    return {name: value for name, value in body.items() if name not in (*_IGNORED, "service_tier")}


def _problem(error: ValidationError, body: Json) -> FieldError:
    """Returns the answer for the first finding, as OpenAI words and codes it."""
    finding = error.errors(include_url=False)[0]
    cause = finding.get("ctx", {}).get("error")
    if isinstance(cause, _Wrong):
        return FieldError(str(cause), cause.field, "invalid_value")
    param = _path(finding["loc"], body)
    if finding["type"] == "extra_forbidden":
        return FieldError(f"there is no parameter `{param}` here", param, "unknown_parameter")
    if finding["type"] == "missing":
        return FieldError(f"`{param}` is missing", param, "missing_required_parameter")
    code = "invalid_type" if finding["type"].endswith("_type") else "invalid_value"
    return FieldError(f"`{param}`: {finding['msg']}", param, code)


def _path(location: Sequence[int | str], body: object) -> str:
    """Returns where in the body a finding is; what pydantic adds of its own (which form of a union) is left out."""
    path = ""
    for part in location:
        if isinstance(part, int) and isinstance(body, list):
            path += f"[{part}]"
            body = body[part]
        elif isinstance(body, dict) and isinstance(part, str) and (part in body or part.isidentifier()):
            path += f".{part}" if path else part
            body = body.get(part)
        else:
            break
    return path
