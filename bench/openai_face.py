"""What a streamed chat completion costs beside the same sample streamed over native gRPC, token by token.

One client process and one stream at a time, the two faces in turn, round by round, on the same prompt and seed, so that
both draw the same tokens. The gateway's CPU is read from the system.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import openai
import psutil

from bench.foundation import started
from tests.support.cluster import Cluster
from treadle import ModelInput, SamplingClient, SamplingParams, ServiceClient

PROMPT = "Tell me a story about a fox."
Row = dict[str, str]


class Side:
    """One face: when its tokens came, and what the gateway spent on them."""

    def __init__(self) -> None:
        self.first: list[float] = []  # seconds to the first token
        self.per_token: list[float] = []  # seconds per token after it, one per stream
        self.cpu = 0.0
        self.num_tokens = 0

    def add(self, began: float, times: list[float], cpu: float) -> None:
        """Takes in one stream."""
        self.first.append(times[0] - began)
        self.per_token.append((times[-1] - times[0]) / (len(times) - 1))
        self.cpu += cpu
        self.num_tokens += len(times)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's options."""
    parser.add_argument("--base", default="pip", help="base to measure on")
    parser.add_argument("--rounds", type=int, default=20, help="streams per face")
    parser.add_argument("--tokens", type=int, default=200, help="tokens per stream")


def run(options: argparse.Namespace) -> list[Row]:
    """Measures both faces and returns the rows."""
    with tempfile.TemporaryDirectory() as folder, started(Path(folder), options.base) as (cluster, _):
        key = cluster.new_tenant()
        with ServiceClient(cluster.gateway_address, key) as service:
            base = service.get_server_capabilities().supported_models[0].model_name
            sampler = service.create_sampling_client(base_model=base)
            tokenizer = sampler.get_tokenizer()
            messages = [{"role": "user", "content": PROMPT}]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            prompt = ModelInput.from_ints(tokenizer.encode(text, add_special_tokens=False))
            client = openai.OpenAI(base_url=f"http://{cluster.http_address}/v1", api_key=key)
            return _measure(cluster, sampler, prompt, client, base, options)


def _measure(
    cluster: Cluster,
    sampler: SamplingClient,
    prompt: ModelInput,
    client: openai.OpenAI,
    base: str,
    options: argparse.Namespace,
) -> list[Row]:
    gateway = psutil.Process(cluster.processes["gateway"].pid)
    native, face = Side(), Side()

    def over_grpc(seed: int) -> list[float]:
        params = SamplingParams(max_tokens=options.tokens, seed=seed, stop=[])  # past the end of the text: all tokens
        return [time.perf_counter() for _ in sampler.sample_stream(prompt, 1, params)]

    def over_http(seed: int) -> list[float]:
        stream = client.chat.completions.create(
            model=base,
            messages=[{"role": "user", "content": PROMPT}],
            max_tokens=options.tokens,
            seed=seed,
            extra_body={"ignore_eos": True},
            stream=True,
            logprobs=True,  # a chunk for every token, also for one that ends within a character
        )
        chosen = (choice for chunk in stream for choice in chunk.choices)
        return [
            time.perf_counter()
            for choice in chosen
            for _ in (choice.logprobs.content if choice.logprobs and choice.logprobs.content else ())
        ]

    for number in range(options.rounds + 1):
        for side, stream in ((native, over_grpc), (face, over_http)):
            before, began = sum(gateway.cpu_times()[:2]), time.perf_counter()
            times = stream(number)
            if number:  # the first of each warms up
                side.add(began, times, sum(gateway.cpu_times()[:2]) - before)
    return _rows(native, face)


def _rows(native: Side, face: Side) -> list[Row]:
    rows = []
    for what, name in (("first token", "first"), ("per token after it", "per_token")):
        grpc_ms, http_ms = (1e3 * float(np.median(getattr(side, name))) for side in (native, face))
        rows += [
            {"figure": f"{what}: native gRPC stream, median", "value": f"{grpc_ms:.2f} ms"},
            {"figure": f"{what}: streamed chat completion with log-probs, median", "value": f"{http_ms:.2f} ms"},
            {"figure": f"{what}: added", "value": f"{http_ms - grpc_ms:.2f} ms"},
        ]
    for what, side in (("native", native), ("chat completion", face)):
        spent = 1e3 * side.cpu / side.num_tokens
        rows.append({"figure": f"CPU of the gateway per 1,000 tokens, {what}", "value": f"{spent:.2f} s"})
    return rows
