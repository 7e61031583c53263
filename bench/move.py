"""What it costs to move a run by load, and what it brings.

`gaps`: a second trainer joins again and again, and half of the runs go to it by themselves: the longest time without a
result that their owners see, with real processes. `real`: steps per second of tenants that queue ahead on one trainer,
and after a second has joined and loads are even. `simulated`: the same where processors are lacking for it, with the
real decisions over made-up computing, and what moves bring to runs that were placed by hashing alone.
"""

import argparse
import random
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import grpc
import psutil

from bench.capacity import BIG
from bench.moving_fleet import Fleet
from bench.recovery import CALM_SECONDS, Walker, holder_of, step_all
from bench.service import Load, Row, figure, sequences
from tests.support.cluster import ROLES, Cluster
from treadle import ServiceClient
from treadle.capacity import Usage
from treadle.internal.v1 import workers_pb2, workers_pb2_grpc
from treadle.v1 import admin_pb2
from treadle_service.channels import internal_metadata

SOON = {"TREADLE_TRAINER_REBALANCE_SECONDS": "0.5", "TREADLE_TRAINER_REBALANCE_STAY_SECONDS": "2"}
BASES = (("pip", 4), ("pip", 128), ("pip", 256), ("smollm2", 16))
"""Base and rank of the runs that move."""
NUM_TENANTS, WINDOW = 6, 4
SPREAD_SECONDS = 90.0
"""Simulated time in which runs move: they stay for a minute where they came."""
MOVE_SECONDS = 0.3
"""How long a run stands still in the simulation."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parts = ("gaps", "real", "simulated")
    parser.add_argument("--parts", nargs="+", default=list(parts), choices=parts, help="what to measure")
    parser.add_argument("--base", nargs="+", default=["pip", "smollm2"], help="bases to move runs on")
    parser.add_argument("--rounds", type=int, default=8, help="how often a trainer joins and leaves")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long tenants are watched, before and after")


def run(options: argparse.Namespace) -> list[Row]:
    """Returns the figures."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        if "gaps" in options.parts:
            for base, rank in BASES:
                if base in options.base:
                    rows += gaps(Path(folder) / f"{base}-{rank}", base, rank, options.rounds)
        if "real" in options.parts:
            rows += real(Path(folder) / "real", options.seconds)
    if "simulated" in options.parts:
        rows += joined() + placed()
    return rows


def gaps(folder: Path, base: str, rank: int, rounds: int) -> list[Row]:
    """Lets two runs work, and a second trainer join and leave: each time one of them moves there by itself."""
    cluster = Cluster(folder, base, settings=SOON, trainers=2, forked=True)
    seen: list[float] = []
    usual: list[float] = []
    try:
        cluster.start(*ROLES)
        with ServiceClient(cluster.gateway_address, cluster.new_tenant()) as service:
            name = service.get_server_capabilities().supported_models[0].model_name
            runs = [service.create_lora_training_client(name, rank=rank, seed=seed) for seed in range(2)]
            step_all(runs, 0)
            size = _state_bytes(cluster) / 2
            for _ in range(rounds):
                walkers = [Walker(seed, training) for seed, training in enumerate(runs)]
                with ExitStack() as stack:
                    for walker in walkers:
                        stack.enter_context(walker)
                    cluster.launch("trainer-1")
                    cluster.wait_ready(["trainer-1"])
                    while not (moved := [n for n in range(2) if holder_of(cluster, runs[n].run) == "trainer-1"]):
                        time.sleep(0.05)
                    time.sleep(CALM_SECONDS)
                seen += [max(walkers[number].times) for number in moved]
                usual += [median(walkers[number].times) for number in moved]
                cluster.stop("trainer-1")
    finally:
        cluster.close()
    value = (
        f"{median(seen):.2f} s median, {max(seen):.2f} s at most of {len(seen)} moves, from one result to the next "
        f"({median(usual):.3f} s usually)"
    )
    return [figure(f"a run moves by load, {base}, rank {rank}, {size / 1e6:.1f} MB of state", value, "< 1 s")]


def real(folder: Path, seconds: float) -> list[Row]:
    """Counts the steps of tenants that queue ahead, on one trainer of one thread and on two."""
    cluster = Cluster(folder, settings=SOON, trainers=2, forked=True)
    try:
        cluster.start(*ROLES)
        load = Load(cluster, [sequences(4, 256)] * NUM_TENANTS, [16] * NUM_TENANTS, WINDOW, 0.0)
        rates, shares = [], []
        with load.working():
            for count in (1, 2):
                if count == 2:
                    cluster.launch("trainer-1")
                    cluster.wait_ready(["trainer-1"])
                    time.sleep(seconds)
                rate, busy = _watch(load, seconds)
                rates.append(rate)
                shares.append(busy)
    finally:
        cluster.close()
    value = f"{rates[0]:.1f} steps/s on one, {rates[1]:.1f} on two: {rates[1] / rates[0]:.2f} times; "
    value += f"machine busy {shares[0]:.2f} and {shares[1]:.2f} of {psutil.cpu_count()} processors"
    return [figure(f"{NUM_TENANTS} tenants that queue ahead, pip, a second trainer joins", value)]


def joined(round_trip: float = 0.1) -> list[Row]:
    """Simulates tenants on one trainer, and a second one that joins."""
    rows = []
    for window, own in ((WINDOW, 0.0), (1, 0.2)):
        usage = Usage(512, round_trip, window, own)
        number = 8 if window > 1 else 32
        fleet = Fleet(BIG, 2, MOVE_SECONDS)
        for _ in range(number):
            fleet.add(usage, 0)
        before = fleet.watch(SPREAD_SECONDS / 2)
        fleet.watch(SPREAD_SECONDS)
        after = fleet.watch(SPREAD_SECONDS)
        how = f"{window} steps ahead" if window > 1 else "synchronous"
        value = f"{sum(before):.1f} steps/s on one, {sum(after):.1f} on two: {sum(after) / sum(before):.2f} times; "
        rows.append(figure(f"simulated, {number} x {how}, a second trainer joins", f"{value}{fleet.num_moves} moves"))
    return rows


def placed(num_tenants: int = 100, num_trainers: int = 10) -> list[Row]:
    """Simulates tenants of two kinds that were placed by hashing alone, before and after runs have moved."""
    fleet, places = Fleet(BIG, num_trainers, MOVE_SECONDS), random.Random(2)
    ahead, synchronous = Usage(512, 0.1, WINDOW), Usage(512, 0.1, 1, 0.5)
    for number in range(num_tenants):
        fleet.add(synchronous if number % 3 else ahead, places.randrange(num_trainers))
    rows = []
    for when, seconds in (("before moves", 2.0), ("after", SPREAD_SECONDS)):
        fleet.watch(seconds)
        rates = fleet.watch(SPREAD_SECONDS / 2)
        slowest = min(rates[number] for number in range(0, num_tenants, 3))
        loads = [trainer.load for trainer in fleet.trainers]
        value = f"{sum(rates):.0f} steps/s of all, {slowest:.2f} of the slowest that queues ahead, "
        value += f"loads {min(loads):.1f} to {max(loads):.1f}, {fleet.num_moves} moves"
        rows.append(figure(f"simulated, {num_tenants} tenants on {num_trainers} trainers, {when}", value))
    return rows


def _watch(load: Load, seconds: float) -> tuple[float, float]:
    """Returns the steps per second, and the share of the machine's processors that worked."""
    num_steps, begin = load.num_steps, time.perf_counter()
    psutil.cpu_percent()
    time.sleep(seconds)
    return (load.num_steps - num_steps) / (time.perf_counter() - begin), psutil.cpu_percent() / 100


def _state_bytes(cluster: Cluster) -> int:
    """Returns the memory of the states of runs that are in use on the first trainer."""
    with grpc.insecure_channel(cluster.addresses["store"]) as channel:
        workers = workers_pb2_grpc.WorkerServiceStub(channel)
        request = workers_pb2.ScanWorkersRequest(kind=admin_pb2.WORKER_KIND_TRAINER)
        while True:
            answer = workers.ScanWorkers(request, metadata=internal_metadata(cluster.token), timeout=10)
            if size := sum(entry.worker.state_bytes for entry in answer.workers):
                return size
            time.sleep(0.2)
