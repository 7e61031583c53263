"""Settings of a trainer. Knows nothing of how they are used."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from treadle_service.settings import ServiceSettings


class TrainerSettings(ServiceSettings):
    """Environment `TREADLE_TRAINER_*`, flags of the same names."""

    model_config = SettingsConfigDict(env_prefix="TREADLE_TRAINER_")

    listen: str = Field("127.0.0.1:7610", description="host:port to serve gRPC on; port 0 takes a free one")
    store_address: str = Field("127.0.0.1:7630", description="host:port of the adapter store")
    worker: str = Field(
        default_factory=lambda: f"trainer-{socket.gethostname()}".lower()[:63],
        description="stable id of this trainer: after a restart it takes its runs back at once",
    )
    base: str = Field("pip", description="base to train on: an alias (smollm2, pip), a folder or a hub name")
    base_name: str = Field("", description="name under which the base is served; default: as the base is called")
    dtype: str = Field("auto", description="element type that the base computes in: auto, float32 or bfloat16")
    device: str = Field("cpu", description="torch device")
    threads: int = Field(
        default_factory=lambda: max(1, (os.cpu_count() or 1) // 2), ge=1, description="threads of a CPU device"
    )
    cache_dir: Path = Field(Path("~/.cache/treadle"), description="where converted bases are kept")
    max_tokens_per_pass: int = Field(4096, ge=64, description="most positions in one pass; also the longest sequence")
    snapshot_every_steps: int = Field(10, ge=1, description="optimizer steps between two snapshots of a run")
    lease_seconds: float = Field(
        10.0, gt=0, description="how long a run stays with this trainer without a sign of life"
    )
    max_resident_runs: int = Field(1024, ge=1, description="runs held; beyond it idle ones are handed back")
    max_resident_bytes: int = Field(
        0, ge=0, description="memory for the states of runs; beyond it idle ones go to the store; 0: a quarter of all"
    )
    park_seconds: float = Field(
        5.0, gt=0, description="a run without work for so long gives up its gradient and leaves the device"
    )
    idle_seconds: float = Field(900.0, gt=0, description="a run without stream and work for so long is handed back")
