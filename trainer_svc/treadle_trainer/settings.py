"""Settings of a trainer. Knows nothing of how they are used."""

from __future__ import annotations

import socket
from typing import Literal

from pydantic import Field, field_validator
from pydantic_settings import SettingsConfigDict

from treadle_service.worker_settings import WorkerSettings
from treadle_trainer.budget import LEAST_TOKENS


class TrainerSettings(WorkerSettings):
    """Environment `TREADLE_TRAINER_*`, flags of the same names."""

    model_config = SettingsConfigDict(env_prefix="TREADLE_TRAINER_")

    listen: str = Field("127.0.0.1:7610", description="host:port to serve gRPC on; port 0 takes a free one")
    worker: str = Field(
        default_factory=lambda: f"trainer-{socket.gethostname()}".lower()[:63],
        description="id of this trainer, stable over restarts: it takes its runs back at once",
    )
    max_tokens_per_pass: int = Field(
        0, ge=0, description="most positions in one pass, also the longest sequence, from 1024 on; 0: by memory"
    )
    target_pass_seconds: float = Field(
        0.25, gt=0, description="how long a pass should take; one chunk of an operation may take longer"
    )
    measure_cost: bool = Field(
        True, description="run a few passes at start to measure what one costs; without it only positions are counted"
    )
    checkpoint_activations: bool = Field(
        False,
        description="keep only each layer's input for the backward and compute the rest again: less memory, slower",
    )
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
    rebalance_seconds: float = Field(
        5.0, ge=0, description="time between two looks at whether other trainers have less to do; 0: runs stay"
    )
    rebalance_gap: float = Field(
        0.5,
        gt=0,
        description="least difference between the loads of two trainers for which runs move, in devices kept busy",
    )
    rebalance_stay_seconds: float = Field(
        60.0, ge=0, description="how long a run stays at least where it came before it may be moved by load"
    )
    idle_seconds: float = Field(900.0, gt=0, description="a run without stream and work for so long is handed back")

    fan_out: Literal["auto", "off"] = Field(
        "auto",
        description="auto: chunks of a large batch are computed by other trainers of the base too, and theirs here",
    )
    fan_out_chunks: int = Field(
        4, ge=2, description="how many chunks of a run must wait, at least two passes' time, for others to help"
    )
    fan_out_bytes: int = Field(
        2**29,
        ge=0,
        description="memory for gradients on their way to runs held here, and as much for what others lend",
    )

    @field_validator("max_tokens_per_pass")
    @classmethod
    def _holds_a_chunk(cls, value: int) -> int:
        if 0 < value < LEAST_TOKENS:
            raise ValueError(f"a pass must hold a chunk: at least {LEAST_TOKENS}, or 0 to choose by memory")
        return value
