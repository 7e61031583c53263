"""`treadle sample`: text from a base or a saved adapter, as it is made.

Knows the terminal and one sampling client.
"""

from typing import TYPE_CHECKING, Any

import click

from treadle.cli.connect import Place, place_options
from treadle.cli.output import print_rows

if TYPE_CHECKING:
    from collections.abc import Iterable

    from treadle.types import SampleDelta


@click.command()
@click.argument("model")
@click.argument("prompt")
@click.option("--max-tokens", type=click.IntRange(1), default=64, show_default=True)
@click.option("--temperature", type=click.FloatRange(0), default=0.7, show_default=True, help="0 takes the likeliest.")
@click.option("--num-samples", type=click.IntRange(1, 1024), default=1, show_default=True)
@click.option("--seed", type=click.IntRange(0), help="Makes the answer reproducible.")
@click.option("--raw", is_flag=True, help="Continue PROMPT as text instead of answering it as a message.")
@click.option("--tokenizer", default="", help="Folder or hub name; default: the base's own.")
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
    tokenizer: str,
) -> None:
    """Sample from MODEL, the name of a base or of a saved revision, given PROMPT."""
    from treadle.cli.connect import open_service
    from treadle.names import is_adapter
    from treadle.recipes.job import choose_base
    from treadle.tokenizers import load_tokenizer
    from treadle.types import ModelInput, SamplingParams

    with open_service(place) as service:
        name = model if is_adapter(model) else choose_base(service, model).model_name
        sampler = service.create_sampling_client(*((name, None) if is_adapter(name) else (None, name)))
        loaded = load_tokenizer(tokenizer) if tokenizer else sampler.get_tokenizer()
        tokens = ModelInput.from_ints(_encode(loaded, prompt, raw=raw))
        params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
        deltas = sampler.sample_stream(tokens, num_samples, params)
        if num_samples == 1 and place.format == "table":
            print_as_it_comes(loaded, deltas)
        else:
            texts = _collect(loaded, deltas, num_samples)
            print_rows(place, [{"sample": index, "text": text} for index, text in enumerate(texts)], "nothing")


def print_as_it_comes(tokenizer: Any, deltas: "Iterable[SampleDelta]", *, shown: bool = True) -> str:
    """Prints one continuation, unless it is not to be `shown`, and returns its text.

    Any: transformers has no one type for tokenizers.
    """
    tokens: list[int] = []
    text = ""
    for delta in deltas:
        tokens += delta.tokens
        now = tokenizer.decode(tokens, skip_special_tokens=True)
        # A character may be spread over tokens; until it is whole it decodes as the replacement character.
        if now.endswith("\ufffd"):
            continue
        if shown:
            click.echo(now[len(text) :], nl=False)
        text = now
    if shown:
        click.echo()
    return text


def _encode(tokenizer: Any, prompt: str, *, raw: bool) -> list[int]:
    from treadle.recipes.chat import prompt_tokens

    if raw or tokenizer.chat_template is None:
        return [int(token) for token in tokenizer.encode(prompt)]
    return prompt_tokens(tokenizer, [{"role": "user", "content": prompt}])


def _collect(tokenizer: Any, deltas: "Iterable[SampleDelta]", count: int) -> list[str]:
    tokens: list[list[int]] = [[] for _ in range(count)]
    for delta in deltas:
        tokens[delta.index] += delta.tokens
    return [tokenizer.decode(row, skip_special_tokens=True) for row in tokens]
