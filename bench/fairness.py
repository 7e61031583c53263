"""What a light tenant feels of a flooding one, in training and in sampling, on one deployment of real processes.

The light tenant waits for each of its steps (or requests) before the next. Three conditions take turns, round by round:
it is alone; it shares with one tenant of the same kind, which is its fair share; it shares with one tenant that keeps
every queue full. The figure is the p99 of its latency under the flood against that at fair share. Every tenant is a
process of its own, as in life.
"""

import argparse
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np

from bench.foundation import random_data, started
from treadle import AdamParams, ModelInput, SamplingClient, SamplingParams, ServiceClient, TrainingClient

CONDITIONS = ("alone", "fair share", "flood")
RANK = 8
Row = dict[str, str]
# One turn of a tenant: it returns when its work is done.
Turn = Callable[[], None]


@dataclass(frozen=True)
class Neighbour:
    """Another tenant: what it does, and as how many runs (training) or open requests (sampling)."""

    address: str
    key: str
    base: str
    what: str
    count: int = 1


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's options."""
    parser.add_argument("--base", default="pip", help="base to measure on")
    parser.add_argument("--rounds", type=int, default=4, help="rounds of the three conditions")
    parser.add_argument("--turns", type=int, default=25, help="steps, and requests, of the light tenant per round")
    parser.add_argument(
        "--flood-runs", type=int, default=4, help="runs of the flooding tenant, each with a full window"
    )
    parser.add_argument("--flood-requests", type=int, default=64, help="requests that the flooding tenant keeps open")


def run(options: argparse.Namespace) -> list[Row]:
    """Measures both services and returns the rows."""
    with tempfile.TemporaryDirectory() as folder, started(Path(folder), options.base) as (cluster, _):
        address = cluster.gateway_address
        key, equal_key, flood_key = (cluster.new_tenant() for _ in range(3))
        rows: list[Row] = []
        with ServiceClient(address, key) as service:
            base = service.get_server_capabilities().supported_models[0].model_name
            for what, count in (("training", options.flood_runs), ("sampling", options.flood_requests)):
                neighbours = {
                    "alone": None,
                    "fair share": Neighbour(address, equal_key, base, what),
                    "flood": Neighbour(address, flood_key, base, what, count),
                }
                rows += _measure(what, options, _turns(service, base, what)[0], neighbours)
        return rows


def _measure(what: str, options: argparse.Namespace, light: Turn, neighbours: dict[str, Neighbour | None]) -> list[Row]:
    seconds: dict[str, list[float]] = {condition: [] for condition in CONDITIONS}
    light()
    for _ in range(options.rounds):
        for condition in CONDITIONS:
            with _beside(neighbours[condition]):
                light()
                for _ in range(options.turns):
                    began = time.perf_counter()
                    light()
                    seconds[condition].append(time.perf_counter() - began)
    rows = []
    for condition in CONDITIONS:
        p50, p99 = np.percentile(seconds[condition], [50, 99])
        figure = f"{what}: light tenant, {condition}"
        rows.append({"figure": figure, "value": f"p50 {1e3 * p50:.0f} ms, p99 {1e3 * p99:.0f} ms"})
    p99s = {condition: float(np.percentile(seconds[condition], 99)) for condition in CONDITIONS}
    ratio = p99s["flood"] / p99s["fair share"]
    rows.append({"figure": f"{what}: p99 in a flood / at fair share", "value": f"{ratio:.2f}", "target": "2"})
    return rows


@contextmanager
def _beside(neighbour: Neighbour | None) -> Iterator[None]:
    """Lets a neighbour work in a process of its own, over and over, until the context ends."""
    if neighbour is None:
        yield
        return
    context = multiprocessing.get_context("spawn")
    working, stop = context.Event(), context.Event()
    process = context.Process(target=_work, args=(neighbour, working, stop))
    process.start()
    try:
        if not working.wait(60.0):
            raise RuntimeError("the neighbour did not begin to work")
        yield
    finally:
        stop.set()
        process.join()


def _work(neighbour: Neighbour, working: Event, stop: Event) -> None:
    """Takes turns until told to stop, as a process's main function."""
    with ServiceClient(neighbour.address, neighbour.key) as service:

        def repeat(turn: Turn) -> None:
            turn()
            working.set()
            while not stop.is_set():
                turn()

        threads = [
            threading.Thread(target=repeat, args=(turn,))
            for turn in _turns(service, neighbour.base, neighbour.what, neighbour.count)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def _turns(service: ServiceClient, base: str, what: str, count: int = 1) -> list[Turn]:
    """Returns the turns of a tenant that works synchronously, or of one that keeps so many runs or requests going."""
    if what == "sampling":
        sampler = service.create_sampling_client(base_model=base)
        return [_request(sampler) if count == 1 else _requests(sampler, count)]
    runs = [service.create_lora_training_client(base, rank=RANK, seed=seed) for seed in range(count)]
    return [_step(run) if count == 1 else _steps(run) for run in runs]


def _step(training: TrainingClient) -> Turn:
    data = random_data(vocabulary=1000)[:1]

    def turn() -> None:
        training.forward_backward(data, "cross_entropy")
        training.optim_step(AdamParams(learning_rate=1e-4)).result()

    return turn


def _steps(training: TrainingClient) -> Turn:
    """Keeps a run's window full of large batches; a turn ends when they are done."""
    data = random_data(vocabulary=1000)

    def turn() -> None:
        for _ in range(6):
            training.forward_backward(data, "cross_entropy")
            last = training.optim_step(AdamParams(learning_rate=1e-4))
        last.result()

    return turn


def _request(sampler: SamplingClient) -> Turn:
    prompt = ModelInput.from_ints(list(range(5, 37)))
    params = SamplingParams(max_tokens=16, temperature=1.0, seed=1)

    def turn() -> None:
        sampler.sample(prompt, 1, params).result()

    return turn


def _requests(sampler: SamplingClient, count: int) -> Turn:
    prompt = ModelInput.from_ints(list(range(5, 133)))

    def turn() -> None:
        waiting = [
            sampler.sample(prompt, 1, SamplingParams(max_tokens=64, temperature=1.0, seed=n)) for n in range(count)
        ]
        for handle in waiting:
            handle.result()

    return turn
