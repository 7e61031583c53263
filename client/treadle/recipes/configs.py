"""What each recipe can be told: plain dataclasses with defaults, for a program, a command line or a form to fill in.

Every field's `help` says what it does; the command line's options are made from these fields. Imports nothing heavy,
knows no client and no data.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Schedule = Literal["linear", "cosine", "constant"]
OverLong = Literal["trim", "drop", "error"]
TrainOn = Literal["all", "last"]
PolicyLoss = Literal["importance_sampling", "ppo", "cispo"]
DistillLoss = Literal["top_k", "reverse_kl"]
Metric = Literal["exact_match", "reward", "perplexity"]


def option(default: Any, text: str) -> Any:  # Any: a field of any type.
    """Returns a field with a default and its help text."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which rows are read, and how they become tokens."""

    data: str = option("", "File (.jsonl, .json, .csv, .tsv, .parquet), folder, or hf:NAME of a Hugging Face dataset.")
    split: str = option("train", "Split of a Hugging Face dataset.")
    subset: str = option("", "Configuration of a Hugging Face dataset.")
    prompt_column: str = option("", "Column of the prompts.  [default: prompt, if there is one]")
    response_column: str = option("", "Column of the responses.  [default: response or completion]")
    messages_column: str = option("", "Column of the conversations.  [default: messages]")
    text_column: str = option("", "Column of plain texts.  [default: text]")
    chat: bool = option(True, "Put prompts into the base's chat template, if it has one.")
    max_length: int | None = option(None, "Longest sample in tokens.  [default: what base and trainer take]")
    limit: int | None = option(None, "Read only so many rows.")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(DataConfig):
    """What all recipes that train have in common."""

    base: str = option("", "Base to adapt.  [default: the only one that is served]")
    start_from: str = option("", "Saved adapter to go on from instead of a fresh one.")
    rank: int = option(16, "Rank of the adapter.")
    alpha: float = option(32.0, "Scale of the adapter; its product is multiplied by alpha / rank.")
    train_unembed: bool = option(False, "Adapt the unembedding too (vLLM cannot load that).")
    learning_rate: float | None = option(None, "Peak of Adam's learning rate.  [default: by the base's size]")
    schedule: Schedule = option("linear", "How the learning rate falls: to a tenth, or not at all.")
    warmup_steps: int = option(0, "Steps over which the learning rate rises from zero.")
    grad_clip_norm: float = option(1.0, "Largest norm of a step's gradient; 0 for any.")
    weight_decay: float = option(0.0, "Adam's decoupled weight decay.")
    seed: int = option(0, "Of the adapter's start, the order of the data and everything that is drawn.")
    checkpoint_every: int = option(50, "Steps between checkpoints to resume from; 0 for none.")
    resume: str = option("", "Run to go on with, or `last` for the newest unfinished one of the same settings.")
    name: str = option("", "A name for the run, shown in lists.")


@dataclass(frozen=True, kw_only=True)
class SftConfig(TrainConfig):
    """Supervised fine-tuning on prompt/response pairs, conversations or texts."""

    epochs: float = option(3.0, "Passes over the data.")
    steps: int | None = option(None, "Optimizer steps, instead of epochs.")
    batch_size: int | None = option(None, "Samples per step.  [default: by the trainer's token budget, at most 32]")
    pack: bool = option(False, "Fill steps with samples up to batch_tokens instead of counting samples.")
    batch_tokens: int | None = option(
        None, "Tokens per step when packing.  [default: the trainer's budget, up to 4096]"
    )
    train_on: TrainOn = option("all", "Learn every assistant message of a conversation, or the last alone.")
    over_long: OverLong = option("trim", "What happens to samples longer than max_length.")
    eval_data: str = option("", "Held-out rows in a file of their own, instead of a share of the data.")
    eval_fraction: float = option(0.05, "Share of the rows that is held out; 0 for none.")
    eval_every: int | None = option(None, "Steps between evaluations.  [default: a tenth of all steps]")
    patience: int = option(0, "Stop after so many evaluations without a better one; 0 for never.")
    num_samples: int = option(1, "Held-out prompts to answer at each evaluation, to look at.")


def describe(config: DataConfig) -> dict[str, Any]:  # Any: JSON.
    """Returns what a run is made from: all settings but those that say how it is called or resumed."""
    values = asdict(config)
    return {name: value for name, value in values.items() if name not in ("resume", "name")}


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(TrainConfig):
    """What recipes that train on their own samples have in common."""

    steps: int = option(50, "Optimizer steps.")
    prompts_per_step: int = option(8, "Prompts of a step.")
    group_size: int = option(8, "Samples per prompt.")
    max_tokens: int = option(256, "Most tokens of a sample.")
    temperature: float = option(1.0, "Of the samples.")
    one_step_off: bool = option(False, "Draw the next step's samples while this one trains: faster, one step old.")
    checkpoint_every: int = option(10, "Steps between checkpoints to resume from; 0 for none.")
    schedule: Schedule = option("constant", "How the learning rate falls: to a tenth, or not at all.")
    eval_data: str = option("", "File of prompts to evaluate on.")
    eval_every: int = option(10, "Steps between evaluations.")
    num_samples: int = option(2, "Samples of each step to keep for looking at.")


@dataclass(frozen=True, kw_only=True)
class RlConfig(SamplingConfig):
    """Reinforcement learning from a reward function, with advantages relative to the group (GRPO)."""

    reward: str = option("", "module:function or file.py:function; it gets a row and a completion, returns a number.")
    loss: PolicyLoss = option("importance_sampling", "Policy-gradient loss.")
    scale_by_std: bool = option(False, "Divide a group's advantages by the standard deviation of its rewards.")
    kl_coef: float = option(0.0, "Weight of a penalty per token for leaving the start.")
    report_kl: bool = option(True, "Report how far the adapter is from its start; costs a reading of the samples.")


@dataclass(frozen=True, kw_only=True)
class DistillConfig(SamplingConfig):
    """On-policy distillation: own samples, scored token by token by a teacher."""

    teacher: str = option("", "A saved adapter, or a base.  [default: the base]")
    loss: DistillLoss = option("top_k", "Learn the teacher's likeliest tokens at each position, or raise those drawn.")
    top_k: int = option(16, "How many tokens of the teacher's distribution are learned at each position.")
    group_size: int = option(4, "Samples per prompt.")


@dataclass(frozen=True, kw_only=True)
class DpoConfig(TrainConfig):
    """Direct preference optimization on rows with a prompt, a chosen and a rejected response."""

    beta: float = option(0.1, "How strongly the adapter is held to its start.")
    chosen_column: str = option("chosen", "Column of the better responses.")
    rejected_column: str = option("rejected", "Column of the worse responses.")
    epochs: float = option(2.0, "Passes over the data.")
    steps: int | None = option(None, "Optimizer steps, instead of epochs.")
    batch_size: int | None = option(None, "Pairs per step.  [default: by the trainer's token budget, at most 32]")
    over_long: OverLong = option("drop", "What happens to pairs with a side longer than max_length.")
    eval_fraction: float = option(0.05, "Share of the rows that is held out; 0 for none.")
    eval_every: int | None = option(None, "Steps between evaluations.  [default: a tenth of all steps]")


@dataclass(frozen=True, kw_only=True)
class EvalConfig(DataConfig):
    """Evaluation of a saved adapter or a base."""

    model: str = option("", "A saved adapter or a base.  [default: the only base that is served]")
    metric: Metric = option("exact_match", "What is measured.")
    reward: str = option("", "For the metric reward: module:function or file.py:function.")
    max_tokens: int = option(256, "Most tokens of an answer.")
    temperature: float = option(0.0, "Of the answers; 0 takes the likeliest.")
    seed: int = option(0, "Of the answers.")
    out: str = option("", "File for a JSON line per row: where it came from, the answer, the score.")
