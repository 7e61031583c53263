"""What the OpenAI face asks the store to find out what `model` means."""

from collections.abc import AsyncIterator

import httpx
import pytest
from prometheus_client import REGISTRY

from tests.gateway.conftest import Front
from tests.gateway.test_every_method import saved_by
from treadle.v1 import adapters_pb2, adapters_pb2_grpc

RUN_ID = "r-0123456789"
PATH = f"tinker://{RUN_ID}/sampler_weights/a"


@pytest.fixture
async def web(front: Front) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the gateway's HTTP side, without a key."""
    async with httpx.AsyncClient(base_url=f"http://{front.gateway.http_address}", timeout=30) as client:
        yield client


async def complete(web: httpx.AsyncClient, key: tuple[tuple[str, str], ...]) -> str:
    """Asks for a completion; says how it was refused: without a sampler all are."""
    answer = await web.post("/v1/completions", json={"model": PATH, "prompt": "a"}, headers=dict(key))
    return str(answer.json()["error"]["code"])


def num_questions(method: str = "AdapterService/GetRevision") -> float:
    """Returns how often the store was asked for a revision."""
    labels = {"method": method, "code": "OK"}
    return REGISTRY.get_sample_value("treadle_rpc_duration_seconds_count", labels) or 0


async def test_the_path_of_an_own_revision_is_asked_for_once(web: httpx.AsyncClient, front: Front) -> None:
    """And again when it has been deleted here: it is known to be gone at once."""
    key = await front.tenant("acme", "train", "sample")
    assert await complete(web, key) == "model_not_found"
    await saved_by(front, "acme", RUN_ID)
    before = num_questions()
    refusals = [await complete(web, key) for _ in range(5)]
    # The store and the gateway count in the same registry here, the gateway only what comes over the wire.
    assert num_questions() == before + 1
    assert "model_not_found" not in refusals
    assert (await web.delete(f"/v1/models/{PATH}", headers=dict(key))).status_code == 200
    assert await complete(web, key) == "model_not_found"


async def test_a_public_revision_of_somebody_else_is_asked_for_each_time(web: httpx.AsyncClient, front: Front) -> None:
    """Taken back, it is gone at once; one's own revision of that name comes first as soon as it is there."""
    owner, other = await front.tenant("acme", "train", "sample"), await front.tenant("nosy", "train", "sample")
    run = await saved_by(front, "acme", RUN_ID)
    stub = adapters_pb2_grpc.AdapterServiceStub(front.channel)

    async def share(public: bool) -> None:
        request = adapters_pb2.SetAdapterPublicRequest(name=f"{run}/revisions/a", public=public)
        await stub.SetAdapterPublic(request, metadata=owner)

    async def found() -> str:
        answer = await web.get(f"/v1/models/{PATH}", headers=dict(other))
        return answer.json()["owned_by"] if answer.status_code == 200 else answer.json()["error"]["code"]

    assert await found() == "model_not_found"
    await share(True)
    assert await found() == "acme"
    await share(False)
    assert await found() == "model_not_found"
    await share(True)
    assert await found() == "acme"
    await saved_by(front, "nosy", RUN_ID)
    assert await found() == "nosy"
