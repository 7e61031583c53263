"""Direct preference optimization: `treadle dpo pairs.jsonl`, rows with prompt, chosen and rejected.

The loss of a pair is -log sigmoid(beta ((c - c0) - (r - r0))) with the log-probabilities of the chosen and the rejected
response now and at the start (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290). Its gradient is that of a cross
entropy whose weights are +-beta sigmoid(-...), so a step is one forward and one forward_backward; no torch is needed
here. To change the method, copy this file.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from treadle.client import ServiceClient
from treadle.futures import Handle
from treadle.recipes import batches
from treadle.recipes.chat import ChatTokenizer
from treadle.recipes.configs import DpoConfig
from treadle.recipes.examples import Cuts, Example, encode_pair, fit_pairs
from treadle.recipes.job import Job, Plan, base_of, tokenizer_of
from treadle.recipes.reports import Observer, optim_metrics
from treadle.recipes.rows import DataError, read_rows
from treadle.records import SupportedModel
from treadle.sampling import SamplingClient
from treadle.types import ForwardBackwardOutput, ModelInput

Pair = tuple[Example, Example]
"""Chosen and rejected."""
_AT_ONCE = 64


@dataclass(frozen=True)
class DpoResult:
    """What came of it."""

    run: str
    revision: str
    """The published adapter."""
    steps: int
    loss: float | None
    """Mean over the pairs of the last step; None if a resumed run had no step left to do."""
    accuracy: float | None
    """Share of the held-out pairs, after the last step, of which the chosen side gained more than the rejected one."""
    cuts: str


def dpo(service: ServiceClient, config: DpoConfig, observer: Observer | None = None) -> DpoResult:
    """Trains an adapter to prefer the chosen responses and publishes it as the run's revision `final`.

    Raises:
        DataError: the data cannot be used; names file, line and column.
        StoppedError: the observer asked to stop; `resume` goes on, to the same losses bit for bit.
        TreadleError: what the service said.
    """
    observer = observer or Observer()
    model = base_of(service, config)
    pairs, held_out, cuts = load_pairs(config, model, tokenizer_of(service, model))
    observer.notice(str(cuts))
    job = Job.open(service, "dpo", config, model.model_name, make_plan(config, model, pairs, held_out), observer)
    start = service.create_sampling_client(config.start_from or None, None if config.start_from else model.model_name)
    return _Dpo(job, config, pairs, held_out, start, str(cuts)).run()


def load_pairs(
    config: DpoConfig, model: SupportedModel, tokenizer: ChatTokenizer
) -> tuple[list[Pair], list[Pair], Cuts]:
    """Returns the pairs to learn, those held out, and what was cut; raises DataError."""
    limits = (config.max_length, model.max_context_length, model.max_tokens_per_pass)
    encoded = [encode_pair(tokenizer, row, config) for row in read_rows(config)]
    kept, cuts = fit_pairs(encoded, min(limit for limit in limits if limit), config.over_long)
    chosen = set(batches.held_out_of(len(kept), config.eval_fraction, config.seed))
    pairs = [pair for index, pair in enumerate(kept) if index not in chosen]
    if not pairs:
        raise DataError(config.data, f"no pair is left: {cuts}")
    return pairs, [kept[index] for index in sorted(chosen)], cuts


def make_plan(config: DpoConfig, model: SupportedModel, pairs: list[Pair], held_out: list[Pair]) -> Plan:
    """Chooses what the settings leave open."""
    seen = hashlib.sha256()
    for example in (side for pair in (*pairs, *held_out) for side in pair):
        seen.update(example.tokens.tobytes() + example.weights.tobytes())
    lengths = [len(chosen.tokens) + len(rejected.tokens) for chosen, rejected in pairs]
    budget = model.max_tokens_per_pass or model.max_context_length
    size = config.batch_size or batches.choose_batch_size(lengths, budget)
    steps = len(batches.batches_of(len(pairs), size, epochs=config.epochs, steps=config.steps, seed=config.seed))
    return {
        "digest": seen.hexdigest()[:16],
        "learning_rate": config.learning_rate or batches.choose_learning_rate(model.num_parameters, 1 / 3),
        "batch_size": size,
        "steps": steps,
        "eval_every": config.eval_every or max(1, steps // 10),
    }


class _Dpo:
    """The loop, and what the start thought of every response."""

    def __init__(
        self,
        job: Job,
        config: DpoConfig,
        pairs: list[Pair],
        held_out: list[Pair],
        start: SamplingClient,
        cuts: str,
    ) -> None:
        self._job, self._config, self._pairs, self._held_out, self._cuts = job, config, pairs, held_out, cuts
        scores = _sums(start, [side for pair in (*pairs, *held_out) for side in pair]).reshape(-1, 2)
        self._start, self._start_held_out = scores[: len(pairs)], scores[len(pairs) :]
        self._loss: float | None = None

    def run(self) -> DpoResult:
        """Scores a batch, then learns from it, step by step."""
        job, config, plan = self._job, self._config, self._job.plan
        steps = batches.batches_of(
            len(self._pairs), plan["batch_size"], epochs=config.epochs, steps=plan["steps"], seed=config.seed
        )
        accuracy = None
        for step in range(job.done, len(steps)):
            if job.observer.should_stop():
                raise job.stop(step)
            self._learn(step, steps[step])
            if self._held_out and ((step + 1) % plan["eval_every"] == 0 or step + 1 == len(steps)):
                accuracy = self._evaluate(step + 1)
            if config.checkpoint_every and (step + 1) % config.checkpoint_every == 0:
                job.save(step + 1)
        return DpoResult(job.training.run, job.publish(), len(steps), self._loss, accuracy, self._cuts)

    def _learn(self, step: int, chosen: Sequence[int]) -> None:
        training = self._job.training
        batch = [self._pairs[index] for index in chosen]
        sides = [side for pair in batch for side in pair]
        gains = _gains(training.forward([side.datum() for side in sides]), sides, self._start[list(chosen)])
        loss, margins, weights = dpo_loss(gains, self._config.beta)
        self._loss = loss
        data = [side.datum(float(weight)) for side, weight in zip(sides, weights.flat, strict=True)]
        training.forward_backward(data, "cross_entropy")
        optim = training.optim_step(self._job.adam(self._config, step))
        metrics = {"loss": loss, "accuracy": float((margins > 0).mean()), "margin": float(margins.mean())}
        metrics |= {"chosen_gain": float(gains[:, 0].mean()), "rejected_gain": float(gains[:, 1].mean())}
        num_tokens = 2 * sum(datum.model_input.length for datum in data)
        self._job.report(step + 1, {**metrics, **optim_metrics(optim.result())}, num_tokens)

    def _evaluate(self, step: int) -> float:
        """Returns the share of held-out pairs of which the chosen side gained more."""
        sides = [side for pair in self._held_out for side in pair]
        gains = _gains(self._job.training.forward([s.datum() for s in sides]), sides, self._start_held_out)
        loss, margins, _ = dpo_loss(gains, self._config.beta)
        accuracy = float((margins > 0).mean())
        self._job.report(step, {"eval_loss": loss, "eval_accuracy": accuracy})
        return accuracy


def dpo_loss(gains: NDArray[np.float64], beta: float) -> tuple[float, NDArray[np.float64], NDArray[np.float64]]:
    """Returns the mean loss, each pair's margin [n], and -d loss / d log-probability of each side [n, 2].

    `gains` [n, 2] is by how much the log-probability of the chosen and of the rejected response grew.
    """
    margins = beta * (gains[:, 0] - gains[:, 1])
    slope = beta / (1.0 + np.exp(margins)) / len(gains)
    return float(np.logaddexp(0.0, -margins).mean()), margins, np.stack([slope, -slope], axis=1)


def _gains(
    forward: Handle[ForwardBackwardOutput], sides: Sequence[Example], start: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Returns by how much each response's log-probability grew since the start, [pairs, 2]."""
    outputs = forward.result().loss_fn_outputs
    now = [
        float(output["logprobs"].to_numpy()[side.weights[1:] > 0].sum(dtype=np.float64))
        for output, side in zip(outputs, sides, strict=True)
    ]
    return np.array(now).reshape(-1, 2) - start


def _sums(scorer: SamplingClient, sides: Sequence[Example]) -> NDArray[np.float64]:
    """Returns the log-probability that a model gives to the learned tokens of each side, [sides]."""
    sums: list[float] = []
    for begin in range(0, len(sides), _AT_ONCE):
        some = sides[begin : begin + _AT_ONCE]
        handles = [scorer.compute_logprobs(ModelInput.from_ints(side.tokens)) for side in some]
        for side, handle in zip(some, handles, strict=True):
            logprobs = np.array(handle.result()[1:], np.float64)
            sums.append(float(logprobs[side.weights[1:] > 0].sum()))
    return np.array(sums)
