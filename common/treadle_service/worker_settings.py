"""Settings that trainers and samplers share: which base, on what device, where the store is.

Knows nothing of what a worker does with the base.
"""

import os
from pathlib import Path
from typing import Literal

from pydantic import Field

from treadle_service.settings import ServiceSettings


class WorkerSettings(ServiceSettings):
    """Settings of any worker; a role adds its prefix and its own."""

    store_address: str = Field("127.0.0.1:7630", description="host:port of the adapter store")
    shared_blobs: Path | None = Field(
        None,
        description="the store's blob folder, where this worker reaches it: weights are then handed over and mapped in "
        "place instead of sent; default: they are sent",
    )

    @property
    def peers(self) -> tuple[str, ...]:
        """Addresses of other services that are set here."""
        return (self.store_address,)

    base: str = Field("pip", description="base to hold: an alias (smollm2, pip), a folder or a hub name")
    base_name: str = Field("", description="name under which the base is served; default: as the base is called")
    dtype: str = Field("auto", description="element type that the base computes in: auto, float32 or bfloat16")
    quantize: Literal["none", "int8", "nf4"] = Field(
        "none", description="bits of the frozen linears; int8 and nf4 serve the base as NAME@int8 or NAME@nf4"
    )
    device: str = Field("cpu", description="torch device")
    threads: int = Field(
        default_factory=lambda: max(1, (os.cpu_count() or 1) // 2), ge=1, description="threads of a CPU device"
    )
    cache_dir: Path = Field(Path("~/.cache/treadle"), description="where converted bases are kept")
    rank_timeout_seconds: float = Field(
        120.0,
        gt=0,
        description="started by torchrun: how long a rank may be silent before the group is lost and starts again",
    )
