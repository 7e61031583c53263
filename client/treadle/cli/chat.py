"""`treadle chat`: a conversation with a base or a saved adapter, as it is made.

Knows the terminal and one sampling client.
"""

from typing import TYPE_CHECKING, Any

import click

from treadle.cli.connect import Place, place_options

if TYPE_CHECKING:
    from treadle.recipes.chat import Message
    from treadle.sampling import SamplingClient


@click.command()
@click.argument("model", default="")
@click.option("--system", default="", help="System message to begin with.")
@click.option("--max-tokens", type=click.IntRange(1), default=256, show_default=True)
@click.option("--temperature", type=click.FloatRange(0), default=0.7, show_default=True, help="0 takes the likeliest.")
@click.option("--seed", type=click.IntRange(0), help="Makes the answers reproducible.")
@place_options
def chat(place: Place, model: str, *, system: str, max_tokens: int, temperature: float, seed: int | None) -> None:
    """Talk to MODEL, a base or a saved adapter; by default the only base that is served.

    An empty line or Ctrl-D ends; /new forgets the conversation. Lines may also be piped in.
    """
    from treadle.cli.connect import open_service
    from treadle.names import is_adapter
    from treadle.recipes.job import choose_base
    from treadle.types import SamplingParams

    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    with open_service(place) as service:
        name = model if is_adapter(model) else choose_base(service, model).model_name
        sampler = service.create_sampling_client(*((name, None) if is_adapter(name) else (None, name)))
        _converse(place, sampler, [{"role": "system", "content": system}] if system else [], params)


def _converse(place: Place, sampler: "SamplingClient", start: "list[Message]", params: Any) -> None:
    import json

    tokenizer = sampler.get_tokenizer()
    said = list(start)
    for line in _lines():
        if line == "/new":
            said = list(start)
            continue
        said.append({"role": "user", "content": line})
        answer = _answer(sampler, tokenizer, said, params, shown=place.format == "table")
        if place.format == "json":
            click.echo(json.dumps({"prompt": line, "response": answer}))
        said.append({"role": "assistant", "content": answer})


def _lines() -> Any:  # An iterator of strings; typing imports would cost `--help` time.
    """Yields what is typed, or piped in, until an empty line or the end."""
    import sys

    typed = sys.stdin.isatty()
    while True:
        if typed:
            click.echo(click.style("> ", fg="green"), nl=False, err=True)
        line = sys.stdin.readline().rstrip("\n")
        if not line.strip():
            return
        yield line


def _answer(sampler: "SamplingClient", tokenizer: Any, said: "list[Message]", params: Any, *, shown: bool) -> str:
    """Returns the answer, printed as it comes."""
    from treadle.cli.sample import print_as_it_comes
    from treadle.recipes.configs import DataConfig
    from treadle.recipes.examples import encode_prompt
    from treadle.types import ModelInput

    prompt = ModelInput.from_ints(encode_prompt(tokenizer, said, DataConfig()))
    return print_as_it_comes(tokenizer, sampler.sample_stream(prompt, 1, params), shown=shown).strip()
