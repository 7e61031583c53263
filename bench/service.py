"""What the services cost and what they keep busy: the trainer around its engine, with real processes.

The cost of a pipelined client's step through client, gateway, trainer and store against the same engine in-process;
the trainer's idle share behind a slow network, with synchronous clients and with one that queues ahead; the time that
optimizer steps add between passes; swap-in of an adapter from host memory and from the store. Rounds alternate;
medians are reported.
"""

import argparse
import asyncio
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import grpc
import numpy as np
import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.foundation import Row, cpu_seconds, step_through_service
from tests.support.cluster import ROLES, Cluster
from tests.support.proxy import TroubleProxy
from treadle import AdamParams, Datum, ModelInput, ServiceClient, TensorData
from treadle.internal.v1 import trainer_pb2, trainer_pb2_grpc
from treadle_engine.base_model import BaseModel
from treadle_engine.bases import pip_folder
from treadle_engine.batch import TokenBatch
from treadle_engine.lora import AdapterWeights, LoraConfig
from treadle_engine.losses import LossSpec
from treadle_engine.optim import AdamParams as EngineAdam
from treadle_engine.optim import TrainState, optim_step
from treadle_engine.passes import Chunk, TrainingEngine
from treadle_service.channels import internal_metadata
from treadle_trainer.budget import PassBudget
from treadle_trainer.device import Device
from treadle_trainer.journal_client import JournalClient

RANK, LARGE_RANK, NUM_CLIENTS, ROUND_TRIP_SECONDS = 16, 256, 8, 0.1
WINDOW = 4
"""Steps that a client queues ahead."""
CHUNKS_PER_PASS = 4


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's options."""
    parts = ("cost", "idle", "beside", "swap")
    parser.add_argument("--parts", nargs="+", default=list(parts), choices=parts, help="what to measure")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each side")
    parser.add_argument("--seconds", type=float, default=10.0, help="how long clients are watched")


def run(options: argparse.Namespace) -> list[Row]:
    """Measures the chosen parts and returns the rows."""
    torch.set_num_threads(1)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        cluster = Cluster(Path(folder) / "data")
        try:
            cluster.start()
            if "cost" in options.parts:
                rows += cost(cluster, options.rounds)
            if "idle" in options.parts:
                rows += idle(cluster, options.seconds)
            if "beside" in options.parts:
                rows += beside(cluster, options.seconds)
            if "swap" in options.parts:
                rows += asyncio.run(swap(cluster, Path(folder), options.rounds))
        finally:
            cluster.close()
    return rows


def cost(cluster: Cluster, rounds: int, num_rows: int = 16, length: int = 512, steps: int = 2) -> list[Row]:
    """Measures one pipelined client against the engine in-process."""
    data = sequences(num_rows, length)
    engine, state, batch = in_process(data)
    walls: list[float] = []
    cpus: list[float] = []
    by_role: dict[str, list[float]] = {role: [] for role in (*ROLES, "client")}
    with ServiceClient(cluster.gateway_address, cluster.new_tenant()) as service:
        training = service.create_lora_training_client("treadle/pip", rank=RANK, seed=1)
        step_through_service(training, data, 1)
        step_in_process(engine, state, batch, 1)
        for _ in range(rounds):
            before, cpu, begin = cpu_by_role(cluster), cpu_seconds(cluster), time.perf_counter()
            step_through_service(training, data, steps)
            wall, cpu = time.perf_counter() - begin, cpu_seconds(cluster) - cpu
            for role, seconds in cpu_by_role(cluster).items():
                by_role[role].append((seconds - before[role]) / steps)
            begin, own = time.perf_counter(), time.process_time()
            step_in_process(engine, state, batch, steps)
            walls.append(wall / (time.perf_counter() - begin))
            cpus.append(cpu / (time.process_time() - own))
    name = f"pip, {num_rows} x {length}, one pipelined client"
    rows = [figure(f"{name}: service / in-process", f"wall {median(walls):.3f}, CPU {median(cpus):.3f}", "1.05")]
    rows += [figure(f"{name}: CPU of {role} per step", f"{1e3 * median(by_role[role]):.1f} ms") for role in by_role]
    return rows


def idle(cluster: Cluster, seconds: float) -> list[Row]:
    """Measures the share of time in which the trainer does nothing while clients train behind a slow network."""
    length = length_of(0.05)
    rows: list[Row] = []
    for clients, window, target in ((NUM_CLIENTS, 1, 0.12), (1, 1, None), (1, WINDOW, None)):
        load = Load(cluster, [sequences(1, length)] * clients, [RANK] * clients, window, ROUND_TRIP_SECONDS)
        seen = load.watch(seconds)
        who = f"{clients} x {'synchronous' if window == 1 else f'{window} steps ahead'}"
        name = f"pip, {length} tokens a step, {1e3 * ROUND_TRIP_SECONDS:.0f} ms round trip, {who}"
        value = f"idle {seen.idle:.3f}, {seen.steps_per_second:.1f} steps/s, mean pass {1e3 * seen.mean_pass:.0f} ms"
        rows.append(figure(name, value, "" if target is None else f"idle {target}"))
    return rows


def beside(cluster: Cluster, seconds: float) -> list[Row]:
    """Measures the time between passes while two clients queue ahead, of which one has large optimizer steps."""
    rows: list[Row] = []
    for rank in (RANK, LARGE_RANK):
        seen = Load(cluster, [sequences(1, 500), sequences(1, 500)], [rank, RANK], WINDOW, 0.0).watch(seconds)
        value = (
            f"between passes {1e3 * seen.gap:.1f} ms (median), {seen.gap_share:.3f} of the time; "
            f"{seen.num_beside} of {seen.num_passes} passes had a step beside them"
        )
        rows.append(figure(f"pip, two clients that queue ahead, one of rank {rank}", value, "0 on the critical path"))
    return rows


@dataclass(frozen=True)
class Seen:
    """What the trainer did while it was watched."""

    idle: float
    num_passes: int
    num_beside: int
    mean_pass: float
    gap: float
    gap_share: float
    steps_per_second: float


class Load:
    """Clients that train, each with at most `window` steps under way, until they have been watched for a while."""

    def __init__(
        self, cluster: Cluster, data: list[list[Datum]], ranks: list[int], window: int, round_trip: float
    ) -> None:
        self._cluster, self._data, self._ranks, self._window = cluster, data, ranks, window
        self._round_trip = round_trip
        self._stop = threading.Event()
        self._ready = threading.Barrier(len(data) + 1)
        self.num_steps = 0
        """Steps that have ended."""

    def watch(self, seconds: float) -> Seen:
        """Starts the clients, watches the trainer for so long, and ends them."""
        with self.working():
            before, num_steps, begin = status(self._cluster), self.num_steps, time.perf_counter()
            time.sleep(seconds)
            after, took = status(self._cluster), time.perf_counter() - begin
            num_steps = self.num_steps - num_steps
        passes = last_passes(self._cluster, after.num_passes - before.num_passes)
        busy = (after.busy.ToNanoseconds() - before.busy.ToNanoseconds()) / 1e9
        starts = [item.started.ToNanoseconds() / 1e9 for item in passes]
        lengths = [item.took.ToNanoseconds() / 1e9 for item in passes]
        gaps = [later - start - length for start, length, later in zip(starts, lengths, starts[1:], strict=False)]
        return Seen(
            idle=1 - busy / took,
            num_passes=len(passes),
            num_beside=sum(item.num_steps_beside > 0 for item in passes),
            mean_pass=sum(lengths) / max(1, len(lengths)),
            gap=median(gaps) if gaps else 0.0,
            gap_share=sum(gaps) / took,
            steps_per_second=num_steps / took,
        )

    @contextmanager
    def working(self) -> Iterator[None]:
        """Has the clients train inside."""
        with TroubleProxy(self._cluster.gateway_address, self._round_trip / 2) as proxy:
            places = enumerate(zip(self._data, self._ranks, strict=True))
            threads = [
                threading.Thread(target=self._train, args=(proxy.address, self._cluster.new_tenant(), index, *place))
                for index, place in places
            ]
            for thread in threads:
                thread.start()
            self._ready.wait()
            # The first round trips, before the queue is full, are no part of any figure.
            time.sleep(1.5)
            try:
                yield
            finally:
                self._stop.set()
                for thread in threads:
                    thread.join()

    def _train(self, address: str, key: str, index: int, data: list[Datum], rank: int) -> None:
        under_way: deque[Any] = deque()  # the SDK's handles
        with ServiceClient(address, key) as service:
            training = service.create_lora_training_client("treadle/pip", rank=rank, seed=index)
            self._ready.wait()
            while not self._stop.is_set():
                training.forward_backward(data, "cross_entropy")
                under_way.append(training.optim_step(AdamParams(learning_rate=1e-4)))
                if len(under_way) == self._window:
                    self._end(under_way.popleft())
            for handle in under_way:
                handle.result()

    def _end(self, handle: Any) -> None:
        handle.result()
        self.num_steps += 1


async def swap(cluster: Cluster, folder: Path, rounds: int) -> list[Row]:
    """Measures how long a run of 10 M parameters takes to come back from host memory and from the store."""
    base = BaseModel.load(random_base(folder / "llama"), name="llama", dtype="float32")
    config = LoraConfig(rank=128)
    device = Device(base, PassBudget(4096))
    num_parameters = device.num_bytes(config) // 12
    device.create("r", config)
    token = cluster.environment("store")["TREADLE_STORE_INTERNAL_TOKEN"]
    seconds: dict[str, list[float]] = {"host memory": [], "the store's folder": [], "the store over gRPC": []}
    for place, shared in (("the store's folder", cluster.folder / "blobs"), ("the store over gRPC", None)):
        store = JournalClient(cluster.addresses["store"], token, shared)
        try:
            copy = device.copy_state("r", 0, store.new_file())
            data = copy.data
            sha256 = await (store.put_blob(data) if isinstance(data, bytes) else store.put_file(data))
            for _ in range(rounds):
                device.park("r")
                begin = time.perf_counter()
                device.unpark("r")
                seconds["host memory"].append(time.perf_counter() - begin)
                device.drop("r")
                begin = time.perf_counter()
                device.restore("r", config, await store.get_file(sha256, verify=False), copy.digest)
                seconds[place].append(time.perf_counter() - begin)
        finally:
            await store.close()
    size = f"{4 * num_parameters / 1e6:.0f} MB of weights, {12 * num_parameters / 1e6:.0f} MB with moments"
    targets = {"host memory": "5 ms", "the store's folder": "200 ms"}
    return [
        figure(f"swap-in from {place} ({size})", f"{1e3 * median(found):.2f} ms", targets.get(place, ""))
        for place, found in seconds.items()
    ]


def sequences(num_rows: int, length: int) -> list[Datum]:
    """Returns random sequences with weights 1; the same each time."""
    generator = np.random.default_rng(0)
    data = []
    for _ in range(num_rows):
        tokens = generator.integers(3, 1000, length + 1)
        inputs = {
            "target_tokens": TensorData.from_numpy(tokens[1:]),
            "weights": TensorData.from_numpy(np.ones(length, dtype=np.float32)),
        }
        data.append(Datum(model_input=ModelInput.from_ints(tokens[:-1].tolist()), loss_fn_inputs=inputs))
    return data


def data_tokens(data: list[Datum]) -> int:
    """Returns the number of tokens of a batch."""
    return sum(len(datum.model_input.to_ints()) for datum in data)


def in_process(data: list[Datum]) -> tuple[TrainingEngine, TrainState, TokenBatch]:
    """Returns the engine on Pip with the same batch."""
    base = BaseModel.load(str(pip_folder()), dtype="float32")
    state = TrainState.fresh(AdapterWeights.init(base, LoraConfig(rank=RANK, seed=1)))
    batch = TokenBatch(
        lengths_R=np.array([len(d.model_input.to_ints()) for d in data], dtype=np.int64),
        tokens_T=np.concatenate([d.model_input.to_ints() for d in data]).astype(np.int32),
        targets_TK=np.concatenate([d.loss_fn_inputs["target_tokens"].to_numpy() for d in data]).astype(np.int32),
        columns={"weights": np.ones(data_tokens(data), dtype=np.float32)},
    )
    return TrainingEngine(base), state, batch


def step_in_process(engine: TrainingEngine, state: TrainState, batch: TokenBatch, steps: int) -> None:
    """Runs the same steps without a service."""
    pieces = engine.split(batch)
    for _ in range(steps):
        for start in range(0, len(pieces), CHUNKS_PER_PASS):
            group = pieces[start : start + CHUNKS_PER_PASS]
            engine.run_pass([Chunk(state, piece, LossSpec("cross_entropy")) for piece in group])
        optim_step(state, EngineAdam(learning_rate=1e-4))


def length_of(seconds: float) -> int:
    """Returns the length of a sequence with which a step takes about so long in this process."""
    length = 512
    for _ in range(3):
        engine, state, batch = in_process(sequences(1, length))
        step_in_process(engine, state, batch, 1)
        begin = time.perf_counter()
        step_in_process(engine, state, batch, 3)
        took = (time.perf_counter() - begin) / 3
        length = min(max(int(length * seconds / took), 16), 512)
    return length


def random_base(folder: Path) -> str:
    """Writes a small random Llama and returns its folder."""
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=8192,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def cpu_by_role(cluster: Cluster) -> dict[str, float]:
    """Returns the CPU time of each service and of this process so far."""
    seconds = {
        role: float(sum(psutil.Process(process.pid).cpu_times()[:2])) for role, process in cluster.processes.items()
    }
    return {**seconds, "client": time.process_time()}


def status(cluster: Cluster) -> trainer_pb2.GetTrainerStatusResponse:
    """Returns the trainer's load and totals."""
    response: trainer_pb2.GetTrainerStatusResponse = ask(
        cluster, "GetTrainerStatus", trainer_pb2.GetTrainerStatusRequest()
    )
    return response


def last_passes(cluster: Cluster, count: int) -> list[trainer_pb2.Pass]:
    """Returns the last passes."""
    return list(ask(cluster, "ListPasses", trainer_pb2.ListPassesRequest(limit=count)).passes)


def ask(cluster: Cluster, method: str, request: Any) -> Any:
    """Calls the trainer's control service."""
    metadata = internal_metadata(cluster.environment("trainer")["TREADLE_TRAINER_INTERNAL_TOKEN"])
    with grpc.insecure_channel(cluster.addresses["trainer"]) as channel:
        return getattr(trainer_pb2_grpc.TrainerServiceStub(channel), method)(request, metadata=metadata, timeout=10)


def figure(name: str, value: str, target: str = "") -> Row:
    """Returns a table row, and shows it at once: a run takes minutes."""
    print(f"{name}: {value}", file=sys.stderr, flush=True)
    return {"figure": name, "value": value, "target": target}
