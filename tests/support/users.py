"""Tenants at work: loops whose every number is the same in every life, as the measure of what faults may change.

Each loop returns all that its user saw, bit for bit, and the name that the final weights have by their content. Knows
nothing of the faults.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import count

import numpy as np

from treadle import AdamParams, Datum, ModelInput, SamplingParams, ServiceClient, TensorData
from treadle.futures import Handle
from treadle.recipes.chat import policy_datum

BASE = "treadle/pip"
PATIENCE_SECONDS = 240.0
AHEAD = 4
"""Steps that are queued before the first one is waited for."""

Seen = list[tuple[object, ...]]
Loop = Callable[[ServiceClient, int, Iterable[int]], Seen]


def batch(seed: int, step: int, rows: int = 3) -> list[Datum]:
    """Returns random sequences of different lengths."""
    generator = np.random.default_rng([seed, step])
    data = []
    for _ in range(rows):
        tokens = generator.integers(3, 500, int(generator.integers(5, 30)))
        inputs = {
            "target_tokens": TensorData.from_numpy(tokens[1:]),
            "weights": TensorData.from_numpy(np.ones(len(tokens) - 1, dtype=np.float32)),
        }
        data.append(Datum(model_input=ModelInput.from_ints(tokens[:-1].tolist()), loss_fn_inputs=inputs))
    return data


def supervise(service: ServiceClient, seed: int, steps: Iterable[int]) -> Seen:
    """Trains on given sequences with steps queued ahead, publishes, saves, and now and then goes back to a save."""
    training = service.create_lora_training_client(BASE, rank=4, seed=seed)
    adam = AdamParams(learning_rate=5e-3, eps=1e-8, grad_clip_norm=1.0)
    pending: deque[list[Handle]] = deque()
    seen: Seen = []

    def look() -> None:
        loss, stepped, *published = [handle.result(PATIENCE_SECONDS) for handle in pending.popleft()]
        norm = stepped.metrics["grad_norm:mean"]
        seen.append((loss.metrics["loss:sum"], norm, stepped.step, *(last_id(saved.path) for saved in published)))

    for step in steps:
        handles: list[Handle] = [training.forward_backward(batch(seed, step), "cross_entropy")]
        handles.append(training.optim_step(adam))
        if step % 4 == 3:
            handles.append(training.save_weights_for_sampler())
        pending.append(handles)
        if step % 10 == 9:
            saved = training.save_state(f"at-{step}").result(PATIENCE_SECONDS)
            if step % 20 == 19:
                training.load_state_with_optimizer(saved.path.replace(f"at-{step}", f"at-{step - 10}"))
        if len(pending) > AHEAD:
            look()
    while pending:
        look()
    seen.append((last_id(training.save_weights_for_sampler().result(PATIENCE_SECONDS).path),))
    training.close()
    return seen


def reinforce(service: ServiceClient, seed: int, steps: Iterable[int]) -> Seen:
    """Samples from its own weights, scores the samples, and trains on them."""
    training = service.create_lora_training_client(BASE, rank=4, seed=seed)
    seen: Seen = []
    for step in steps:
        sampler = training.save_weights_and_get_sampling_client()
        params = SamplingParams(max_tokens=6, temperature=1.0, seed=1000 * seed + step)
        prompt = [1, 5, 9]
        answer = sampler.sample(ModelInput.from_ints(prompt), 3, params).result(PATIENCE_SECONDS)
        data = []
        for sample in answer.sequences:
            advantage = float(sum(sample.tokens) % 7 - 3)
            data.append(policy_datum(prompt, sample.tokens, sample.logprobs, advantage))
        loss = training.forward_backward(data, "importance_sampling")
        stepped = training.optim_step(AdamParams(learning_rate=5e-3, eps=1e-8)).result(PATIENCE_SECONDS)
        drawn = tuple((tuple(sample.tokens), tuple(sample.logprobs)) for sample in answer.sequences)
        seen.append((drawn, loss.result(PATIENCE_SECONDS).metrics["loss:sum"], stepped.step))
    seen.append((last_id(training.save_weights_for_sampler().result(PATIENCE_SECONDS).path),))
    training.close()
    return seen


def last_id(path: str) -> str:
    """Returns the part of an adapter's name that follows from its content or was chosen."""
    return path.rpartition("/")[2]


@dataclass
class User:
    """A tenant that runs a loop in a thread of its own until it is told to finish."""

    loop: Loop
    seed: int
    address: str
    key: str
    num_steps: int = 0
    _finish: threading.Event = field(default_factory=threading.Event)
    _life: "Future[Seen]" = field(default_factory=Future)

    def start(self) -> "User":
        """Begins the loop."""
        threading.Thread(target=self._run, name=f"user-{self.seed}", daemon=True).start()
        return self

    @property
    def ended(self) -> bool:
        """Whether the loop has ended, which before `finish` only an error can make it."""
        return self._life.done()

    def finish(self) -> Seen:
        """Has the loop end after the step that it is in, and returns what it saw; raises what it raised."""
        self._finish.set()
        return self._life.result(2 * PATIENCE_SECONDS)

    def undisturbed(self) -> Seen:
        """Returns what a user sees that does as many steps of the same loop now."""
        with ServiceClient(self.address, self.key) as service:
            return self.loop(service, self.seed, range(self.num_steps))

    def _steps(self) -> Iterator[int]:
        for step in count():
            if self._finish.is_set():
                return
            yield step
            self.num_steps = step + 1

    def _run(self) -> None:
        try:
            with ServiceClient(self.address, self.key) as service:
                self._life.set_result(self.loop(service, self.seed, self._steps()))
        except Exception as error:  # noqa: BLE001  The thread's outermost guard: `finish` raises it.
            self._life.set_exception(error)


def wait_for_steps(users: list[User], more: int) -> None:
    """Waits until each user has begun so many more steps; raises what ended one of them before."""
    goals = [user.num_steps + more for user in users]
    deadline = time.monotonic() + PATIENCE_SECONDS
    while any(user.num_steps < goal for user, goal in zip(users, goals, strict=True)):
        for user in users:
            if user.ended:
                user.finish()
        assert time.monotonic() < deadline, [user.num_steps for user in users]
        time.sleep(0.02)
