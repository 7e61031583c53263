"""`treadle sample`: text from a base or a saved adapter, as it is made.

Knows the tokenizer only as transformers loads it.
"""

from typing import TYPE_CHECKING, Any

import click

from treadle.cli.connect import CALL_SECONDS, Place, open_channel, place_options
from treadle.cli.output import print_rows

if TYPE_CHECKING:
    from collections.abc import Iterable

    from treadle.v1 import admin_pb2, sampling_pb2


@click.command()
@click.argument("model")
@click.argument("prompt")
@click.option("--max-tokens", type=click.IntRange(1), default=64, show_default=True)
@click.option("--temperature", type=click.FloatRange(0), default=0.7, show_default=True, help="0 takes the likeliest.")
@click.option("--num-samples", type=click.IntRange(1, 1024), default=1, show_default=True)
@click.option("--seed", type=click.IntRange(0), help="Makes the answer reproducible.")
@click.option("--raw", is_flag=True, help="Continue PROMPT as text instead of answering it as a message.")
@click.option("--tokenizer", help="Folder or hub name; default: what the base says.")
@place_options
def sample(
    place: Place,
    model: str,
    prompt: str,
    *,
    max_tokens: int,
    temperature: float,
    num_samples: int,
    seed: int | None,
    raw: bool,
    tokenizer: str | None,
) -> None:
    """Sample from MODEL, the name of a base or of a saved revision, given PROMPT."""
    from treadle.v1 import sampling_pb2, sampling_pb2_grpc, types_pb2

    with open_channel(place) as channel:
        loaded = _load_tokenizer(tokenizer or _base_of(channel, place, model).tokenizer)
        tokens = _encode(loaded, prompt, raw=raw)
        params = sampling_pb2.SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
        request = sampling_pb2.SampleRequest(
            model=model,
            prompt=types_pb2.Tokens(list=types_pb2.TokenList(ids=tokens)),
            num_samples=num_samples,
            params=params,
        )
        answers = sampling_pb2_grpc.SamplingServiceStub(channel).StreamSample(
            sampling_pb2.StreamSampleRequest(request=request), metadata=place.metadata
        )
        if num_samples == 1 and place.format == "table":
            _print_as_it_comes(loaded, answers)
        else:
            texts = _collect(loaded, answers, num_samples)
            print_rows(place, [{"sample": index, "text": text} for index, text in enumerate(texts)], "nothing")


def _base_of(channel: Any, place: Place, model: str) -> "admin_pb2.BaseModel":  # Any: grpc.Channel, imported late.
    """Returns what the deployment says of a model's base."""
    from treadle.names import is_adapter
    from treadle.v1 import adapters_pb2, adapters_pb2_grpc, admin_pb2, admin_pb2_grpc

    base = model
    if is_adapter(model):
        adapters = adapters_pb2_grpc.AdapterServiceStub(channel)
        request = adapters_pb2.GetRevisionRequest(name=model)
        base = adapters.GetRevision(request, metadata=place.metadata, timeout=CALL_SECONDS).revision.base
    capabilities = admin_pb2_grpc.AdminServiceStub(channel).GetCapabilities(
        admin_pb2.GetCapabilitiesRequest(), metadata=place.metadata, timeout=CALL_SECONDS
    )
    bases: dict[str, admin_pb2.BaseModel] = {found.name: found for found in capabilities.bases}
    if base not in bases:
        raise click.ClickException(f"there is no model {model!r}; served: {', '.join(bases) or 'nothing yet'}")
    return bases[base]


def _load_tokenizer(where: str) -> Any:  # Any: transformers has no one type for tokenizers.
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise click.ClickException("this needs a tokenizer: pip install transformers") from error
    return AutoTokenizer.from_pretrained(where)


def _encode(tokenizer: Any, prompt: str, *, raw: bool) -> list[int]:
    from treadle.recipes.chat import prompt_tokens

    if raw or tokenizer.chat_template is None:
        return [int(token) for token in tokenizer.encode(prompt)]
    return prompt_tokens(tokenizer, [{"role": "user", "content": prompt}])


def _print_as_it_comes(tokenizer: Any, answers: "Iterable[sampling_pb2.StreamSampleResponse]") -> None:
    tokens: list[int] = []
    shown = ""
    for answer in answers:
        tokens += answer.tokens.list.ids
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        # A character may be spread over tokens; until it is whole it decodes as the replacement character.
        if not text.endswith("\ufffd"):
            click.echo(text[len(shown) :], nl=False)
            shown = text
    click.echo()


def _collect(tokenizer: Any, answers: "Iterable[sampling_pb2.StreamSampleResponse]", count: int) -> list[str]:
    tokens: list[list[int]] = [[] for _ in range(count)]
    for answer in answers:
        tokens[answer.index] += answer.tokens.list.ids
    return [tokenizer.decode(row, skip_special_tokens=True) for row in tokens]
