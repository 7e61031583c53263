"""The adapter store as a process of its own."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

from tests.store.conftest import TOKEN


class StoreProcess:
    """A store over `folder`/data on a free port; can be ended and started again."""

    def __init__(self, folder: Path, environment: dict[str, str] | None = None) -> None:
        self.folder = folder
        self._environment = environment or {}
        self.process: subprocess.Popen[bytes] | None = None
        self.address_file = folder / "address"

    def start(self) -> None:
        """Starts it without waiting."""
        self.address_file.unlink(missing_ok=True)
        environment = {
            **os.environ,
            "TREADLE_STORE_LISTEN": "127.0.0.1:0",
            "TREADLE_STORE_DATA_DIR": str(self.folder / "data"),
            "TREADLE_STORE_INTERNAL_TOKEN": TOKEN,
            "TREADLE_STORE_ADDRESS_FILE": str(self.address_file),
            **self._environment,
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "treadle_store"], env=environment, stderr=(self.folder / "log").open("ab")
        )

    async def address(self) -> str:
        """Waits until it serves and returns where."""
        while not (self.address_file.exists() and self.address_file.read_text()):
            assert self.process is not None
            assert self.process.poll() is None, (self.folder / "log").read_text()
            await asyncio.sleep(0.02)
        return self.address_file.read_text()

    def end(self, number: int) -> int:
        """Sends a signal and returns the exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(20)
