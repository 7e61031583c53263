"""How long a run stands still when its trainer dies or leaves: recovery of 1, 10, 100 runs, and a planned hand-over.

Every time is what the runs' owner sees, through the SDK, with real processes. The start of a process is not part of it:
it is the same for every program that loads torch.
"""

import argparse
import signal
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Self

import grpc

from tests.support.cluster import Cluster
from tests.support.users import BASE, batch
from treadle import AdamParams, ServiceClient
from treadle.internal.v1 import journal_pb2, journal_pb2_grpc
from treadle.training import TrainingClient
from treadle_service.channels import internal_metadata

Row = dict[str, str]
TAIL_STEPS = 4
"""Steps behind the newest snapshot that a recovery replays."""
CALM_SECONDS = 2.0
"""How long runs work before and after a hand-over that is measured."""
HAND_OVERS = (("pip", 4, 1), ("pip", 4, 20), ("smollm2", 32, 1), ("smollm2", 32, 4))
"""Base, rank and number of the runs that a trainer hands over."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("--base", nargs="+", default=["pip", "smollm2"], help="bases to hand over on")
    parser.add_argument("--runs", type=int, nargs="*", default=[1, 10, 100], help="resident runs")
    parser.add_argument("--rounds", type=int, default=5, help="planned hand-overs")


def run(options: argparse.Namespace) -> list[Row]:
    """Returns the figures."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for count in options.runs:
            rows.append(recovery(Path(folder) / f"recovery-{count}", count))
        for base, rank, count in HAND_OVERS:
            if base in options.base:
                place = Path(folder) / f"hand-over-{base}-{rank}-{count}"
                rows.append(hand_over(place, base, rank, count, options.rounds))
    return rows


def recovery(folder: Path, count: int) -> Row:
    """Kills the trainer of so many runs; the time from its successor's readiness to a new step of every run."""
    cluster = Cluster(folder, forked=True)
    try:
        cluster.start()
        with ServiceClient(cluster.gateway_address, cluster.new_tenant()) as service:
            runs = [service.create_lora_training_client(BASE, rank=4, seed=seed) for seed in range(count)]
            for steps in range(TAIL_STEPS):
                step_all(runs, steps)
            calm = time.perf_counter()
            step_all(runs, TAIL_STEPS)
            calm = time.perf_counter() - calm
            cluster.kill("trainer")
            cluster.launch("trainer")
            cluster.wait_ready(["trainer"])
            began = time.perf_counter()
            step_all(runs, TAIL_STEPS + 1)
            took = time.perf_counter() - began
    finally:
        cluster.close()
    value = f"{took:.2f} s until all have stepped again (the same step undisturbed: {calm:.2f} s)"
    return {"figure": f"{count} resident runs, each with {TAIL_STEPS + 1} steps to replay", "value": value}


def step_all(runs: list[TrainingClient], step: int) -> None:
    """Makes one step of every run and waits for all."""
    handles = []
    for seed, training in enumerate(runs):
        training.forward_backward(batch(seed, step), "cross_entropy")
        handles.append(training.optim_step(AdamParams(learning_rate=1e-3)))
    for handle in handles:
        handle.result(300)


def hand_over(folder: Path, base: str, rank: int, count: int, rounds: int) -> Row:
    """Drains the trainer that has so many working runs, again and again; the longest time without a result of each.

    As in a rolling restart: the trainer that has just come back is the next one's heir.
    """
    cluster = Cluster(folder, base, trainers=2)
    gaps, usual = [], []
    try:
        cluster.start()
        with ServiceClient(cluster.gateway_address, cluster.new_tenant()) as service:
            name = service.get_server_capabilities().supported_models[0].model_name
            runs = [service.create_lora_training_client(name, rank=rank, seed=seed) for seed in range(count)]
            step_all(runs, 0)
            for _ in range(rounds):
                holder = holder_of(cluster, runs[0].run)
                walkers = [Walker(seed, training) for seed, training in enumerate(runs)]
                with ExitStack() as stack:
                    for walker in walkers:
                        stack.enter_context(walker)
                    time.sleep(CALM_SECONDS)
                    leaving = cluster.processes.pop(holder)
                    leaving.send_signal(signal.SIGTERM)
                    leaving.wait(timeout=60)
                    time.sleep(CALM_SECONDS)
                gaps += [max(walker.times) for walker in walkers]
                usual += [median(walker.times) for walker in walkers]
                cluster.launch(holder)
                cluster.wait_ready([holder])
    finally:
        cluster.close()
    value = (
        f"{median(gaps):.2f} s ({min(gaps):.2f}-{max(gaps):.2f}) from one result to the next, "
        f"{median(usual):.3f} s usually"
    )
    what = "working run" if count == 1 else f"{count} working runs at once"
    return {"figure": f"planned hand-over of {what}, {base}, rank {rank}", "value": value, "target": "< 1 s"}


class Walker:
    """Makes steps of one run in a thread, each after the result of the one before; keeps how long each took."""

    def __init__(self, seed: int, training: TrainingClient) -> None:
        self.times: list[float] = []
        self._seed, self._training = seed, training
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._walk)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _walk(self) -> None:
        step = 0
        while not self._stop.is_set():
            began = time.perf_counter()
            self._training.forward_backward(batch(self._seed, step), "cross_entropy")
            self._training.optim_step(AdamParams(learning_rate=1e-3)).result(300)
            self.times.append(time.perf_counter() - began)
            step += 1


def holder_of(cluster: Cluster, run_name: str) -> str:
    """Returns the name of the trainer that has a run's lease; empty while it is free."""
    with grpc.insecure_channel(cluster.addresses["store"]) as channel:
        request = journal_pb2.LookupRunRequest(run=run_name)
        journal = journal_pb2_grpc.JournalServiceStub(channel)
        address = journal.LookupRun(request, metadata=internal_metadata(cluster.token), timeout=10).lease.address
    return next((name for name in ("trainer", "trainer-1") if cluster.addresses[name] == address), "")
