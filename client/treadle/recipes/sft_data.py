"""What a supervised fine-tuning learns from and holds out, and the plan that follows from it.

Knows rows, tokens and the base's limits; sends nothing.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from treadle.recipes import batches
from treadle.recipes.chat import ChatTokenizer
from treadle.recipes.configs import SftConfig
from treadle.recipes.examples import Cuts, Example, encode_prompt, encode_row, fit, messages_of, prompt_of
from treadle.recipes.job import Plan
from treadle.recipes.rows import DataError, Row, read_rows
from treadle.records import SupportedModel


@dataclass(frozen=True)
class SftData:
    """What is learned and what is held out."""

    examples: list[Example]
    held_out: list[Example]
    prompts: list[tuple[str, list[int]]]
    """Of the first held-out rows: what is asked, as text and as tokens."""
    cuts: Cuts

    def digest(self) -> str:
        """Returns a sha256 over all tokens and weights."""
        seen = hashlib.sha256()
        for example in (*self.examples, *self.held_out):
            seen.update(example.tokens.tobytes() + example.weights.tobytes())
        return seen.hexdigest()[:16]


def load_data(config: SftConfig, model: SupportedModel, tokenizer: ChatTokenizer) -> SftData:
    """Reads, encodes and cuts the rows; raises DataError."""
    limits = (config.max_length, model.max_context_length, model.max_tokens_per_pass)
    max_length = min(limit for limit in limits if limit)

    def encode(rows: Sequence[Row]) -> tuple[list[Example], Cuts]:
        return fit([encode_row(tokenizer, row, config, config.train_on) for row in rows], max_length, config.over_long)

    rows = read_rows(config)
    held = read_rows(config, config.eval_data) if config.eval_data else []
    if not held:
        chosen = set(batches.held_out_of(len(rows), config.eval_fraction, config.seed))
        held = [row for index, row in enumerate(rows) if index in chosen]
        rows = [row for index, row in enumerate(rows) if index not in chosen]
    examples, cuts = encode(rows)
    if not examples:
        raise DataError(config.data, f"no sample is left: {cuts}")
    asked = [prompt_of(row, config) for row in held[: config.num_samples] if messages_of(row, config)]
    prompts = [(messages[-1]["content"], encode_prompt(tokenizer, messages, config)) for messages in asked]
    return SftData(examples, encode(held)[0], prompts, cuts)


def make_plan(config: SftConfig, model: SupportedModel, data: SftData) -> Plan:
    """Chooses what the settings leave open; the plan is kept with the run, so that a resume does the same."""
    lengths = [len(example.tokens) for example in data.examples]
    budget = model.max_tokens_per_pass or model.max_context_length
    plan: Plan = {
        "digest": data.digest(),
        "learning_rate": config.learning_rate or batches.choose_learning_rate(model.num_parameters),
    }
    if config.pack:
        plan["batch_tokens"] = config.batch_tokens or batches.choose_pack(lengths, budget)
    else:
        plan["batch_size"] = config.batch_size or batches.choose_batch_size(lengths, budget)
    plan["steps"] = len(step_batches(config, plan, data))
    plan["eval_every"] = config.eval_every or max(1, plan["steps"] // 10)
    return plan


def step_batches(config: SftConfig, plan: Plan, data: SftData) -> list[list[int]]:
    """Returns which examples each step learns."""
    if config.pack:
        lengths = [len(example.tokens) for example in data.examples]
        return batches.packed_batches(
            lengths, plan["batch_tokens"], epochs=config.epochs, steps=config.steps, seed=config.seed
        )
    return batches.batches_of(
        len(data.examples), plan["batch_size"], epochs=config.epochs, steps=config.steps, seed=config.seed
    )
