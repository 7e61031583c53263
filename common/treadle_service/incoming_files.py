"""Files on their way into the store's blob folder, for a worker that shares it.

The pages of a new file take longer to come by than what is written to them: a spare file, written full of zeros in a
quiet moment, is overwritten by the next content. Knows nothing of what the files hold.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from pathlib import Path
from typing import Final

from treadle_service.logs import get_logger

MOST_SPARE_BYTES: Final = 2**26
_NAME: Final = re.compile(r"[0-9a-f]{32}")
_ZEROS: Final = bytes(2**20)
log = get_logger(__name__)


class IncomingFiles:
    """The `incoming` part of a shared blob folder."""

    def __init__(self, blobs: Path | None) -> None:
        """`blobs` is the store's blob folder, None if it is out of reach."""
        self._folder = None if blobs is None else blobs / "incoming"
        self._spare: Path | None = None
        self._closed = False

    def path_of(self, name: str) -> Path | None:
        """Returns where a file lies; None when the folder is out of reach or nothing can be called that."""
        return self._folder / name if self._folder is not None and _NAME.fullmatch(name) else None

    def new(self, *, spare: bool = False) -> Path | None:
        """Returns where to write; None if the folder is out of reach. A `spare` file may be there to be overwritten."""
        if self._folder is None or not self._folder.is_dir():
            return None
        if spare and self._spare is not None:
            ready, self._spare = self._spare, None
            return ready
        return self._folder / secrets.token_hex(16)

    def prepare(self, size: int) -> None:
        """Makes a spare file of this many bytes unless there is one, or it would be too long; blocks."""
        if self._folder is None or self._spare is not None or size > MOST_SPARE_BYTES:
            return
        path = self._folder / secrets.token_hex(16)
        try:
            with path.open("xb", buffering=0) as file:
                os.posix_fallocate(file.fileno(), 0, size)
                for start in range(0, size, len(_ZEROS)):
                    file.write(_ZEROS[: size - start])
        except OSError as error:
            log.info("no_spare_file", cause=str(error))
            self._unlink(path)
            return
        self._spare = path
        if self._closed:
            self._unlink(path)

    def close(self) -> None:
        """Removes the spare file."""
        self._closed = True
        if self._spare is not None:
            self._unlink(self._spare)

    @staticmethod
    def _unlink(path: Path) -> None:
        # What stays behind is cleared away by the store.
        with contextlib.suppress(OSError):
            path.unlink()
