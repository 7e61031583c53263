"""A recipe's run in the service: made, found again after an interruption, checkpointed, published.

All that a resume needs is in the store: settings and plan in the run's metadata, weights and moments in checkpoints
named `step-000040`. Knows nothing of data and losses.
"""

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final, Self

from treadle.client import ServiceClient
from treadle.errors import BadInputError, ConflictError, NotFoundError
from treadle.names import parse_adapter
from treadle.recipes.batches import learning_rate_at
from treadle.recipes.configs import TrainConfig, describe
from treadle.recipes.reports import Observer, Report
from treadle.records import RunInfo, SupportedModel, TextSample
from treadle.sampling import SamplingClient
from treadle.training import TrainingClient
from treadle.types import AdamParams

FINAL: Final = "final"
BEST: Final = "best-"
LAST: Final = "last"
_BY_CONTENT: Final = ("data", "eval_data")
"""Settings that name files: a plan has the digest of what was in them."""
_STEP: Final = "step-"
Plan = dict[str, Any]  # Any: JSON.


class StoppedError(Exception):
    """The recipe was asked to stop; it goes on with `resume=run`."""

    def __init__(self, run: str, step: int) -> None:
        super().__init__(f"stopped at step {step} of {run}")
        self.run, self.step = run, step


class Job:
    """One recipe's run: its training client, what was planned for it, how many steps are done, and who watches."""

    def __init__(self, service: ServiceClient, training: TrainingClient, plan: Plan, observer: Observer) -> None:
        self.service, self.training, self.plan, self.observer = service, training, plan, observer
        self.done = 0
        self._saved: list[str] = []
        self._mark = time.monotonic()

    @classmethod
    def open(
        cls, service: ServiceClient, recipe: str, config: TrainConfig, base: str, plan: Plan, observer: Observer
    ) -> Self:
        """Makes a run, or goes on with the one that `config.resume` asks for, whose own plan then holds.

        Raises:
            ConflictError: the run is finished, or was made from other settings or other data.
        """
        found = find_resumable(service, recipe, config, observer)
        if found is None:
            job = cls._start(service, recipe, config, base, plan, observer)
        else:
            job = cls._resume(service, found, observer)
            if job.plan["digest"] != plan["digest"]:
                raise ConflictError(f"{found.name} was made from other data than {config.data} is now")
        observer.started(job.training.run, job.plan, job.done)
        job._mark = time.monotonic()
        return job

    @classmethod
    def _start(
        cls, service: ServiceClient, recipe: str, config: TrainConfig, base: str, plan: Plan, observer: Observer
    ) -> Self:
        """Makes a new run, which remembers settings and plan."""
        metadata = {"recipe": recipe, "config": json.dumps(describe(config)), "plan": json.dumps(plan)}
        if config.name:
            metadata["name"] = config.name
        if config.start_from:
            training = service.create_training_client_from_state(config.start_from, metadata)
        else:
            training = service.create_lora_training_client(
                base, config.rank, config.seed, True, True, config.train_unembed, metadata, config.alpha
            )
        return cls(service, training, plan, observer)

    @classmethod
    def _resume(cls, service: ServiceClient, run: RunInfo, observer: Observer) -> Self:
        """Goes back to the run's newest checkpoint, or to its start when there is none.

        Raises:
            ConflictError: there is no checkpoint, and steps were done.
        """
        training = service.attach_training_client(run.name)
        # What the interrupted program had sent still takes effect; only then it is known what is newest.
        training.barrier().result()
        steps = {step: name for name, step in _checkpoints(service, run.name, _STEP)}
        if not steps:
            raise ConflictError(f"{run.name} was interrupted before its first checkpoint; start again without resume")
        job = cls(service, training, json.loads(run.metadata["plan"]), observer)
        job.done = max(steps)
        training.load_state_with_optimizer(steps[job.done]).result()
        job._saved = [steps[step] for step in sorted(steps)]
        return job

    def report(
        self, step: int, metrics: dict[str, float], num_tokens: int = 0, samples: Sequence[TextSample] = ()
    ) -> None:
        """Keeps what a step showed with the run, and tells the observer."""
        now = time.monotonic()
        self.training.log_metrics(step, metrics, samples)
        self.observer.report(Report(step, self.plan["steps"], metrics, num_tokens, now - self._mark, samples))
        self._mark = now

    def save(self, step: int) -> None:
        """Saves a checkpoint behind the operations so far, without waiting; the two newest are kept."""
        name = f"{_STEP}{step:06d}"
        saved = f"{self.training.run}/checkpoints/{name}"
        if step == 0 or saved in self._saved:
            return
        self.training.save_state(name)
        self._saved.append(saved)
        for old in self._saved[:-2]:
            self._forget(old)
        self._saved = self._saved[-2:]

    def adam(self, config: TrainConfig, step: int) -> AdamParams:
        """Returns the optimizer's settings for step 0, 1, ..."""
        peak, steps = self.plan["learning_rate"], self.plan["steps"]
        rate = learning_rate_at(step, steps, peak, config.schedule, config.warmup_steps)
        return AdamParams(rate, eps=1e-8, weight_decay=config.weight_decay, grad_clip_norm=config.grad_clip_norm)

    def stop(self, step: int, *, exact: bool = True) -> StoppedError:
        """Saves a checkpoint, waits for it, and returns what to raise.

        With `exact` False a run that went on from here would not do the same; then the newest checkpoint must do.
        """
        if exact:
            self.save(step)
        self.training.barrier().result()
        return StoppedError(self.training.run, step)

    def keep_best(self, step: int) -> None:
        """Saves the weights as the best ones, then a checkpoint, and only then forgets the best ones of before."""
        before = _checkpoints(self.service, self.training.run, BEST)
        self.training.save_state(f"{BEST}{step:06d}")
        self.save(step)
        self.training.barrier().result()
        for name, _ in before:
            self._forget(name)

    def best(self) -> tuple[str, int] | None:
        """Returns the checkpoint with the best weights and its step, if one was kept; forgets what is later than done.

        What an interrupted program kept behind its newest checkpoint will be found again.
        """
        found = _checkpoints(self.service, self.training.run, BEST)
        for name, step in found:
            if step > self.done:
                self._forget(name)
        return max((one for one in found if one[1] <= self.done), key=lambda one: one[1], default=None)

    def back_to_checkpoint(self) -> None:
        """Takes the weights and moments of the newest checkpoint again."""
        self.training.load_state_with_optimizer(self._saved[-1])

    def publish(self, name: str = FINAL) -> str:
        """Publishes the weights; returns the revision's name."""
        return self.training.save_weights_for_sampler(name).result().path

    def sampler(self) -> SamplingClient:
        """Returns a client that samples from the weights as they are now."""
        return self.training.save_weights_and_get_sampling_client()

    def _forget(self, checkpoint: str) -> None:
        with contextlib.suppress(NotFoundError):
            self.service.delete_adapter(checkpoint)


def find_resumable(service: ServiceClient, recipe: str, config: TrainConfig, observer: Observer) -> RunInfo | None:
    """Returns the run that `config.resume` asks for; None to start a new one.

    Raises:
        ConflictError: it is finished, or it was made with other settings.
    """
    if not config.resume:
        return None
    wanted = describe(config)
    if config.resume != LAST:
        run = service.get_run(config.resume)
        _check_same(run, recipe, wanted)
        if _is_finished(service, run.name):
            raise ConflictError(
                f"{run.name} is finished: {run.name}/revisions/{FINAL}; give start_from to train it more"
            )
        return run
    for run in service.list_runs():
        if not _differences(run, recipe, wanted) and not _is_finished(service, run.name):
            if _checkpoints(service, run.name, _STEP):
                return run
            observer.notice(f"{run.name} has no checkpoint to go on from")
    observer.notice("there is no unfinished run of these settings; a new one starts")
    return None


def base_of(service: ServiceClient, config: TrainConfig) -> SupportedModel:
    """Returns the base that a recipe trains on: that of the adapter that it goes on from, or the chosen one."""
    return choose_base(service, service.get_adapter(config.start_from).base if config.start_from else config.base)


def choose_base(service: ServiceClient, base: str) -> SupportedModel:
    """Returns a base that is served for training; the only one when `base` is empty.

    Raises:
        BadInputError: there is no such base, or no one to choose.
    """
    models = {model.model_name: model for model in service.get_server_capabilities().supported_models}
    if base in models:
        return models[base]
    if not base and len(models) == 1:
        return next(iter(models.values()))
    found = ", ".join(models) or "none yet"
    raise BadInputError(f"choose a base; served: {found}" if not base else f"no base {base!r}; served: {found}")


def tokenizer_of(service: ServiceClient, model: SupportedModel) -> Any:  # Any: transformers' types.
    """Returns a base's tokenizer, from its folder if that is on this machine, else from the service."""
    return service.create_sampling_client(base_model=model.model_name).get_tokenizer()


def _checkpoints(service: ServiceClient, run: str, prefix: str) -> list[tuple[str, int]]:
    found = [(saved.name, parse_adapter(saved.name).adapter) for saved in service.list_checkpoints(run)]
    return [(name, int(last.removeprefix(prefix))) for name, last in found if last.startswith(prefix)]


def _is_finished(service: ServiceClient, run: str) -> bool:
    return any(parse_adapter(saved.name).adapter == FINAL for saved in service.list_revisions(run))


def _check_same(run: RunInfo, recipe: str, wanted: Mapping[str, Any]) -> None:
    """Raises ConflictError unless the settings are the run's; where its data lies does not count, but what it is."""
    wanted = {key: value for key, value in wanted.items() if key not in _BY_CONTENT}
    differences = _differences(run, recipe, wanted)
    if differences:
        raise ConflictError(f"{run.name} cannot be resumed with other settings: {'; '.join(differences)}")


def _differences(run: RunInfo, recipe: str, wanted: Mapping[str, Any]) -> list[str]:
    if run.metadata.get("recipe") != recipe or run.state != "active":
        return [f"it is no unharmed run of the recipe {recipe}"]
    then = json.loads(run.metadata["config"])
    # What JSON makes of the settings, so that like is compared with like.
    now = json.loads(json.dumps(wanted))
    return [f"{key} was {then.get(key)!r}, is {now[key]!r}" for key in now if then.get(key) != now[key]]
