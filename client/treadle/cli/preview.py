"""`--dry-run`: what a recipe would train on, token by token, with no run made and nothing computed.

Learned tokens are green, tokens that are only read are dim.
"""

import json
from collections.abc import Sequence
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.text import Text

from treadle.cli.connect import Place, open_service
from treadle.recipes.chat import ChatTokenizer
from treadle.recipes.configs import DpoConfig, SamplingConfig, SftConfig
from treadle.recipes.examples import Example
from treadle.recipes.job import base_of, tokenizer_of
from treadle.recipes.sft_data import load_data, make_plan

_SHOWN = 3


def preview_sft(place: Place, config: SftConfig) -> None:
    """Prints the first samples, what was cut, and the plan."""
    with open_service(place) as service:
        model = base_of(service, config)
        tokenizer = tokenizer_of(service, model)
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


def preview_dpo(place: Place, config: DpoConfig) -> None:
    """Prints the first pairs, chosen before rejected, what was cut, and the plan."""
    from treadle.recipes.dpo import load_pairs, make_plan

    with open_service(place) as service:
        model = base_of(service, config)
        tokenizer = tokenizer_of(service, model)
        pairs, held_out, cuts = load_pairs(config, model, tokenizer)
        plan = make_plan(config, model, pairs, held_out)
    facts = {"base": model.model_name, "pairs": len(pairs), "held_out": len(held_out), "cuts": str(cuts), **plan}
    print_preview(place, tokenizer, [side for pair in pairs for side in pair], facts)


def preview_prompts(place: Place, config: SamplingConfig) -> None:
    """Prints the first prompts; nothing of them is learned, the samples will be."""
    from treadle.recipes.rollouts import read_prompts

    with open_service(place) as service:
        model = base_of(service, config)
        tokenizer = tokenizer_of(service, model)
        prompts, held_out = read_prompts(tokenizer, config, model)
    facts = {
        "base": model.model_name,
        "prompts": len(prompts),
        "held_out": len(held_out),
        "longest": max(len(prompt.tokens) for prompt in prompts),
        "samples_per_step": config.prompts_per_step * config.group_size,
        "steps": config.steps,
    }
    examples = [
        Example(np.array(prompt.tokens, np.int32), np.zeros(len(prompt.tokens), np.float32), prompt.row.where)
        for prompt in prompts
    ]
    print_preview(place, tokenizer, examples, facts)


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
