"""What sharing a base is for, in numbers: the formulas of `treadle plan`, a simulation, and a real trainer.

Idle share of one user who waits for each step, of one who queues ahead, and of several, three ways: by formula, by a
simulation of the real scheduler with the pass cost that the trainer measured at its start, and on that trainer. Then
what cannot be had here: 10,000 tenants on 1,000 trainers, simulated. Besides: how many passes a second the scheduler
can fill with 10,000 runs waiting on one trainer, and what a run takes in memory.
"""

import argparse
import math
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

from bench.service import NUM_CLIENTS, RANK, ROUND_TRIP_SECONDS, WINDOW, Load, Row, figure, length_of, sequences, status
from bench.simulation import simulate
from tests.support.cluster import Cluster
from treadle import AdamParams, ServiceClient
from treadle.capacity import Speed, Steady, Usage, steady_state
from treadle_gateway.routing import WorkerView, place
from treadle_trainer.scheduler import FairScheduler, RunQueue, Waiting

NUM_RUNS = 64
PARK_SECONDS = 8.0
# An accelerator with a base of some billions of parameters: 20,000 positions a second, 10 ms for any pass.
BIG = Speed(fixed_seconds=0.010, seconds_per_token=5e-5)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's options."""
    parts = ("scheduler", "scale", "idle", "memory")
    parser.add_argument("--parts", nargs="+", default=list(parts), choices=parts, help="what to measure")
    parser.add_argument("--tenants", type=int, default=10_000, help="simulated tenants, one run each")
    parser.add_argument("--trainers", type=int, default=1_000, help="simulated trainers")
    parser.add_argument("--simulated-seconds", type=float, default=30.0, help="how long the simulation watches")
    parser.add_argument("--seconds", type=float, default=15.0, help="how long the real trainer is watched")


def run(options: argparse.Namespace) -> list[Row]:
    """Measures the chosen parts and returns the rows."""
    rows: list[Row] = []
    if "scheduler" in options.parts:
        rows += scheduler()
    if "scale" in options.parts:
        rows += scale(options.tenants, options.trainers, options.simulated_seconds)
    if {"idle", "memory"} & set(options.parts):
        with tempfile.TemporaryDirectory() as folder:
            cluster = Cluster(Path(folder) / "data")
            try:
                cluster.start()
                rows += memory(cluster) if "memory" in options.parts else []
                rows += idle(cluster, options.seconds) if "idle" in options.parts else []
            finally:
                cluster.close()
    return rows


def scheduler(passes: int = 20) -> list[Row]:
    """Measures the processor time of filling one pass, with 10,000 runs waiting."""
    rows = []
    for num_runs in (100, 1_000, 10_000):
        chunks = [Waiting(64, number, 0.001) for number in range(4)]
        queues = [RunQueue(f"run-{number}", f"tenant-{number}", chunks) for number in range(num_runs)]
        fair: FairScheduler[int] = FairScheduler(4096)
        fair.pick(queues, 0.25)
        begin = time.process_time()
        picked = sum(len(fair.pick(queues, 0.25)) for _ in range(passes))
        took = time.process_time() - begin
        value = f"{passes / took:.0f} passes/s, {picked / took:.0f} chunks/s"
        rows.append(figure(f"scheduler, {num_runs} runs waiting, processor time", value))
    return rows


def scale(num_tenants: int, num_trainers: int, seconds: float) -> list[Row]:
    """Simulates many tenants, placed on trainers as gateways place them, and holds the formulas against it.

    They stay there: what moving runs brings is simulated by `python -m bench move`.
    """
    usage = Usage(tokens_per_step=512, round_trip_seconds=ROUND_TRIP_SECONDS, own_seconds=0.2)
    working = BIG.pass_seconds(usage.tokens_per_step) + usage.step_seconds
    places = _places(num_tenants, num_trainers, working / (working + usage.away_seconds))
    begin = time.process_time()
    seen = simulate(BIG, usage, places, seconds, num_trainers)
    took = time.process_time() - begin
    used = Counter(places)
    expected = [steady_state(BIG, usage, number) for number in used.values()]
    per_user = seen.steps_per_second * seconds / num_tenants
    name = f"simulated, {num_tenants} tenants on {num_trainers} trainers"
    rows = [
        figure(f"{name}: idle share", f"{1 - seen.utilisation:.3f}", f"formula {1 - _mean(expected):.3f}"),
        figure(
            f"{name}: steps/s of all",
            f"{seen.steps_per_second:.0f}",
            f"formula {sum(one.steps_per_second for one in expected):.0f}",
        ),
        figure(f"{name}: runs in a pass", f"{seen.runs_per_pass:.2f}"),
        figure(f"{name}: steps of the slowest / of the mean user", f"{seen.least_steps / per_user:.2f}"),
        figure(
            f"{name}: passes filled per second of processor time, all else included", f"{seen.num_picks / took:.0f}"
        ),
    ]
    alone = simulate(BIG, usage, range(100), seconds, 100)
    rows.append(
        figure(
            "simulated, a trainer for each user: idle share",
            f"{1 - alone.utilisation:.3f}",
            f"formula {1 - steady_state(BIG, usage, 1).utilisation:.3f}",
        )
    )
    return rows


def idle(cluster: Cluster, seconds: float) -> list[Row]:
    """Measures idle shares on a trainer, and says what formulas and simulation have for it."""
    length = length_of(0.05)
    rows = []
    for clients, window in ((1, 1), (1, WINDOW), (2, 1), (4, 1), (NUM_CLIENTS, 1)):
        load = Load(cluster, [sequences(1, length)] * clients, [RANK] * clients, window, ROUND_TRIP_SECONDS)
        seen = load.watch(seconds)
        speed = _speed(cluster)
        usage = Usage(length, ROUND_TRIP_SECONDS, window)
        formula = steady_state(speed, usage, clients)
        simulated = simulate(speed, usage, [0] * clients, 60.0, 1)
        who = f"{clients} x {'synchronous' if window == 1 else f'{window} steps ahead'}"
        value = f"measured {seen.idle:.2f}, simulated {1 - simulated.utilisation:.2f}"
        value += f", formula {1 - formula.utilisation:.2f}; {seen.steps_per_second:.1f} steps/s, "
        value += f"simulated {simulated.steps_per_second:.1f}"
        rows.append(figure(f"idle share, pip, {length} tokens a step, 100 ms away, {who}", value))
    return rows


def memory(cluster: Cluster) -> list[Row]:
    """Measures what a run takes in the trainer: while it works, and once it is parked."""
    trainer = psutil.Process(cluster.processes["trainer"].pid)
    with ServiceClient(cluster.gateway_address, cluster.new_tenant()) as service:
        data = sequences(1, 32)

        def one(seed: int) -> object:
            training = service.create_lora_training_client("treadle/pip", rank=RANK, seed=seed)
            training.forward_backward(data, "cross_entropy")
            return training, training.optim_step(AdamParams(learning_rate=1e-4))

        # The first few bring what any number of runs shares.
        for seed in range(4):
            one(seed)[1].result()
        before = trainer.memory_info().rss
        handles = [one(seed) for seed in range(NUM_RUNS)]
        for _, handle in handles:
            handle.result()
        working = trainer.memory_info().rss
        time.sleep(PARK_SECONDS)
        parked = trainer.memory_info().rss
    name = f"memory of a run, pip, rank {RANK}"
    return [
        figure(f"{name}: resident on the device", f"{(working - before) / NUM_RUNS / 2**20:.2f} MiB"),
        # What a gradient took stays with the allocator for the next one.
        figure(f"{name}: idle, in host memory", f"{(parked - before) / NUM_RUNS / 2**20:.2f} MiB"),
    ]


def _places(num_tenants: int, num_trainers: int, demand: float) -> list[int]:
    """Returns the trainer of each tenant's run; gateways hear of the loads once every hundred runs."""
    loads, places = [0.0] * num_trainers, list[int]()
    for tenant in range(num_tenants):
        if tenant % 100 == 0:
            trainers = [WorkerView(str(n), "trainer", "base", "", load=load) for n, load in enumerate(loads)]
        places.append(int(place(f"run-{tenant}", trainers).worker))
        loads[places[-1]] += demand
    return places


def _speed(cluster: Cluster) -> Speed:
    seen = status(cluster)
    cost, pace = seen.pass_cost, seen.pace
    target = seen.target_pass.ToNanoseconds() / 1e9
    return Speed(cost.fixed_seconds * pace, cost.seconds_per_token * pace, target, seen.max_tokens_per_pass)


def _mean(states: list[Steady]) -> float:
    return math.fsum(state.utilisation for state in states) / len(states)
