"""Supervised fine-tuning on your own rows: `treadle sft data.jsonl`.

Rows become tokens of which the responses are learned (`sft_data.py`); some are held out; two steps are queued ahead.
To change the method, copy this file: everything that it uses is public.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from treadle.client import ServiceClient
from treadle.futures import Handle
from treadle.recipes.configs import SftConfig
from treadle.recipes.examples import Example
from treadle.recipes.job import Job, StoppedError, base_of, tokenizer_of
from treadle.recipes.reports import Observer, optim_metrics
from treadle.recipes.sft_data import SftData, load_data, make_plan, step_batches
from treadle.records import TextSample
from treadle.training import TrainingClient
from treadle.types import ForwardBackwardOutput, ModelInput, OptimStepResponse, SamplingParams

AHEAD = 2
"""Steps that are queued before the first answer is read: the worker never waits for the network."""
SAMPLE_TOKENS = 64


@dataclass(frozen=True)
class SftResult:
    """What came of it."""

    run: str
    revision: str
    """The published adapter: the best weights if `patience` was given, else the last."""
    steps: int
    loss: float | None
    """Mean loss per learned token at the last step; None if a resumed run had no step left to do."""
    eval_loss: float | None
    """The same over the held-out samples, for the published weights."""
    cuts: str


@dataclass
class _Step:
    number: int
    num_tokens: int
    loss: Handle[ForwardBackwardOutput]
    optim: Handle[OptimStepResponse]


def sft(service: ServiceClient, config: SftConfig, observer: Observer | None = None) -> SftResult:
    """Fine-tunes an adapter on the rows of `config.data` and publishes it as the run's revision `final`.

    Raises:
        DataError: the data cannot be used; names file, line and column.
        StoppedError: the observer asked to stop; `resume` goes on, to the same losses bit for bit.
        TreadleError: what the service said.
    """
    observer = observer or Observer()
    model = base_of(service, config)
    data = load_data(config, model, tokenizer_of(service, model))
    observer.notice(str(data.cuts))
    job = Job.open(service, "sft", config, model.model_name, make_plan(config, model, data), observer)
    return _Sft(job, config, data).run()


class _Sft:
    """The loop and what it remembers between steps."""

    def __init__(self, job: Job, config: SftConfig, data: SftData) -> None:
        self._job, self._config, self._data = job, config, data
        self._training: TrainingClient = job.training
        self._pending: deque[_Step] = deque()
        self._best: tuple[float, int] | None = None
        self._loss: float | None = None

    def run(self) -> SftResult:
        """Trains to the end, or until the held-out loss no longer falls."""
        job, plan, config = self._job, self._job.plan, self._config
        steps = step_batches(self._config, plan, self._data)
        if self._config.patience and job.done:
            self._recall_best()
        eval_loss = None
        step = job.done
        while step < len(steps) and not self._has_stalled(step):
            if self._job.observer.should_stop():
                raise self._interrupted(step)
            self._submit(step, [self._data.examples[index] for index in steps[step]])
            step += 1
            if self._data.held_out and (step % plan["eval_every"] == 0 or step == len(steps)):
                eval_loss = self._evaluate(step)
            if config.checkpoint_every and step % config.checkpoint_every == 0:
                job.save(step)
            self._report_all_but(AHEAD)
        self._report_all_but(0)
        if self._config.patience and self._best and self._best[1] != step:
            eval_loss = self._best[0]
            self._training.load_state(f"{self._training.run}/checkpoints/best-{self._best[1]:06d}")
        revision = job.publish()
        return SftResult(self._training.run, revision, step, self._loss, eval_loss, str(self._data.cuts))

    def _submit(self, step: int, batch: Sequence[Example]) -> None:
        # Losses are sums: divided by what is learned they are means, whatever the batch's size.
        scale = 1.0 / sum(float(example.weights[1:].sum()) for example in batch)
        loss = self._training.forward_backward([example.datum(scale) for example in batch], "cross_entropy")
        optim = self._training.optim_step(self._job.adam(self._config, step))
        self._pending.append(_Step(step + 1, sum(len(example.tokens) - 1 for example in batch), loss, optim))

    def _report_all_but(self, ahead: int) -> None:
        while len(self._pending) > ahead:
            done = self._pending.popleft()
            loss = self._loss = done.loss.result().metrics["loss:sum"]
            metrics = {"loss": loss, **optim_metrics(done.optim.result())}
            self._job.report(done.number, metrics, done.num_tokens)

    def _evaluate(self, step: int) -> float:
        """Scores the held-out samples, lets some prompts be answered, and remembers the best weights."""
        loss = self._held_out_loss()
        self._report_all_but(0)
        eval_loss = loss.result().metrics["loss:sum"]
        self._job.report(step, {"eval_loss": eval_loss}, samples=self._answers())
        if self._config.patience:
            if self._best is None or eval_loss < self._best[0]:
                self._best = (eval_loss, step)
                self._job.keep_best(step)
            self._job.save(step)
        return eval_loss

    def _held_out_loss(self) -> Handle[ForwardBackwardOutput]:
        scale = 1.0 / sum(float(example.weights[1:].sum()) for example in self._data.held_out)
        return self._training.forward([example.datum(scale) for example in self._data.held_out], "cross_entropy")

    def _answers(self) -> list[TextSample]:
        if not self._data.prompts:
            return []
        sampler = self._job.sampler()
        tokenizer = sampler.get_tokenizer()
        params = SamplingParams(max_tokens=SAMPLE_TOKENS, temperature=0.0)
        handles = [sampler.sample(ModelInput.from_ints(tokens), 1, params) for _, tokens in self._data.prompts]
        texts = [tokenizer.decode(h.result().sequences[0].tokens, skip_special_tokens=True) for h in handles]
        return [TextSample(asked, text.strip()) for (asked, _), text in zip(self._data.prompts, texts, strict=True)]

    def _has_stalled(self, step: int) -> bool:
        if not self._config.patience or self._best is None:
            return False
        every: int = self._job.plan["eval_every"]
        stalled = step // every - self._best[1] // every >= self._config.patience
        if stalled:
            self._job.observer.notice(f"stopped early: the held-out loss was lowest at step {self._best[1]}")
        return stalled

    def _recall_best(self) -> None:
        """Finds out again how good the best weights were: the same numbers as when they were kept."""
        best = self._job.best()
        if best is None:
            return
        self._training.load_state(best[0])
        self._best = (self._held_out_loss().result().metrics["loss:sum"], best[1])
        self._job.back_to_checkpoint()

    def _interrupted(self, step: int) -> StoppedError:
        self._report_all_but(0)
        return self._job.stop(step)
