"""Settings of a sampler. Knows nothing of how they are used."""

from __future__ import annotations

import socket
from typing import Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from treadle_service.worker_settings import WorkerSettings


class SamplerSettings(WorkerSettings):
    """Environment `TREADLE_SAMPLER_*`, flags of the same names."""

    model_config = SettingsConfigDict(env_prefix="TREADLE_SAMPLER_")

    listen: str = Field("127.0.0.1:7620", description="host:port to serve gRPC on; port 0 takes a free one")
    worker: str = Field(
        default_factory=lambda: f"sampler-{socket.gethostname()}".lower()[:63],
        description="id of this sampler, stable over restarts",
    )
    backend: Literal["treadle", "vllm"] = Field(
        "treadle", description="engine that samples: Treadle's own, or vLLM, which needs an environment of its own"
    )
    vllm_options: dict[str, str | int | float | bool] = Field(
        default_factory=dict,
        description="further arguments of vLLM's engine (its EngineArgs) as JSON, such as max_lora_rank (default 64), "
        "max_loras (8), tensor_parallel_size",
    )
    prepack: bool = Field(
        True,
        description="on a CPU, decode over a copy of the base's linears in oneDNN's layout, with kernels between "
        "them: faster steps, for memory that is then not shared with other processes",
    )
    max_sequences: int = Field(64, ge=1, description="sequences that decode at the same time")
    max_cache_tokens: int = Field(
        65_536, ge=1, description="positions of keys and values held at once; at least four contexts"
    )
    max_requests: int = Field(1024, ge=1, description="requests that run or wait; beyond it QUEUE_FULL")
    max_cached_adapters: int = Field(1024, ge=1, description="revisions kept in memory")
    max_cached_bytes: int = Field(4 * 2**30, ge=1, description="bytes of revisions kept in memory")
    prefetch: Literal["off", "routed", "all"] = Field(
        "routed",
        description="new revisions to fetch ahead: none, those of runs whose requests come here, or all of the base",
    )
    max_prefetched_bytes: int = Field(
        2**30, ge=0, description="bytes of revisions that were fetched ahead and not asked for yet"
    )
    delta_bytes: int = Field(
        0,
        ge=0,
        description="bytes of files kept so that only the differences of a run's next revision are sent; for links of "
        "less than about 2 Gbit/s; 0: whole files are sent",
    )
    lookup_seconds: float = Field(
        10.0, ge=0, description="how long a cached revision is used before the store is asked whether it is still there"
    )
    heartbeat_seconds: float = Field(2.0, gt=0, description="time between two signs of life to the store")
