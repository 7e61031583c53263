"""What a sampler reads before it is published: handed out only for a revision with exactly that content."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.sampler.harness import Bench, ask, serving, tokens_of
from tests.sampler.test_revisions import cached, expected_tokens, make_weights
from treadle.internal.v1 import revisions_pb2
from treadle_engine.decode_base import DecodeBase
from treadle_engine.errors import EngineError
from treadle_engine.lora import AdapterWeights
from treadle_engine.peft_format import CONFIG_FILE, WEIGHTS_FILE, to_files
from treadle_engine.spare_buffers import SpareBuffers
from treadle_sampler.arrivals import Arrivals
from treadle_sampler.revision_source import StoreSource

RUN = "tenants/acme/runs/r"
FILE = "0" * 32
Files = tuple[tuple[str, str], ...]


class Desk:
    """Arrivals over a folder, the files on their way there, and the blobs that they become."""

    def __init__(self, base: DecodeBase, folder: Path, max_bytes: int = 2**30) -> None:
        self.base, self.folder, self.spare = base, folder, SpareBuffers()
        self.arrivals = Arrivals(base, folder.joinpath, folder.joinpath, self.spare, max_bytes)

    def announce(self, weights: AdapterWeights, file: str = FILE, run: str = RUN) -> Files:
        """Put a file there, have it read, and return the addresses of the revision that it is part of."""
        files = to_files(self.base, weights)
        (self.folder / file).write_bytes(files[WEIGHTS_FILE])
        size = len(files[WEIGHTS_FILE])
        self.arrivals.begin(revisions_pb2.RevisionArriving(run=run, file=file, size=size, config=files[CONFIG_FILE]))
        return tuple(sorted((path, hashlib.sha256(content).hexdigest()) for path, content in files.items()))

    def adopt(self, files: Files, file: str = FILE) -> None:
        """Make a blob of a file as the store does."""
        (self.folder / file).replace(self.folder / dict(files)[WEIGHTS_FILE])

    def write(self, weights: AdapterWeights, file: str = FILE, run: str = RUN) -> Files:
        """Do both."""
        files = self.announce(weights, file, run)
        self.adopt(files, file)
        return files


@pytest.fixture
def desk(base: DecodeBase, tmp_path: Path) -> Iterator[Desk]:
    """Arrivals over an empty folder."""
    return Desk(base, tmp_path)


async def test_what_was_read_is_the_revision_of_that_file_alone(desk: Desk, base: DecodeBase) -> None:
    """Bit for bit, once; another run, another file of the same content or another configuration get nothing."""
    weights = make_weights(base, 1)
    files = desk.announce(weights)
    desk.adopt(files)
    assert await desk.arrivals.take("tenants/acme/runs/other", files) is None
    taken = await desk.arrivals.take(RUN, files)
    assert taken is not None
    assert torch.equal(taken.flat, weights.flat)
    assert await desk.arrivals.take(RUN, files) is None
    desk.announce(weights)
    assert await desk.arrivals.take(RUN, files) is None
    for path in (CONFIG_FILE, WEIGHTS_FILE):
        desk.announce(weights)
        desk.adopt(files)
        other = tuple((name, "0" * 64 if name == path else sha256) for name, sha256 in files)
        assert await desk.arrivals.take(RUN, other) is None


async def test_the_newest_of_a_run_counts_and_all_are_bounded(base: DecodeBase, tmp_path: Path) -> None:
    """An older one is forgotten, and so is the run that was announced first when there is no more room."""
    first, second = make_weights(base, 1), make_weights(base, 2)
    size = len(to_files(base, first)[WEIGHTS_FILE])
    desk = Desk(base, tmp_path, max_bytes=2 * size + 100)
    old, new = desk.write(first, "a"), desk.write(second, "b")
    assert await desk.arrivals.take(RUN, old) is None
    runs = [f"{RUN}{number}" for number in range(3)]
    files = [desk.write(make_weights(base, 3 + int(run[-1])), run[-1], run) for run in runs]
    assert [await desk.arrivals.take(*pair) is not None for pair in zip(runs, files, strict=True)] == [
        False,
        True,
        True,
    ]
    small = Desk(base, tmp_path, max_bytes=size - 1)
    assert await small.arrivals.take(RUN, small.write(second, "c")) is None
    assert new != old


async def test_a_file_that_is_gone_or_broken_does_no_harm(desk: Desk, base: DecodeBase, tmp_path: Path) -> None:
    """Without a file there is nothing; what is wrong with a file is told to those who ask for the revision."""
    weights = make_weights(base, 1)
    files = desk.write(weights)
    (tmp_path / dict(files)[WEIGHTS_FILE]).unlink()
    assert await desk.arrivals.take(RUN, files) is None
    desk.arrivals.begin(revisions_pb2.RevisionArriving(run=RUN, file="gone", size=1))
    assert await desk.arrivals.take(RUN, files) is None
    (tmp_path / "target").write_bytes(b"")
    (tmp_path / FILE).symlink_to(tmp_path / "target")
    desk.arrivals.begin(revisions_pb2.RevisionArriving(run=RUN, file=FILE, size=1))
    assert await desk.arrivals.take(RUN, files) is None
    (tmp_path / FILE).unlink()
    weights.flat[3] = float("inf")
    files = desk.write(weights)
    with pytest.raises(EngineError, match="not finite"):
        await desk.arrivals.take(RUN, files)


async def test_a_spare_buffer_changes_no_bit(desk: Desk, base: DecodeBase) -> None:
    """Read into a buffer that was made before, weights are what they are in one of their own."""
    weights = make_weights(base, 1)
    desk.spare.prepare(weights.flat.numel())
    taken = await desk.arrivals.take(RUN, desk.write(weights))
    assert taken is not None
    assert torch.equal(taken.flat, weights.flat)
    assert desk.spare.take(weights.flat.numel()) is None


async def test_an_announced_revision_is_there_when_it_is_published(
    tmp_path: Path, base: DecodeBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not fetched again, and answers as the engine does; nobody can ask for it before it has its name."""
    fetched = fetches(monkeypatch)
    async with serving(tmp_path, shared_blobs=tmp_path / "blobs") as bench:
        weights, run = make_weights(base, 1), await bench.new_run(2)
        await serve(bench, base, run)
        fetched.clear()
        file = await bench.announce(run, base, weights, tmp_path / "blobs" / "incoming")
        await asyncio.sleep(0.1)
        assert await bench.refusal(ask(f"{run}/revisions/next")) == "MODEL_NOT_FOUND"
        model = await bench.save(run, base, weights, "next", file)
        await cached(bench, model)
        assert tokens_of(await bench.sample(ask(model, max_tokens=4))) == [expected_tokens(base, weights)]
    assert fetched == []


async def test_what_was_read_is_not_read_again_however_long_it_takes(desk: Desk, base: DecodeBase) -> None:
    """Asked for while it is being read, it is waited for; forgotten meanwhile, it does no harm."""
    weights = make_weights(base, 1)
    files = desk.write(weights)
    taking = asyncio.create_task(desk.arrivals.take(RUN, files))
    await asyncio.sleep(0)
    desk.announce(make_weights(base, 2))
    taken = await taking
    assert taken is not None
    assert torch.equal(taken.flat, weights.flat)


async def test_another_revision_than_the_announced_one_is_itself(tmp_path: Path, base: DecodeBase) -> None:
    """The name decides what answers: what was announced and never published answers nobody."""
    async with serving(tmp_path, shared_blobs=tmp_path / "blobs") as bench:
        weights, other, run = make_weights(base, 1), make_weights(base, 2), await bench.new_run(2)
        await serve(bench, base, run)
        await bench.announce(run, base, other, tmp_path / "blobs" / "incoming")
        model = await bench.save(run, base, weights, "next")
        assert tokens_of(await bench.sample(ask(model, max_tokens=4))) == [expected_tokens(base, weights)]


async def serve(bench: Bench, base: DecodeBase, run: str) -> None:
    """Let the sampler serve a run, so that it wants the run's next revisions."""
    await bench.sample(ask(await bench.save(run, base, make_weights(base, 9), "first")))


def fetches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return what samplers fetch from now on."""
    fetched: list[str] = []
    fetch = StoreSource._fetch

    async def noted(self: StoreSource, name: str, path: str, sha256: str) -> bytes | Path:
        fetched.append(path)
        return await fetch(self, name, path, sha256)

    monkeypatch.setattr(StoreSource, "_fetch", noted)
    return fetched
