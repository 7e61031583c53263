"""`--dry-run`: what a recipe would train on, token by token, with no run made and nothing computed.

Learned tokens are green, tokens that are only read are dim.
"""

import json
from collections.abc import Sequence
from typing import Any

import click
from rich.console import Console
from rich.text import Text

from treadle.cli.connect import Place, open_service
from treadle.recipes.chat import ChatTokenizer
from treadle.recipes.configs import SftConfig
from treadle.recipes.examples import Example
from treadle.recipes.job import choose_base
from treadle.recipes.sft_data import load_data, make_plan
from treadle.tokenizers import load_tokenizer

_SHOWN = 3


def preview_sft(place: Place, config: SftConfig) -> None:
    """Prints the first samples, what was cut, and the plan."""
    with open_service(place) as service:
        model = choose_base(service, config.base)
        tokenizer = load_tokenizer(model.tokenizer or model.model_name)
        data = load_data(config, model, tokenizer)
        plan = make_plan(config, model, data)
    lengths = [len(example.tokens) for example in data.examples]
    facts = {
        "base": model.model_name,
        "samples": len(data.examples),
        "held_out": len(data.held_out),
        "tokens": sum(lengths),
        "learned_tokens": sum(example.num_learned for example in data.examples),
        "longest": max(lengths),
        "cuts": str(data.cuts),
        **plan,
    }
    print_preview(place, tokenizer, data.examples, facts)


def print_preview(place: Place, tokenizer: ChatTokenizer, examples: Sequence[Example], facts: dict[str, Any]) -> None:
    """Prints samples with their tokens coloured by weight, then the facts; all of it as JSON if that is wanted."""
    shown = examples[:_SHOWN]
    if place.format == "json":
        rows = [
            {"where": example.where, "tokens": _pieces(tokenizer, example), "weights": example.weights.tolist()}
            for example in shown
        ]
        click.echo(json.dumps({**facts, "examples": rows}, indent=2))
        return
    console = Console(highlight=False, soft_wrap=True)
    for example in shown:
        console.print(f"[bold]{example.where}[/], {example.num_learned} of {len(example.tokens)} tokens are learned")
        console.print(coloured(_pieces(tokenizer, example), example.weights.tolist()))
        console.print()
    for name, value in facts.items():
        console.print(f"{name + ':':<16} {value}", markup=False)


def coloured(pieces: Sequence[str], weights: Sequence[float]) -> Text:
    """Returns the text of the tokens: green what is learned, red what is unlearned, dim what is only read."""
    text = Text()
    for piece, weight in zip(pieces, weights, strict=True):
        text.append(piece, style="green" if weight > 0 else "red" if weight < 0 else "dim")
    return text


def _pieces(tokenizer: ChatTokenizer, example: Example) -> list[str]:
    """Returns each token's text; a character that is spread over tokens is shown at its last one."""
    pieces: list[str] = []
    waiting: list[int] = []
    for token in example.tokens.tolist():
        waiting.append(token)
        piece = tokenizer.decode(waiting, skip_special_tokens=False)
        if piece.endswith("\ufffd"):
            pieces.append("")
        else:
            pieces.append(piece)
            waiting = []
    return pieces
