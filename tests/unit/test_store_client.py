"""Files that worker and store hand over in a shared folder, and the ways back to the wire."""

import hashlib
import os
import random
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treadle.errors import TreadleError
from treadle_service import blob_delta
from treadle_service.server import serve_in_process
from treadle_service.store_client import KnownBlob, StoreClient
from treadle_store.__main__ import build, make_interceptors
from treadle_store.settings import StoreSettings

CONTENT = os.urandom(3 * 2**20 + 17)
ADDRESS = hashlib.sha256(CONTENT).hexdigest()
TOKEN = "store-client-tests"


@asynccontextmanager
async def connected(folder: Path, shared: Path | None) -> AsyncIterator[StoreClient]:
    settings = StoreSettings(listen="127.0.0.1:0", data_dir=folder, internal_token=TOKEN)
    async with serve_in_process(settings, build, make_interceptors(settings)) as host:
        client = StoreClient(host.address, TOKEN, shared)
        try:
            yield client
        finally:
            await client.close()


def write(path: Path | None) -> Path:
    assert path is not None
    path.write_bytes(CONTENT)
    return path


async def test_a_file_goes_and_comes_without_the_wire(tmp_path: Path) -> None:
    """What was put is the store's own file, and that file is what is read."""
    async with connected(tmp_path / "data", tmp_path / "data" / "blobs") as client:
        path = write(client.new_file())
        assert await client.put_file(path) == ADDRESS
        assert not path.exists()
        found = await client.get_file(ADDRESS)
        assert isinstance(found, Path)
        assert found.read_bytes() == CONTENT


async def test_a_store_with_another_folder_gets_the_bytes(tmp_path: Path) -> None:
    """A wrong setting costs speed, nothing else; the file is cleared away."""
    (tmp_path / "elsewhere" / "incoming").mkdir(parents=True)
    async with connected(tmp_path / "data", tmp_path / "elsewhere") as client:
        path = write(client.new_file())
        assert await client.put_file(path) == ADDRESS
        assert not path.exists()
        assert await client.get_file(ADDRESS) == CONTENT


async def test_a_damaged_file_is_not_taken_for_the_blob(tmp_path: Path) -> None:
    """The address says what the content must be, whoever changed the folder."""
    shared = tmp_path / "shared"
    (shared / ADDRESS[:2]).mkdir(parents=True)
    (shared / ADDRESS[:2] / ADDRESS[2:]).write_bytes(CONTENT[:-1] + b"?")
    async with connected(tmp_path / "data", shared) as client:
        await client.put_blob(CONTENT)
        assert await client.get_file(ADDRESS) == CONTENT


@pytest.mark.parametrize("known_here", [True, False])
async def test_differences_travel_instead_of_the_whole(tmp_path: Path, known_here: bool) -> None:
    """Where the store has what the caller has, unchanged bytes cost nothing; where not, the whole comes."""
    changed = bytearray(CONTENT)
    changed[2**20 : 2**20 + 1000] = os.urandom(1000)
    async with connected(tmp_path, None) as client:
        if known_here:
            await client.put_blob(CONTENT)
        address = await client.put_blob(bytes(changed))
        assert await client.get_blob(address, KnownBlob(ADDRESS, CONTENT)) == bytes(changed)
        received = client.num_received_bytes
        assert received < 10_000 if known_here else received == len(CONTENT)


async def test_a_caller_with_another_content_than_it_says_is_told(tmp_path: Path) -> None:
    """The sha256 of the whole decides, as always."""
    async with connected(tmp_path, None) as client:
        await client.put_blob(CONTENT)
        address = await client.put_blob(CONTENT[::-1])
        with pytest.raises(TreadleError, match="CHECKSUM_MISMATCH"):
            await client.get_blob(address, KnownBlob(ADDRESS, CONTENT[:-1] + b"?"))


# A process that ends while it has not answered a call, as a store that must go.
ENDING = """
import asyncio, grpc
class Silent(grpc.GenericRpcHandler):
    def service(self, call):
        return grpc.unary_unary_rpc_method_handler(self.wait)
    async def wait(self, request, context):
        asked.set()
        await asyncio.sleep(3600)
async def main():
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((Silent(),))
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await asked.wait()
    await asyncio.sleep(0.3)
asked = asyncio.Event()
asyncio.run(main())
"""


async def test_a_store_that_ends_in_the_middle_of_a_call_is_away() -> None:
    """Calls end with a bare CANCELLED then: that is no answer, and no operation may fail of it."""
    with subprocess.Popen([sys.executable, "-c", ENDING], stdout=subprocess.PIPE, text=True) as store:
        assert store.stdout is not None
        client = StoreClient(f"127.0.0.1:{store.stdout.readline().strip()}", TOKEN)
        with pytest.raises(TreadleError) as caught:
            await client.lookup_adapter("tenants/a/runs/r/revisions/v", tries=1)
        await client.close()
    assert caught.value.reason == "UNAVAILABLE"


@given(st.binary(max_size=70), st.integers(0, 2**32 - 1))
def test_a_difference_brings_back_every_content(content: bytes, seed: int) -> None:
    """Of any length, also none."""
    base = random.Random(seed).randbytes(len(content))
    assert blob_delta.decode(base, blob_delta.encode(base, content)) == content


def test_what_is_no_difference_is_refused() -> None:
    """Garbage, and one that was made for another length."""
    for delta in (b"garbage", blob_delta.encode(b"12345", b"abcde")):
        with pytest.raises(ValueError, match="difference"):
            blob_delta.decode(b"123456", delta)


@pytest.mark.parametrize("shared", [None, Path("/nonexistent")])
async def test_without_a_shared_folder_there_is_nowhere_to_write(tmp_path: Path, shared: Path | None) -> None:
    """Then weights are sent."""
    async with connected(tmp_path / "data", shared) as client:
        assert client.new_file() is None
