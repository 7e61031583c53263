"""Reinforcement learning from a reward function: `treadle rl prompts.jsonl --reward rewards.py:reward`.

Each step draws a group of samples per prompt, scores them, and raises those that are better than their group (GRPO,
Shao et al. 2024, https://arxiv.org/abs/2402.03300; without its division by the standard deviation unless asked for).
To change the method, copy this file: everything that it uses is public.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, pstdev

import numpy as np

from treadle.client import ServiceClient
from treadle.errors import BadInputError
from treadle.futures import Handle
from treadle.recipes import batches
from treadle.recipes.configs import RlConfig
from treadle.recipes.job import Job, Plan, base_of, tokenizer_of
from treadle.recipes.reports import Observer, optim_metrics
from treadle.recipes.rewards import Reward, load_reward, score
from treadle.recipes.rollouts import (
    Floats,
    Group,
    Prompt,
    Rollouts,
    check_sampling,
    digest_of,
    mean_kl,
    policy_datum,
    read_prompts,
)
from treadle.recipes.teachers import ask_teacher
from treadle.records import TextSample
from treadle.sampling import SamplingClient
from treadle.types import Datum, ForwardBackwardOutput, OptimStepResponse


@dataclass(frozen=True)
class RlResult:
    """What came of it."""

    run: str
    revision: str
    """The published adapter."""
    steps: int
    reward: float | None
    """Mean over the samples of the last step; None if a resumed run had no step left to do."""
    eval_reward: float | None
    """Mean over samples for the prompts of `eval_data`, after the last step."""


@dataclass
class _Step:
    """A step under way: what is to be reported of it."""

    number: int
    metrics: dict[str, float]
    samples: list[TextSample]
    data: list[Datum] = field(default_factory=list)
    drawn: list[Floats] = field(default_factory=list)
    """Per datum, the log-probabilities of its sample's tokens when they were drawn."""
    start: list[Floats] = field(default_factory=list)
    """The same by the weights that the run began with; empty when nobody wants them."""
    loss: Handle[ForwardBackwardOutput] | None = None
    optim: Handle[OptimStepResponse] | None = None


def rl(service: ServiceClient, config: RlConfig, observer: Observer | None = None) -> RlResult:
    """Trains an adapter on its own samples and publishes it as the run's revision `final`.

    Raises:
        DataError: the data cannot be used; names file, line and column.
        BadInputError: there is no such reward function, or a setting is wrong.
        StoppedError: the observer asked to stop; `resume` goes on, to the same rewards bit for bit.
        TreadleError: what the service said.
    """
    observer = observer or Observer()
    check_sampling(config)
    if config.kl_coef and config.temperature != 1.0:
        raise BadInputError("kl_coef compares log-probabilities of the samples with those at the start: temperature 1")
    reward = load_reward(config.reward)
    model = base_of(service, config)
    tokenizer = tokenizer_of(service, model)
    prompts, held_out = read_prompts(tokenizer, config, model)
    plan: Plan = {
        "digest": digest_of([*prompts, *held_out]),
        "learning_rate": config.learning_rate or batches.choose_learning_rate(model.num_parameters, 1 / 3),
        "steps": config.steps,
    }
    job = Job.open(service, "rl", config, model.model_name, plan, observer)
    start = service.create_sampling_client(config.start_from or None, None if config.start_from else model.model_name)
    samples = Rollouts(tokenizer, prompts, config, job.sampler())
    return _Rl(job, config, samples, reward, start, held_out).run()


class _Rl:
    """The loop and what it remembers between steps."""

    def __init__(
        self,
        job: Job,
        config: RlConfig,
        rollouts: Rollouts,
        reward: Reward,
        start: SamplingClient,
        held_out: list[Prompt],
    ) -> None:
        self._job, self._config, self._rollouts, self._reward = job, config, rollouts, reward
        self._start, self._held_out = start, held_out
        self._last_reward: float | None = None

    def run(self) -> RlResult:
        """Draws, scores, trains, publishes; the answers of a step are read while the next one's samples are drawn."""
        config, job, rollouts = self._config, self._job, self._rollouts
        before: _Step | None = None
        eval_reward = None
        for step in range(job.done, config.steps):
            if job.observer.should_stop():
                self._report(before)
                raise job.stop(step, exact=not config.one_step_off)
            rollouts.ask(step)
            self._report(before)
            before = self._train(step, rollouts.next())
            rollouts.sampler = job.sampler()
            if config.checkpoint_every and (step + 1) % config.checkpoint_every == 0:
                job.save(step + 1)
            if self._held_out and ((step + 1) % config.eval_every == 0 or step + 1 == config.steps):
                self._report(before)
                before, eval_reward = None, self._evaluate(step + 1)
        self._report(before)
        return RlResult(job.training.run, job.publish(), config.steps, self._last_reward, eval_reward)

    def _train(self, step: int, groups: Sequence[Group]) -> _Step:
        """Queues the gradient and the step; a group whose samples are all worth the same teaches nothing."""
        rewards = [[score(self._reward, group.prompt.row, text) for text in group.texts] for group in groups]
        every = [worth for group in rewards for worth in group]
        mean = self._last_reward = fmean(every)
        lengths = [len(one.tokens) for group in groups for one in group.sequences]
        metrics = {"reward": mean, "reward_std": pstdev(every), "sample_tokens": fmean(lengths)}
        metrics["groups_alike"] = fmean([float(len(set(group)) == 1) for group in rewards])
        texts = [TextSample(g.prompt.text, g.texts[0], r[0]) for g, r in zip(groups, rewards, strict=True)]
        made = _Step(step + 1, metrics, texts[: self._config.num_samples])
        self._fill(made, groups, rewards)
        if made.data:
            made.loss = self._job.training.forward_backward(made.data, self._config.loss)
            made.optim = self._job.training.optim_step(self._job.adam(self._config, step))
        return made

    def _fill(self, step: _Step, groups: Sequence[Group], rewards: Sequence[Sequence[float]]) -> None:
        """Makes the data: per token the advantage over the group, less what leaving the start costs."""
        config = self._config
        num_tokens = sum(len(one.tokens) for group in groups for one in group.sequences)
        chosen = [
            (group.prompt, one, (worth - fmean(worths)) / (pstdev(worths) + 1e-6 if config.scale_by_std else 1.0))
            for group, worths in zip(groups, rewards, strict=True)
            if len(set(worths)) > 1 or config.kl_coef
            for one, worth in zip(group.sequences, worths, strict=True)
        ]
        step.drawn = [np.array(one.logprobs, np.float32) for _, one, _ in chosen]
        if config.report_kl or config.kl_coef:
            step.start = [s.logprobs for s in ask_teacher(self._start, [(prompt, one) for prompt, one, _ in chosen])]
        for index, (prompt, one, advantage) in enumerate(chosen):
            advantages = np.full(len(one.tokens), advantage, np.float32)
            if config.kl_coef:
                advantages -= np.float32(config.kl_coef) * (step.drawn[index] - step.start[index])
            step.data.append(policy_datum(prompt, one, advantages / np.float32(num_tokens)))

    def _report(self, step: _Step | None) -> None:
        if step is None:
            return
        num_tokens = sum(datum.model_input.length for datum in step.data)
        if step.loss is not None and step.optim is not None:
            step.metrics |= optim_metrics(step.optim.result()) | self._divergences(step, step.loss.result())
        self._job.report(step.number, step.metrics, num_tokens, step.samples)

    def _divergences(self, step: _Step, output: ForwardBackwardOutput) -> dict[str, float]:
        """Returns how far the weights are from the start, and from those that drew the samples."""
        answers = [one["logprobs"].to_numpy() for one in output.loss_fn_outputs]
        policy = [answer[-len(drawn) :] for answer, drawn in zip(answers, step.drawn, strict=True)]
        found = {"sampler_kl": mean_kl(step.drawn, policy)}
        return {**found, "kl": mean_kl(policy, step.start)} if step.start else found

    def _evaluate(self, step: int) -> float:
        """Returns the mean reward over one group for each held-out prompt."""
        groups = self._rollouts.draw(self._held_out)
        worths = [score(self._reward, group.prompt.row, text) for group in groups for text in group.texts]
        self._job.report(step, {"eval_reward": fmean(worths)})
        return fmean(worths)
