"""Trouble with files: a layer below a real process that fails calls on demand and records what was made durable.

From the record, `power_loss` makes the folder as it may be found after the power failed at some moment: what was
synced is there; of what was not, each 512-byte sector may or may not be, and names come and go in order but may stop
anywhere. That is what POSIX promises and no more. Knows nothing of what the files are.
"""

import os
import random
import struct
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

SECTOR_BYTES = 512
_HEAD = struct.Struct("<cQQ3I")
_SOURCE = Path(__file__).with_name("faultfs.c")


class FaultLayer:
    """The layer for one process: what to start it with, and what it did."""

    def __init__(self, scratch: Path, root: Path, *, recording: bool = True) -> None:
        self.root = root
        self.log = scratch / "faultfs.log"
        self._control = scratch / "faultfs.control"
        self._library = scratch / "faultfs.so"
        self._recording = recording
        command = ["gcc", "-shared", "-fPIC", "-O1", "-w", "-o", self._library, _SOURCE, "-ldl", "-lpthread"]
        subprocess.run(command, check=True)

    @property
    def environment(self) -> dict[str, str]:
        """What the process needs in its environment."""
        values = {
            "LD_PRELOAD": str(self._library),
            "FAULTFS_ROOT": str(self.root),
            "FAULTFS_CONTROL": str(self._control),
        }
        return {**values, "FAULTFS_LOG": str(self.log)} if self._recording else values

    def fail(self, **numbers: int) -> None:
        """Makes calls fail from now on: write, sync, open (for writing) or name = an errno."""
        scratch = self._control.with_suffix(".new")
        scratch.write_text("".join(f"{call} {number}\n" for call, number in numbers.items()))
        scratch.replace(self._control)

    def heal(self) -> None:
        """Lets all calls through again."""
        self._control.unlink(missing_ok=True)

    @property
    def position(self) -> int:
        """How much has been recorded: what was acknowledged by now was done before this position."""
        return self.log.stat().st_size


class _Record(NamedTuple):
    kind: str
    inode: int
    offset: int
    one: str
    two: str
    data: bytes


@dataclass
class _File:
    """A file's durable content, and the writes and truncations since its last sync."""

    content: bytearray = field(default_factory=bytearray)
    pending: list[tuple[str, int, bytes]] = field(default_factory=list)

    def sync(self) -> None:
        for kind, offset, data in self.pending:
            _apply(self.content, kind, offset, data)
        self.pending.clear()

    def after_power_loss(self, chance: random.Random) -> bytes:
        content = bytearray(self.content)
        share = chance.choice([0.0, 0.5, 0.9, 1.0])
        for kind, offset, data in self.pending:
            if kind == "T":
                if chance.random() < share:
                    _apply(content, kind, offset, data)
                continue
            for start, end in _sectors(offset, len(data)):
                if chance.random() < share:
                    _apply(content, kind, start, data[start - offset : end - offset])
        return bytes(content)


class _Disk:
    """The folder as a power loss may leave it, replayed from records."""

    def __init__(self) -> None:
        self.now: dict[str, _File] = {}
        self.durable: dict[str, _File] = {}
        self.inodes: dict[int, _File] = {}
        # By folder, in order: (name that appears or None, its file, name that goes or None).
        self.pending: defaultdict[str, list[tuple[str | None, _File | None, str | None]]] = defaultdict(list)

    def replay(self, record: _Record) -> None:
        folder = os.path.dirname(record.two or record.one)
        match record.kind:
            case "C":
                self.inodes[record.inode] = self.now[record.one] = file = _File()
                self.pending[folder].append((record.one, file, None))
            case "W" | "T":
                self.inodes[record.inode].pending.append((record.kind, record.offset, record.data))
            case "S":
                self.inodes[record.inode].sync()
            case "D":
                _settle(self.durable, self.pending.pop(record.one.rstrip("/"), []))
            case "R":
                self.now[record.two] = file = self.now.pop(record.one)
                self.pending[folder].append((record.two, file, record.one))
            case "L":
                self.now[record.two] = file = self.now[record.one]
                self.pending[folder].append((record.two, file, None))
            case "U":
                self.now.pop(record.one, None)
                self.pending[folder].append((None, None, record.one))

    def after_power_loss(self, chance: random.Random) -> dict[str, bytes]:
        names = dict(self.durable)
        for changes in self.pending.values():
            _settle(names, changes[: chance.randint(0, len(changes))])
        return {name: file.after_power_loss(chance) for name, file in names.items()}


def power_loss(layer: FaultLayer, position: int, target: Path, chance: random.Random) -> None:
    """Writes into `target` what `layer.root` may hold after the power failed at a position of the record."""
    disk = _Disk()
    with layer.log.open("rb") as log:
        for record in _records(log.read(position)):
            disk.replay(record)
    for name, content in disk.after_power_loss(chance).items():
        # Made anew by whoever opens the database first, and mapped, so that the record cannot know it.
        if name.endswith("-shm"):
            continue
        path = target / os.path.relpath(name, layer.root)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _records(log: bytes) -> Iterator[_Record]:
    start = 0
    while start + _HEAD.size <= len(log):
        kind, inode, offset, *sizes = _HEAD.unpack_from(log, start)
        start += _HEAD.size
        parts = []
        for size in sizes:
            parts.append(log[start : start + size])
            start += size
        if start > len(log):
            return
        yield _Record(kind.decode(), inode, offset, parts[0].decode(), parts[1].decode(), parts[2])


def _settle(names: dict[str, _File], changes: list[tuple[str | None, _File | None, str | None]]) -> None:
    for appears, file, goes in changes:
        if goes is not None:
            names.pop(goes, None)
        if appears is not None and file is not None:
            names[appears] = file


def _apply(content: bytearray, kind: str, offset: int, data: bytes) -> None:
    if kind == "T":
        del content[offset:]
    end = offset + len(data)
    if len(content) < end:
        content.extend(bytes(end - len(content)))
    content[offset:end] = data


def _sectors(offset: int, length: int) -> Iterator[tuple[int, int]]:
    start, end = offset, offset + length
    while start < end:
        stop = min(end, (start // SECTOR_BYTES + 1) * SECTOR_BYTES)
        yield start, stop
        start = stop
