"""What the services cost around the engine, in one run on one machine with real processes.

Per-step cost of the whole service (client, gateway, trainer, store) against the same engine called in-process; bytes
on the wire per training token, counted by a proxy between client and gateway; memory and start-up time of each
process. Rounds of the two sides alternate; medians are reported.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import numpy as np
import psutil
import torch

from tests.support.cluster import ROLES, Cluster
from tests.support.proxy import TroubleProxy
from treadle import AdamParams, Datum, ModelInput, ServiceClient, TensorData, TrainingClient
from treadle_engine.base_model import BaseModel
from treadle_engine.bases import resolve
from treadle_engine.batch import TokenBatch
from treadle_engine.lora import AdapterWeights, LoraConfig
from treadle_engine.losses import LossSpec
from treadle_engine.optim import AdamParams as EngineAdam
from treadle_engine.optim import TrainState, optim_step
from treadle_engine.passes import Chunk, TrainingEngine

ROWS, LENGTH, RANK = 4, 256, 16
Row = dict[str, str]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's options."""
    parser.add_argument("--base", nargs="+", default=["pip", "smollm2"], help="bases to measure on")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each side")
    parser.add_argument("--steps", type=int, default=0, help="steps per round; 0 chooses by the base")


def run(options: argparse.Namespace) -> list[Row]:
    """Measures each base and returns the rows."""
    torch.set_num_threads(1)
    rows: list[Row] = []
    for base in options.base:
        steps = options.steps or (20 if base == "pip" else 3)
        rows += measure(base, options.rounds, steps)
    return rows


def measure(base: str, rounds: int, steps: int) -> list[Row]:
    """Measures one base."""
    with tempfile.TemporaryDirectory() as folder, started(Path(folder), base) as (cluster, started_seconds):
        address = cluster.gateway_address
        with TroubleProxy(address) as proxy, ServiceClient(proxy.address, cluster.new_tenant()) as service:
            name = service.get_server_capabilities().supported_models[0].model_name
            training = service.create_lora_training_client(name, rank=RANK, seed=1)
            data = random_data(vocabulary=1000)
            engine, state, batch = in_process(base, data)
            step_through_service(training, data, 1)
            step_in_process(engine, state, batch, 1)
            sent = proxy.num_bytes
            step_through_service(training, data, steps)
            wire = (proxy.num_bytes - sent) / (steps * ROWS * LENGTH)
            service_wall, service_cpu, engine_wall, engine_cpu = [], [], [], []
            for _ in range(rounds):
                cpu, begin = cpu_seconds(cluster), time.perf_counter()
                step_through_service(training, data, steps)
                service_wall.append((time.perf_counter() - begin) / steps)
                service_cpu.append((cpu_seconds(cluster) - cpu) / steps)
                cpu, begin = time.process_time(), time.perf_counter()
                step_in_process(engine, state, batch, steps)
                engine_wall.append((time.perf_counter() - begin) / steps)
                engine_cpu.append((time.process_time() - cpu) / steps)
            walls = median(a / b for a, b in zip(service_wall, engine_wall, strict=True))
            cpus = median(a / b for a, b in zip(service_cpu, engine_cpu, strict=True))
            rows = [
                row(f"{base}: step in-process, {ROWS} x {LENGTH} tokens", ms(engine_wall), ms(engine_cpu)),
                row(f"{base}: step through the service", ms(service_wall), ms(service_cpu)),
                {"figure": f"{base}: service / in-process", "value": f"wall {walls:.2f}, CPU {cpus:.2f}"},
                {"figure": f"{base}: bytes on the wire per training token", "value": f"{wire:.1f} (both directions)"},
            ]
            for role in ROLES:
                value = f"{memory(cluster, role)}, ready after {started_seconds[role]:.1f} s"
                rows.append({"figure": f"{base}: {role}", "value": value})
            return rows


@contextmanager
def started(folder: Path, base: str) -> Iterator[tuple[Cluster, dict[str, float]]]:
    """Starts the services one after the other, so that each start-up time is its own."""
    cluster = Cluster(folder / "data", base)
    cluster.folder.mkdir()
    seconds: dict[str, float] = {}
    try:
        for role in ROLES:
            begin = time.perf_counter()
            cluster.launch(role)
            cluster.wait_ready([role])
            seconds[role] = time.perf_counter() - begin
        yield cluster, seconds
    finally:
        cluster.close()


def random_data(vocabulary: int) -> list[Datum]:
    """Returns random sequences with weights 1."""
    generator = np.random.default_rng(0)
    data = []
    for _ in range(ROWS):
        tokens = generator.integers(3, vocabulary, LENGTH + 1)
        inputs = {
            "target_tokens": TensorData.from_numpy(tokens[1:]),
            "weights": TensorData.from_numpy(np.ones(LENGTH, dtype=np.float32)),
        }
        data.append(Datum(model_input=ModelInput.from_ints(tokens[:-1].tolist()), loss_fn_inputs=inputs))
    return data


def step_through_service(training: TrainingClient, data: list[Datum], steps: int) -> None:
    """Runs steps with everything queued ahead and waits for the last."""
    for _ in range(steps):
        training.forward_backward(data, "cross_entropy")
        last = training.optim_step(AdamParams(learning_rate=1e-4))
    last.result()


def in_process(base: str, data: list[Datum]) -> tuple[TrainingEngine, TrainState, TokenBatch]:
    """Returns the engine on the same base with the same batch."""
    folder, name = resolve(base, Path.home() / ".cache/treadle", "float32")
    model = BaseModel.load(folder, name=name, dtype="float32")
    state = TrainState.fresh(AdapterWeights.init(model, LoraConfig(rank=RANK, seed=1)))
    batch = TokenBatch(
        lengths_R=np.full(ROWS, LENGTH, dtype=np.int64),
        tokens_T=np.concatenate([d.model_input.to_ints() for d in data]).astype(np.int32),
        targets_TK=np.concatenate([d.loss_fn_inputs["target_tokens"].to_numpy() for d in data]).astype(np.int32),
        columns={"weights": np.ones(ROWS * LENGTH, dtype=np.float32)},
    )
    return TrainingEngine(model), state, batch


def step_in_process(engine: TrainingEngine, state: TrainState, batch: TokenBatch, steps: int) -> None:
    """Runs the same steps without a service."""
    for _ in range(steps):
        engine.run_pass([Chunk(state, piece, LossSpec("cross_entropy")) for piece in engine.split(batch)])
        optim_step(state, EngineAdam(learning_rate=1e-4))


def cpu_seconds(cluster: Cluster) -> float:
    """Returns the CPU time of the four services and of this process so far."""
    processes = [psutil.Process(process.pid) for process in cluster.processes.values()]
    return sum(sum(p.cpu_times()[:2]) for p in processes) + time.process_time()


def memory(cluster: Cluster, role: str) -> str:
    """Returns a process's memory: resident, and its own share of it."""
    info = psutil.Process(cluster.processes[role].pid).memory_full_info()
    return f"resident {info.rss / 2**20:.0f} MiB, proportional {info.pss / 2**20:.0f} MiB"


def row(figure: str, wall: str, cpu: str) -> Row:
    """Returns a table row."""
    return {"figure": figure, "value": f"wall {wall}, CPU {cpu}"}


def ms(seconds: list[float]) -> str:
    """Returns the median in milliseconds with the range."""
    return f"{1e3 * median(seconds):.1f} ms ({1e3 * min(seconds):.1f}-{1e3 * max(seconds):.1f})"
