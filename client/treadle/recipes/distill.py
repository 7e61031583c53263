"""On-policy distillation: `treadle distill prompts.jsonl --teacher ADAPTER`.

The adapter draws its own samples, and a teacher (another adapter, or the base) says at each of their positions what it
would have drawn (Agarwal et al. 2024, https://arxiv.org/abs/2306.13649). `top_k` learns the teacher's likeliest tokens
there; `reverse_kl` raises or lowers each token that was drawn by what the teacher thinks more or less of it, which
stays closer to what the adapter does already and cannot find what it never draws. To change the method, copy this file.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from treadle.client import ServiceClient
from treadle.futures import Handle
from treadle.names import is_adapter
from treadle.recipes import batches
from treadle.recipes.configs import DistillConfig
from treadle.recipes.job import Job, Plan, base_of, tokenizer_of
from treadle.recipes.reports import Observer, optim_metrics
from treadle.recipes.rollouts import (
    Group,
    Prompt,
    Rollouts,
    check_sampling,
    digest_of,
    mean_kl,
    policy_datum,
    read_prompts,
)
from treadle.recipes.teachers import ask_teacher, taught_datum
from treadle.records import TextSample
from treadle.sampling import SamplingClient
from treadle.types import ForwardBackwardOutput, OptimStepResponse


@dataclass(frozen=True)
class DistillResult:
    """What came of it."""

    run: str
    revision: str
    """The published adapter."""
    steps: int
    kl: float | None
    """Mean divergence from the teacher per token of the last step's samples, in nats; None if no step was left."""
    eval_kl: float | None
    """The same over samples for the prompts of `eval_data`, after the last step."""


@dataclass
class _Step:
    """A step under way: what is to be reported of it."""

    number: int
    metrics: dict[str, float]
    num_tokens: int
    loss: Handle[ForwardBackwardOutput]
    optim: Handle[OptimStepResponse]
    samples: list[TextSample] = field(default_factory=list)


def distill(service: ServiceClient, config: DistillConfig, observer: Observer | None = None) -> DistillResult:
    """Trains an adapter to answer as the teacher does and publishes it as the run's revision `final`.

    Raises:
        DataError: the data cannot be used; names file, line and column.
        StoppedError: the observer asked to stop; `resume` goes on, to the same numbers bit for bit.
        TreadleError: what the service said, for example that there is no such teacher.
    """
    observer = observer or Observer()
    check_sampling(config)
    model = base_of(service, config)
    tokenizer = tokenizer_of(service, model)
    name = config.teacher or model.model_name
    teacher = service.create_sampling_client(*((name, None) if is_adapter(name) else (None, name)))
    prompts, held_out = read_prompts(tokenizer, config, model)
    plan: Plan = {
        "digest": digest_of([*prompts, *held_out]),
        "learning_rate": config.learning_rate
        or batches.choose_learning_rate(model.num_parameters, 1.0 if config.loss == "top_k" else 1 / 3),
        "steps": config.steps,
    }
    job = Job.open(service, "distill", config, model.model_name, plan, observer)
    samples = Rollouts(tokenizer, prompts, config, job.sampler())
    return _Distill(job, config, samples, teacher, held_out).run()


class _Distill:
    """The loop and what it remembers between steps."""

    def __init__(
        self, job: Job, config: DistillConfig, rollouts: Rollouts, teacher: SamplingClient, held_out: list[Prompt]
    ) -> None:
        self._job, self._config, self._rollouts = job, config, rollouts
        self._teacher, self._held_out = teacher, held_out
        self._kl: float | None = None

    def run(self) -> DistillResult:
        """Draws, lets the teacher score, trains, publishes; reports a step while the next one's samples are drawn."""
        config, job, rollouts = self._config, self._job, self._rollouts
        before: _Step | None = None
        eval_kl = None
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
                before, eval_kl = None, self._evaluate(step + 1)
        self._report(before)
        return DistillResult(job.training.run, job.publish(), config.steps, self._kl, eval_kl)

    def _train(self, step: int, groups: Sequence[Group]) -> _Step:
        """Queues the gradient and the step."""
        samples = [(group.prompt, one) for group in groups for one in group.sequences]
        by_tokens = self._config.loss == "reverse_kl"
        taught = ask_teacher(self._teacher, samples, 0 if by_tokens else self._config.top_k)
        drawn = [np.array(one.logprobs, np.float32) for _, one in samples]
        kl = self._kl = mean_kl(drawn, [scores.logprobs for scores in taught])
        num_tokens = sum(map(len, drawn))
        data = [
            policy_datum(*sample, (scores.logprobs - own) / np.float32(num_tokens))
            if by_tokens
            else taught_datum(*sample, scores, 1.0 / num_tokens)
            for sample, own, scores in zip(samples, drawn, taught, strict=True)
        ]
        loss = self._job.training.forward_backward(data, "importance_sampling" if by_tokens else "cross_entropy")
        optim = self._job.training.optim_step(self._job.adam(self._config, step))
        size = sum(datum.model_input.length for datum in data)
        metrics = {"kl": kl, "sample_tokens": num_tokens / len(data)}
        texts = [TextSample(group.prompt.text, group.texts[0]) for group in groups[: self._config.num_samples]]
        return _Step(step + 1, metrics, size, loss, optim, texts)

    def _report(self, step: _Step | None) -> None:
        if step is not None:
            step.loss.result()
            metrics = {**step.metrics, **optim_metrics(step.optim.result())}
            self._job.report(step.number, metrics, step.num_tokens, step.samples)

    def _evaluate(self, step: int) -> float:
        """Returns the divergence over one group for each held-out prompt."""
        samples = [(group.prompt, one) for group in self._rollouts.draw(self._held_out) for one in group.sequences]
        drawn = [np.array(one.logprobs, np.float32) for _, one in samples]
        kl = mean_kl(drawn, [scores.logprobs for scores in ask_teacher(self._teacher, samples, 0)])
        self._job.report(step, {"eval_kl": kl})
        return kl
