"""What the HTTP face costs beside native gRPC, and how many long polls one gateway holds.

One client process, one operation under way at a time, the two faces in turn, round by round, on runs of the same shape.
Over HTTP an operation is two requests: its submission and the poll for its result. The gateway's CPU is read from the
system. The long polls are real HTTP connections, each waiting for a sample of a sampler that stands still for a while.
"""

import argparse
import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import httpx
import numpy as np
import psutil

from bench.foundation import random_data, started
from tests.support.cluster import Cluster
from treadle import AdamParams, Datum, ServiceClient, TrainingClient
from treadle.internal.v1 import tinker_pb2

RANK = 8
Row = dict[str, str]
Turn = Callable[[], Awaitable[None]]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's options."""
    parser.add_argument("--base", default="pip", help="base to measure on")
    parser.add_argument("--rounds", type=int, default=8, help="rounds over the two faces")
    parser.add_argument("--turns", type=int, default=25, help="operations of each kind, face and round")
    parser.add_argument("--polls", type=int, default=2000, help="long polls held at once")


def run(options: argparse.Namespace) -> list[Row]:
    """Measures and returns the rows."""
    with tempfile.TemporaryDirectory() as folder, started(Path(folder), options.base) as (cluster, _):
        return asyncio.run(_measure(cluster, options))


@dataclass
class Side:
    """One face: its turns by kind of operation, and what they took."""

    turns: dict[str, Turn]
    seconds: dict[str, list[float]] = field(default_factory=dict)
    cpu: dict[str, float] = field(default_factory=dict)


async def _measure(cluster: Cluster, options: argparse.Namespace) -> list[Row]:
    gateway = psutil.Process(cluster.processes["gateway"].pid)
    key = cluster.new_tenant()
    with ServiceClient(cluster.gateway_address, key) as service:
        base = service.get_server_capabilities().supported_models[0].model_name
        training = service.create_lora_training_client(base, rank=RANK, seed=1)
        data = random_data(service.get_server_capabilities().supported_models[0].vocab_size)[:1]
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        where = f"http://{cluster.http_address}/api/v1"
        async with httpx.AsyncClient(base_url=where, headers={"x-api-key": key}, timeout=120, limits=limits) as client:
            native, http = Side(_native(training, data)), Side(await _http(client, base, data))
            for _ in range(options.rounds):
                for side in (native, http):
                    for kind in side.turns:
                        await _take(side, kind, gateway, options.turns)
            return _rows(native, http, options) + await _polls(client, base, cluster, options.polls)


async def _take(side: Side, kind: str, gateway: psutil.Process, turns: int) -> None:
    await side.turns[kind]()
    before = sum(gateway.cpu_times()[:2])
    for _ in range(turns):
        began = time.perf_counter()
        await side.turns[kind]()
        side.seconds.setdefault(kind, []).append(time.perf_counter() - began)
    side.cpu[kind] = side.cpu.get(kind, 0.0) + sum(gateway.cpu_times()[:2]) - before


def _native(training: TrainingClient, data: list[Datum]) -> dict[str, Turn]:
    async def forward_backward() -> None:
        await training.forward_backward(data, "cross_entropy")

    async def optim_step() -> None:
        await training.optim_step(AdamParams(learning_rate=0.0))

    return {"forward_backward": forward_backward, "optim_step": optim_step}


async def _http(client: httpx.AsyncClient, base: str, data: list[Datum]) -> dict[str, Turn]:
    model = await _model(client, base)
    seq = 0

    async def forward_backward() -> None:
        nonlocal seq
        seq += 1
        request = tinker_pb2.TinkerForwardBackwardRequest(model_id=model, seq_id=seq, loss_fn="cross_entropy")
        for datum in data:
            row = request.data.add()
            row.model_input.add().encoded_text.tokens = datum.model_input.to_numpy().astype("<i4").tobytes()
            for name, dtype, number in (("target_tokens", "<i8", 2), ("weights", "<f4", 1)):
                array = datum.array(name).astype(dtype)
                row.loss_fn_inputs[name].dense = array.tobytes()
                row.loss_fn_inputs[name].dtype = number
                row.loss_fn_inputs[name].shape.append(len(array))
        await _result(client, await client.post("/forward_backward", content=request.SerializeToString()))

    async def optim_step() -> None:
        nonlocal seq
        seq += 1
        body = {"model_id": model, "seq_id": seq, "adam_params": {"learning_rate": 0.0}}
        await _result(client, await client.post("/optim_step", json=body))

    return {"forward_backward": forward_backward, "optim_step": optim_step}


async def _model(client: httpx.AsyncClient, base: str) -> str:
    session = (await client.post("/create_session", json={"tags": [], "sdk_version": "bench"})).json()["session_id"]
    body = {"session_id": session, "model_seq_id": 0, "base_model": base, "lora_config": {"rank": RANK}}
    return str((await client.post("/create_model", json=body)).json()["model_id"])


async def _result(client: httpx.AsyncClient, submitted: httpx.Response) -> None:
    request_id = submitted.json()["request_id"]
    while True:
        answer = await client.post("/retrieve_future", json={"request_id": request_id})
        if answer.status_code != 408:
            answer.raise_for_status()
            return


def _rows(native: Side, http: Side, options: argparse.Namespace) -> list[Row]:
    rows = []
    per_thousand = 1000 / (options.rounds * options.turns)
    for kind in native.turns:
        grpc_ms, http_ms = (1000 * float(np.median(side.seconds[kind])) for side in (native, http))
        rows += [
            {"figure": f"{kind}: native gRPC, median", "value": f"{grpc_ms:.1f} ms"},
            {"figure": f"{kind}: Tinker face, median", "value": f"{http_ms:.1f} ms"},
            {"figure": f"{kind}: added by the face", "value": f"{http_ms - grpc_ms:.1f} ms"},
            {
                "figure": f"{kind}: CPU of the gateway per 1,000, native",
                "value": f"{native.cpu[kind] * per_thousand:.2f} s",
            },
            {
                "figure": f"{kind}: CPU of the gateway per 1,000, face",
                "value": f"{http.cpu[kind] * per_thousand:.2f} s",
            },
        ]
    return rows


async def _polls(client: httpx.AsyncClient, base: str, cluster: Cluster, count: int) -> list[Row]:
    """Holds polls for samples while the sampler is frozen, and counts the answers once it goes on."""
    gateway = psutil.Process(cluster.processes["gateway"].pid)
    before = gateway.memory_info().rss
    cluster.freeze("sampler")
    prompt = {"chunks": [{"type": "encoded_text", "tokens": [1, 5, 9]}]}
    body = {"base_model": base, "prompt": prompt, "sampling_params": {"max_tokens": 4}}
    # One connection per poll; httpx looks through all of its connections at each request.
    connections = aiohttp.TCPConnector(limit=0)
    where, headers = str(client.base_url), {"x-api-key": client.headers["x-api-key"]}
    async with aiohttp.ClientSession(where, connector=connections, headers=headers) as session:
        submitted = await asyncio.gather(*(_post(session, "asample", body) for _ in range(count)))
        polls = [asyncio.create_task(_polled(session, str(answer["request_id"]))) for answer in submitted]
        rows = await _held(cluster, polls, before)
        cluster.thaw("sampler")
        await asyncio.gather(*polls)
    return [
        *rows,
        {"figure": "polls answered once the sampler went on", "value": str(len(polls)), "target": str(count)},
    ]


async def _post(session: aiohttp.ClientSession, path: str, body: object) -> dict[str, object]:
    async with session.post(path, json=body) as answer:
        answer.raise_for_status()
        return dict(await answer.json())


async def _polled(session: aiohttp.ClientSession, request_id: str) -> None:
    while True:
        async with session.post("retrieve_future", json={"request_id": request_id}) as answer:
            await answer.read()
            if answer.status == 200:
                return
            if answer.status not in (408, 429):
                answer.raise_for_status()


async def _held(cluster: Cluster, polls: list[asyncio.Task[None]], before: int) -> list[Row]:
    """Looks at the gateway for a while in which it has nothing to do but to hold polls."""
    gateway, count = psutil.Process(cluster.processes["gateway"].pid), len(polls)
    await asyncio.sleep(5.0)
    cpu, began = sum(gateway.cpu_times()[:2]), time.perf_counter()
    await asyncio.sleep(8.0)
    held = sum(not poll.done() for poll in polls)
    spent, seconds = sum(gateway.cpu_times()[:2]) - cpu, time.perf_counter() - began
    during = gateway.memory_info().rss
    return [
        {"figure": f"long polls held at once, of {count}", "value": str(held), "target": str(count)},
        {"figure": "memory of the gateway before", "value": f"{before / 2**20:.0f} MiB"},
        {"figure": "memory of the gateway while it holds them", "value": f"{during / 2**20:.0f} MiB"},
        {"figure": "memory per poll", "value": f"{(during - before) / count / 1024:.1f} KiB"},
        {"figure": "CPU of the gateway while it holds them", "value": f"{spent / seconds:.2f} of a core"},
    ]
