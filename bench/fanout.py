"""One user's big batch over several trainers: how much sooner its step ends, and what moving gradients costs.

Real: trainers of one thread each on this machine's cores, one against two. Simulated: one, two and four trainers whose
passes sleep as long as the real ones take (`bench.sleeping_trainer`), since this machine has not the cores; all else is
real, so the processor time of the trainer that holds the run is what fan-out itself costs. Deployments stand side by
side and take steps in turn; figures are medians.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import psutil

from bench.service import Row, figure
from tests.support.cluster import Cluster, free_port
from treadle import AdamParams, Datum, ModelInput, ServiceClient, TensorData
from treadle.training import TrainingClient
from treadle_engine import bases
from treadle_engine.base_model import BaseModel
from treadle_engine.batch import TokenBatch
from treadle_engine.determinism import settle
from treadle_engine.lora import AdapterWeights, LoraConfig
from treadle_engine.losses import LossSpec
from treadle_engine.passes import Chunk, TrainingEngine

BASE = "treadle/pip"
LENGTH = 500
"""Two sequences make a chunk."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's options."""
    parser.add_argument("--parts", nargs="+", default=["real", "simulated"], choices=("real", "simulated"))
    parser.add_argument("--chunks", type=int, default=32, help="chunks of a batch")
    parser.add_argument("--rank", type=int, default=32, help="of the adapter, whose gradient travels")
    parser.add_argument("--rounds", type=int, default=5, help="steps of each deployment, after one to get warm")


def run(options: argparse.Namespace) -> list[Row]:
    """Measures the chosen parts and returns the rows."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        if "real" in options.parts:
            rows += compare(Path(folder) / "real", (1, 2), "real compute", options, {})
        if "simulated" in options.parts:
            seconds = seconds_per_token()
            rows.append(figure("simulated compute, sleep of a chunk", f"{1e3 * 2 * LENGTH * seconds:.0f} ms"))
            sleeping = {"BENCH_SECONDS_PER_TOKEN": str(seconds)}
            rows += compare(Path(folder) / "simulated", (1, 2, 4), "simulated compute", options, sleeping)
    return rows


def seconds_per_token() -> float:
    """Returns the processor time that a position of a chunk takes on one thread: the median of some real passes."""
    settle(1)
    base = BaseModel.load(str(bases.pip_folder()), name=BASE, dtype="float32")
    engine = TrainingEngine(base)
    weights = AdapterWeights.init(base, LoraConfig(rank=32))
    tokens = np.arange(2 * LENGTH, dtype=np.int32) % 500
    columns = {"weights": np.ones(2 * LENGTH, np.float32)}
    batch = TokenBatch(np.array([LENGTH, LENGTH], np.int64), tokens, tokens, columns)
    taken = []
    for _ in range(7):
        began = time.process_time()
        engine.run_pass([Chunk(engine.apart(weights), batch, LossSpec("cross_entropy"))])
        taken.append(time.process_time() - began)
    return median(taken) / (2 * LENGTH)


class Trainers(Cluster):
    """A deployment of some trainers, whose passes sleep if `sleeping` says how long."""

    def __init__(self, folder: Path, count: int, sleeping: Mapping[str, str]) -> None:
        super().__init__(folder, settings={"TREADLE_TRAINER_REBALANCE_SECONDS": "0"}, trainers=count)
        self._sleeping = sleeping
        self.trainers = [name for name in self.names if name.startswith("trainer")]
        self._metrics = {name: f"127.0.0.1:{free_port()}" for name in self.trainers}

    def environment(self, name: str) -> dict[str, str]:
        """Adds where metrics are served, and how long passes sleep."""
        own = {"TREADLE_TRAINER_METRICS_LISTEN": self._metrics[name]} if name in self.trainers else {}
        return {**super().environment(name), **own, **self._sleeping}

    def launch(self, name: str, **settings: str) -> None:
        """Starts a service; a trainer as one that sleeps if that is wanted."""
        if name not in self.trainers or not self._sleeping:
            super().launch(name, **settings)
            return
        with (self.folder / f"{name}.log").open("ab") as out:
            command = [sys.executable, "-m", "bench.sleeping_trainer"]
            self.processes[name] = subprocess.Popen(command, env=self.environment(name), stdout=out, stderr=out)

    def reading(self, metric: str) -> dict[str, float]:
        """Returns a metric by trainer, all its labels added up."""
        pattern = re.compile(rf"^{metric}(?:{{[^}}]*}})? (\S+)$", re.MULTILINE)
        found = {}
        for name, address in self._metrics.items():
            with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as response:
                text = response.read().decode()
            found[name] = sum(float(value) for value in pattern.findall(text))
        return found

    def cpu_seconds(self, name: str) -> float:
        """Returns the processor time of a service so far."""
        times = psutil.Process(self.processes[name].pid).cpu_times()
        return float(times.user + times.system)


@dataclass
class Side:
    """One deployment at work."""

    cluster: Trainers
    training: TrainingClient
    seconds: list[float]

    def step(self, batch: list[Datum]) -> None:
        """Makes a step and notes its time."""
        began = time.perf_counter()
        self.training.forward_backward(batch, "cross_entropy")
        self.training.optim_step(AdamParams(learning_rate=1e-4)).result(600)
        self.seconds.append(time.perf_counter() - began)


def compare(
    folder: Path, counts: Sequence[int], title: str, options: argparse.Namespace, sleeping: Mapping[str, str]
) -> list[Row]:
    """Has deployments of so many trainers take the same steps in turn."""
    batch = big_batch(2 * options.chunks)
    with ExitStack() as stack:
        sides = [open_side(stack, Trainers(folder / str(count), count, sleeping), options.rank) for count in counts]
        for side in sides:
            # The first step finds the other trainers, the second has them from its beginning.
            side.step(batch)
            side.step(batch)
            side.seconds.clear()
        before = [observe(side.cluster) for side in sides]
        for _ in range(options.rounds):
            for side in sides:
                side.step(batch)
        rows = []
        for side, count, then in zip(sides, counts, before, strict=True):
            rows += report(f"{title}, {count} trainers", side, sides[0], then, options)
        return rows


def open_side(stack: ExitStack, cluster: Trainers, rank: int) -> Side:
    """Starts a deployment with one run."""
    stack.callback(cluster.close)
    cluster.start()
    service = stack.enter_context(ServiceClient(cluster.gateway_address, cluster.new_tenant()))
    return Side(cluster, service.create_lora_training_client(BASE, rank=rank, seed=1), [])


def big_batch(rows: int) -> list[Datum]:
    """Returns random sequences."""
    generator = np.random.default_rng(1)
    data = []
    for _ in range(rows):
        tokens = generator.integers(3, 500, LENGTH + 1)
        inputs = {
            "target_tokens": TensorData.from_numpy(tokens[1:]),
            "weights": TensorData.from_numpy(np.ones(LENGTH, dtype=np.float32)),
        }
        data.append(Datum(model_input=ModelInput.from_ints(tokens[:-1].tolist()), loss_fn_inputs=inputs))
    return data


def observe(cluster: Trainers) -> dict[str, dict[str, float]]:
    """Returns what is read before and after the rounds, by trainer."""
    names = ("fan_out_bytes_total", "add_seconds_total", "tokens_total")
    found = {name: cluster.reading(f"treadle_trainer_{name}") for name in names}
    found["cpu"] = {name: cluster.cpu_seconds(name) for name in cluster.trainers}
    return found


def report(
    title: str, side: Side, alone: Side, before: dict[str, dict[str, float]], options: argparse.Namespace
) -> list[Row]:
    """Returns the rows of one deployment."""
    now = observe(side.cluster)
    spent: dict[str, dict[str, float]] = {
        name: {trainer: value - before[name][trainer] for trainer, value in values.items()}
        for name, values in now.items()
    }
    home = max(spent["fan_out_bytes_total"], key=lambda name: (spent["fan_out_bytes_total"][name], spent["cpu"][name]))
    ratio = median(one / two for one, two in zip(alone.seconds, side.seconds, strict=True))
    wall = sum(side.seconds)
    rows: list[Row] = [figure(f"{title}: speed-up of a step", f"{ratio:.2f}x ({median(side.seconds):.2f} s a step)")]
    lent = sum(spent["tokens_total"].values()) - spent["tokens_total"][home]
    if lent:
        chunks = lent / (2 * LENGTH)
        share = chunks / (options.chunks * options.rounds)
        rows.append(figure(f"{title}: chunks computed by others", f"{100 * share:.0f} %"))
        moved = spent["fan_out_bytes_total"][home] / chunks
        rows.append(figure(f"{title}: bytes moved for each of them", f"{moved / 1e6:.2f} MB"))
        add = spent["add_seconds_total"][home] / wall
        rows.append(figure(f"{title}: time in which gradients are added", f"{100 * add:.1f} % of a step"))
    cpu = spent["cpu"][home] / wall
    rows.append(figure(f"{title}: processor of the trainer that holds the run", f"{100 * cpu:.0f} % of one"))
    return rows
