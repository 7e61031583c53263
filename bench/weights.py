"""How long new weights take from the trainer to a sampler's first token, on one host with real processes.

Each round changes the run by one optimizer step, publishes it and samples from it at once; a second, equal request
then shows what the first token costs when the revision is there already. The difference is the delay that publishing
adds. The legs come from the services' own logs. A forward_backward of 4 x 256 tokens stands for "a pass".
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from bench.foundation import cpu_seconds, ms, random_data
from tests.support.cluster import Cluster
from treadle import AdamParams, ModelInput, SamplingParams, ServiceClient, TrainingClient
from treadle.sampling import SamplingClient

Row = dict[str, str]
PROMPT = list(range(3, 19))
LEGS = {
    "trainer": ("revision_saved", ("export_seconds", "store_seconds", "record_seconds")),
    "sampler": ("revision_loaded", ("fetch_seconds", "read_seconds")),
    "sampler beside the store": ("revision_arrived", ("read_seconds",)),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's options."""
    parser.add_argument("--base", default="smollm2", help="base to measure on")
    parser.add_argument(
        "--rank", type=int, default=8, help="rank of the adapter; 8 is 10 MB on SmolLM2-135M in float32"
    )
    parser.add_argument("--rounds", type=int, default=15, help="revisions to publish")
    parser.add_argument(
        "--network", action="store_true", help="send weights as between hosts; default: a shared folder"
    )
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of the services")


def run(options: argparse.Namespace) -> list[Row]:
    """Starts the services, measures, and returns the rows."""
    with tempfile.TemporaryDirectory() as folder:
        blobs = str(Path(folder) / "data" / "blobs")
        shared = {} if options.network else {f"TREADLE_{role}_SHARED_BLOBS": blobs for role in ("TRAINER", "SAMPLER")}
        settings = {
            **shared,
            "TREADLE_TRAINER_LOG_FORMAT": "json",
            "TREADLE_SAMPLER_LOG_FORMAT": "json",
            **dict(pair.split("=", 1) for pair in options.set),
        }
        cluster = Cluster(Path(folder) / "data", options.base, settings)
        cluster.start()
        try:
            with ServiceClient(cluster.gateway_address, cluster.new_tenant()) as service:
                return measure(cluster, service, options.rank, options.rounds)
        finally:
            cluster.close()


def measure(cluster: Cluster, service: ServiceClient, rank: int, rounds: int) -> list[Row]:
    """Returns the rows of one run's revisions."""
    name = service.get_server_capabilities().supported_models[0].model_name
    training = service.create_lora_training_client(name, rank=rank, seed=1, train_unembed=False)
    data = random_data(vocabulary=1000)
    took: dict[str, list[float]] = {"pass": [], "publish": [], "fresh": [], "resident": [], "cpu": []}
    for _ in range(rounds + 2):
        begin = time.perf_counter()
        training.forward_backward(data, "cross_entropy").result()
        took["pass"].append(time.perf_counter() - begin)
        training.optim_step(AdamParams(learning_rate=1e-5)).result()
        begin, cpu = time.perf_counter(), cpu_seconds(cluster)
        sampler = training.save_weights_and_get_sampling_client()
        first_token(sampler)
        took["fresh"].append(time.perf_counter() - begin)
        took["cpu"].append(cpu_seconds(cluster) - cpu)
        begin = time.perf_counter()
        first_token(sampler)
        took["resident"].append(time.perf_counter() - begin)
    took["publish"] = publish_alone(training, data, rounds)
    took = {key: values[2:] for key, values in took.items()}
    took["delay"] = [a - b for a, b in zip(took["fresh"], took["resident"], strict=True)]
    size = sum(file.size for file in service.list_revisions(training.run)[0].files)
    rows = [
        {"figure": "revision", "value": f"{size / 1e6:.1f} MB, rank {rank}"},
        {"figure": "publish to first token of the new revision", "value": ms(took["fresh"]), "target": "50 ms"},
        {"figure": "first token of a revision that is there", "value": ms(took["resident"])},
        {"figure": "delay that publishing adds", "value": ms(took["delay"]), "target": "one decode step"},
        {"figure": "publish alone, as the client sees it", "value": ms(took["publish"])},
        {"figure": "CPU of all services and the client per publish and first token", "value": ms(took["cpu"])},
        {"figure": "a pass of 4 x 256 tokens", "value": ms(took["pass"])},
    ]
    return rows + legs(cluster, rounds)


def first_token(sampler: SamplingClient) -> None:
    """Draws one token and waits for it."""
    sampler.sample(ModelInput.from_ints(PROMPT), 1, SamplingParams(max_tokens=1, temperature=0)).result()


def publish_alone(training: TrainingClient, data: list[Any], rounds: int) -> list[float]:
    """Returns the seconds of publications that nobody samples from."""
    seconds = []
    for _ in range(rounds + 2):
        training.forward_backward(data[:1], "cross_entropy")
        training.optim_step(AdamParams(learning_rate=1e-5)).result()
        begin = time.perf_counter()
        training.save_weights_for_sampler().result()
        seconds.append(time.perf_counter() - begin)
    return seconds


def legs(cluster: Cluster, rounds: int) -> list[Row]:
    """Returns the medians of what the services logged of the revisions that were sampled from, which came first."""
    rows = []
    for role, (event, names) in LEGS.items():
        entries = [line for line in read_log(cluster.folder / f"{role.split()[0]}.log") if line.get("event") == event]
        for leg in names:
            values = [float(entry[leg]) for entry in entries if leg in entry][2 : rounds + 2]
            if values:
                value = f"{1e3 * median(values):.1f} ms ({1e3 * min(values):.1f}-{1e3 * max(values):.1f})"
                rows.append({"figure": f"{role}: {event}.{leg}", "value": value})
    return rows


def read_log(path: Path) -> list[dict[str, Any]]:  # Any: a log's values.
    """Returns the JSON lines of a service's log."""
    return [json.loads(line) for line in path.read_text(errors="replace").splitlines() if line.startswith("{")]
