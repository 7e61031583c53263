"""Settings of a sampler. Knows nothing of how they are used."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from treadle_service.settings import ServiceSettings


class SamplerSettings(ServiceSettings):
    """Environment `TREADLE_SAMPLER_*`, flags of the same names."""

    model_config = SettingsConfigDict(env_prefix="TREADLE_SAMPLER_")

    listen: str = Field("127.0.0.1:7620", description="host:port to serve gRPC on; port 0 takes a free one")
    store_address: str = Field("127.0.0.1:7630", description="host:port of the adapter store")
    worker: str = Field(
        default_factory=lambda: f"sampler-{socket.gethostname()}".lower()[:63], description="stable id of this sampler"
    )
    base: str = Field("pip", description="base to sample from: an alias (smollm2, pip), a folder or a hub name")
    base_name: str = Field("", description="name under which the base is served; default: as the base is called")
    dtype: str = Field("auto", description="element type that the base computes in: auto, float32 or bfloat16")
    device: str = Field("cpu", description="torch device")
    threads: int = Field(
        default_factory=lambda: max(1, (os.cpu_count() or 1) // 2), ge=1, description="threads of a CPU device"
    )
    cache_dir: Path = Field(Path("~/.cache/treadle"), description="where converted bases are kept")
    max_sequences: int = Field(64, ge=1, description="sequences that decode at the same time")
    max_cache_tokens: int = Field(65_536, ge=1, description="positions of keys and values promised to sequences")
    max_requests: int = Field(1024, ge=1, description="requests that run or wait; beyond it QUEUE_FULL")
    max_cached_adapters: int = Field(64, ge=1, description="revisions kept in memory")
    max_cached_bytes: int = Field(4 * 2**30, ge=1, description="bytes of revisions kept in memory")
    lookup_seconds: float = Field(
        10.0, ge=0, description="how long a cached revision is used before the store is asked whether it is still there"
    )
    heartbeat_seconds: float = Field(2.0, gt=0, description="time between two signs of life to the store")
