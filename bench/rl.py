"""Reinforcement learning end to end: GRPO loops through the SDK with real processes; who worked when.

Each configuration is a fresh set of runs of the demo's reward task: synchronous or one step off, one tenant or several
at once, every tenant an ordinary program with a key of its own. Reported are the rewards, steps per minute, the idle
shares of trainer and sampler from their own traces, and a strip of time in which each column shows how busy they were.
"""

import argparse
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import grpc

from tests.support.cluster import Cluster
from treadle import SamplingParams, ServiceClient
from treadle.internal.v1 import sampler_pb2, sampler_pb2_grpc, trainer_pb2, trainer_pb2_grpc
from treadle.recipes.chat import prompt_tokens
from treadle.recipes.loops import StepReport, rl_steps
from treadle.recipes.tasks import DEMO_TASKS
from treadle_service.channels import internal_metadata

Row = dict[str, str]
Span = tuple[float, float]
COLUMNS = 60
SHADES = " .:-=+*#%@"


@dataclass(frozen=True)
class Seen:
    """What one configuration did: reports by tenant, begin and end (Unix time), busy seconds and spans by role.

    A trainer is also busy with optimizer steps, which are not among its spans.
    """

    reports: list[list[StepReport]]
    begin: float
    end: float
    busy: dict[str, float]
    spans: dict[str, list[Span]]

    def idle(self, role: str) -> float:
        """Returns the share of the time in which a role did nothing."""
        return 1.0 - self.busy[role] / (self.end - self.begin)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's options."""
    parser.add_argument("--base", default="smollm2", help="base to measure on")
    parser.add_argument("--tenants", type=int, nargs="+", default=[1, 8], help="tenants at once, one after the other")
    parser.add_argument("--ahead", type=int, nargs="+", default=[0, 1], help="0: synchronous, 1: one step off")
    parser.add_argument("--steps", type=int, default=0, help="steps per tenant; 0: as many as the task says")


def run(options: argparse.Namespace) -> list[Row]:
    """Starts the services once and runs every configuration on them."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        blobs = str(Path(folder) / "data" / "blobs")
        shared = {f"TREADLE_{role}_SHARED_BLOBS": blobs for role in ("TRAINER", "SAMPLER")}
        cluster = Cluster(Path(folder) / "data", options.base, shared)
        cluster.start()
        try:
            for tenants in options.tenants:
                for ahead in options.ahead:
                    rows += table(
                        f"{tenants} x {'sync' if not ahead else f'{ahead} off'}",
                        drive(cluster, tenants, ahead, options.steps),
                    )
        finally:
            cluster.close()
    return rows


def drive(cluster: Cluster, tenants: int, ahead: int, steps: int) -> Seen:
    """Runs the task with so many tenants at once."""
    keys = [cluster.new_tenant() for _ in range(tenants)]
    before, begin = busy_seconds(cluster), time.time()
    with ThreadPoolExecutor(tenants) as pool:
        reports = list(pool.map(lambda pair: learn(cluster, pair[1], pair[0], ahead, steps), enumerate(keys)))
    end, after = time.time(), busy_seconds(cluster)
    return Seen(reports, begin, end, {role: after[role] - before[role] for role in after}, traces(cluster))


def learn(cluster: Cluster, key: str, number: int, ahead: int, steps: int) -> list[StepReport]:
    """Is one tenant: a fresh run of the base's reward task."""
    with ServiceClient(cluster.gateway_address, key) as service:
        base = service.get_server_capabilities().supported_models[0].model_name
        task = DEMO_TASKS[base].rl
        training = service.create_lora_training_client(base, rank=task.rank, seed=number, train_unembed=False)
        tokenizer = training.get_tokenizer()

        def prompts(step: int) -> list[tuple[str, list[int]]]:
            return [(q, prompt_tokens(tokenizer, task.messages(q))) for q in task.batch(step, seed=number)]

        return list(
            rl_steps(
                training,
                tokenizer,
                prompts,
                task.reward,
                steps=steps or task.steps,
                group_size=task.group_size,
                params=SamplingParams(
                    max_tokens=task.max_tokens, temperature=task.temperature, seed=7 + 10**6 * number
                ),
                learning_rate=task.learning_rate,
                ahead=ahead,
            )
        )


def internal(cluster: Cluster) -> tuple[tuple[str, str], ...]:
    """Returns the metadata of a call between services."""
    return internal_metadata(cluster.environment("trainer")["TREADLE_TRAINER_INTERNAL_TOKEN"])


def busy_seconds(cluster: Cluster) -> dict[str, float]:
    """Returns how long trainer and sampler have worked since they started."""
    metadata = internal(cluster)
    with grpc.insecure_channel(cluster.addresses["trainer"]) as channel:
        trainer = trainer_pb2_grpc.TrainerServiceStub(channel).GetTrainerStatus(
            trainer_pb2.GetTrainerStatusRequest(), metadata=metadata
        )
    with grpc.insecure_channel(cluster.addresses["sampler"]) as channel:
        sampler = sampler_pb2_grpc.SamplerServiceStub(channel).GetSamplerStatus(
            sampler_pb2.GetSamplerStatusRequest(), metadata=metadata
        )
    return {"trainer": trainer.busy.ToNanoseconds() / 1e9, "sampler": sampler.busy.ToNanoseconds() / 1e9}


def traces(cluster: Cluster) -> dict[str, list[Span]]:
    """Returns when trainer and sampler worked, as (begin, end) in Unix time."""
    metadata = internal(cluster)
    with grpc.insecure_channel(cluster.addresses["trainer"]) as channel:
        passes = trainer_pb2_grpc.TrainerServiceStub(channel).ListPasses(
            trainer_pb2.ListPassesRequest(limit=1000), metadata=metadata
        )
    with grpc.insecure_channel(cluster.addresses["sampler"]) as channel:
        steps = sampler_pb2_grpc.SamplerServiceStub(channel).ListDecodeSteps(
            sampler_pb2.ListDecodeStepsRequest(limit=10_000), metadata=metadata
        )
    return {"trainer": [span(entry) for entry in passes.passes], "sampler": [span(entry) for entry in steps.steps]}


def span(entry: Any) -> Span:  # Any: a pass or a decode step.
    """Returns the time that an entry of a trace covers."""
    begin = entry.started.ToNanoseconds() / 1e9
    return begin, begin + entry.took.ToNanoseconds() / 1e9


def covered(spans: list[Span], begin: float, end: float, parts: int = 1) -> list[float]:
    """Returns the seconds that spans cover in each of so many equal parts of the time."""
    width = (end - begin) / parts
    edges = [(begin + index * width, begin + (index + 1) * width) for index in range(parts)]
    return [sum(max(0.0, min(b, right) - max(a, left)) for a, b in spans) for left, right in edges]


def table(name: str, seen: Seen) -> list[Row]:
    """Returns a configuration's rows."""
    count = sum(len(reports) for reports in seen.reports)
    rewards = [fmean(reports[index].value for reports in seen.reports) for index in range(len(seen.reports[0]))]
    quarter = max(1, len(rewards) // 4)
    minutes = (seen.end - seen.begin) / 60
    idle = ", ".join(f"{role} {seen.idle(role):.0%}" for role in seen.spans)
    rows = [
        {
            "figure": f"{name}: reward, first to last quarter",
            "value": f"{fmean(rewards[:quarter]):.2f} to {fmean(rewards[-quarter:]):.2f}",
        },
        {
            "figure": f"{name}: steps per minute, all tenants",
            "value": f"{count / minutes:.1f} ({count} in {60 * minutes:.0f} s)",
        },
        {"figure": f"{name}: idle", "value": idle},
    ]
    width = (seen.end - seen.begin) / COLUMNS
    for role, spans in seen.spans.items():
        shares = [min(1.0, part / width) for part in covered(spans, seen.begin, seen.end, COLUMNS)]
        strip = "".join(SHADES[round(share * (len(SHADES) - 1))] for share in shares)
        rows.append({"figure": f"{name}: {role} over time", "value": f"|{strip}|"})
    return rows
