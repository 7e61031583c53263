"""How long a run stands still when its trainer dies or leaves: recovery of 1, 10, 100 runs, and a planned hand-over.

Every time is what the runs' owner sees, through the SDK, with real processes. Process start is not part of it: it is
the same for every program that loads torch.
"""

import argparse
import signal
import tempfile
import time
from pathlib import Path
from statistics import median

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


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("--runs", type=int, nargs="+", default=[1, 10, 100], help="resident runs")
    parser.add_argument("--rounds", type=int, default=5, help="planned hand-overs")


def run(options: argparse.Namespace) -> list[Row]:
    """Returns the figures."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for count in options.runs:
            rows.append(recovery(Path(folder) / f"recovery-{count}", count))
        rows.append(hand_over(Path(folder) / "hand-over", options.rounds))
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


def hand_over(folder: Path, rounds: int) -> Row:
    """Drains the trainer that has a run, again and again; the longest time between two results of the run."""
    cluster = Cluster(folder, trainers=2, forked=True)
    gaps, usual = [], []
    try:
        cluster.start()
        with ServiceClient(cluster.gateway_address, cluster.new_tenant()) as service:
            training = service.create_lora_training_client(BASE, rank=4, seed=0)
            step_all([training], 0)
            for _ in range(rounds):
                holder = holder_of(cluster, training.run)
                leaving = cluster.processes.pop(holder)
                leaving.send_signal(signal.SIGTERM)
                times = step_times(training, 40)
                gaps.append(max(times))
                usual.append(median(times))
                leaving.wait(timeout=60)
                cluster.launch(holder)
                cluster.wait_ready([holder])
    finally:
        cluster.close()
    value = f"{median(gaps):.2f} s ({min(gaps):.2f}-{max(gaps):.2f}) without a result, {median(usual):.3f} s usually"
    return {"figure": "planned hand-over of a working run", "value": value, "target": "< 1 s"}


def step_times(training: TrainingClient, steps: int) -> list[float]:
    """Returns the seconds of each of so many steps, one after the other."""
    times = []
    for step in range(steps):
        began = time.perf_counter()
        step_all([training], step)
        times.append(time.perf_counter() - began)
    return times


def holder_of(cluster: Cluster, run_name: str) -> str:
    """Returns the name of the trainer that has a run's lease."""
    with grpc.insecure_channel(cluster.addresses["store"]) as channel:
        request = journal_pb2.LookupRunRequest(run=run_name)
        journal = journal_pb2_grpc.JournalServiceStub(channel)
        address = journal.LookupRun(request, metadata=internal_metadata(cluster.token), timeout=10).lease.address
    return next(name for name in ("trainer", "trainer-1") if cluster.addresses[name] == address)
