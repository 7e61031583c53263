"""A saved adapter on its way into a folder: resumable, checked, and under its name only when it is whole.

Parts lie beside the folder, named by the sha256 that the whole files will have, so that they are taken up again by
whoever asks for the same content, after a broken connection or in another process. Knows nothing of calls.
"""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import google_crc32c

from treadle.errors import ServerError
from treadle.records import AdapterInfo
from treadle.v1 import adapters_pb2

Progress = Callable[[int, int], None]
"""progress(bytes that are here, bytes in all)."""


class Download:
    """The files of one adapter and what of them is here; for one attempt after the other."""

    def __init__(self, info: AdapterInfo, target: Path, on_progress: Progress | None) -> None:
        self.name = info.name
        self._files = {file.path: file for file in info.files}
        for path in self._files:
            if Path(path).name != path or path in ("", ".", ".."):
                raise ServerError(f"the service names a file {path[:100]!r}", "BAD_ADAPTER_FILE")
        self._target = target
        self._folder = target.parent / f".{target.name}.partial"
        self._on_progress = on_progress or (lambda done, total: None)
        self._total = sum(file.size for file in info.files)
        self._done = 0
        self._open: BinaryIO | None = None

    def begin(self) -> list[tuple[str, int]]:
        """Returns the files that are not whole and how many bytes of each are here, before an attempt."""
        self._folder.mkdir(parents=True, exist_ok=True)
        have = {path: self._part(path).stat().st_size if self._part(path).exists() else 0 for path in self._files}
        self._done = sum(have.values())
        self._on_progress(self._done, self._total)
        return [(path, size) for path, size in have.items() if size < self._files[path].size]

    def take(self, response: adapters_pb2.PullAdapterResponse) -> None:
        """Writes what came; raises ServerError when it was damaged or is not what was asked for."""
        frame = response.WhichOneof("frame")
        if frame == "file":
            self.close()
            expected = self._files.get(response.file.path)
            if expected is None or expected.sha256 != response.file.sha256:
                raise ServerError(f"{response.file.path[:100]} is not what the service announced", "CHECKSUM_MISMATCH")
            self._open = self._part(response.file.path).open("ab")
        elif frame == "chunk":
            data = response.chunk.data
            if self._open is None:
                raise ServerError("a chunk came before its file's header", "FRAME_SIZE_MISMATCH")
            if google_crc32c.value(data) != response.chunk.crc32c:
                raise ServerError("a chunk was damaged on its way", "CHECKSUM_MISMATCH")
            self._open.write(data)
            self._done += len(data)
            self._on_progress(self._done, self._total)

    def finish(self) -> None:
        """Checks every file as a whole, forces it to disk and gives the folder its name; raises ServerError."""
        self.close()
        whole = self._folder / "whole"
        shutil.rmtree(whole, ignore_errors=True)
        whole.mkdir()
        for path, file in self._files.items():
            part = self._part(path)
            part.touch()
            with part.open("rb") as opened:
                os.fsync(opened.fileno())
                found = hashlib.file_digest(opened, "sha256").hexdigest()
            if found != file.sha256:
                part.unlink()
                raise ServerError(f"{path} is not what the service announced", "CHECKSUM_MISMATCH")
            os.replace(part, whole / path)
        os.replace(whole, self._target)
        shutil.rmtree(self._folder, ignore_errors=True)

    def close(self) -> None:
        """Closes the file that is being written; may be called at any time."""
        if self._open is not None:
            self._open.close()
            self._open = None

    def _part(self, path: str) -> Path:
        return self._folder / f"{self._files[path].sha256}-{path}"
