"""Requests over HTTP: who gets in, what a failure looks like, TLS, and the end of a gateway."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from tests.gateway.conftest import BASE, Front
from tests.gateway.test_tls import deployment
from tests.support.certificates import Authority
from treadle.errors import CATALOGUE, make_error
from treadle.v1 import admin_pb2, admin_pb2_grpc, training_pb2
from treadle_gateway.http import assembly
from treadle_gateway.http.faces import PUBLIC, Face, HttpGateway, HttpRoute, error_response, json_response, status_of
from treadle_gateway.http.guard import Guard
from treadle_gateway.http.server import following_context
from treadle_gateway.settings import GatewaySettings
from treadle_service.principal import SCOPES, current_principal
from treadle_service.tls import KeyPair


class ProbeFace:
    """A face of this test's own, whose handlers show what reached them."""

    def __init__(self, gateway: HttpGateway) -> None:
        self.gateway = gateway
        self.held = asyncio.Event()

    async def whoami(self, _: Request) -> Response:
        return json_response({"tenant": current_principal().tenant})

    async def make_run(self, _: Request) -> Response:
        answer = await self.gateway.calls.training.CreateRun(training_pb2.CreateRunRequest(base=BASE))
        found = await self.gateway.calls.training.GetRun(training_pb2.GetRunRequest(name=answer.run.name))
        return json_response({"run": found.run.name})

    async def submit(self, request: Request) -> Response:
        operation = training_pb2.Operation(seq=int(request.query_params["seq"]), barrier=training_pb2.Barrier())
        wanted = training_pb2.SubmitOperationRequest(run=request.query_params["run"], operation=operation)
        answer = await self.gateway.calls.training.SubmitOperation(wanted, timeout=10)
        return json_response({"seq": answer.seq})

    async def make_tenant(self, _: Request) -> Response:
        await self.gateway.calls.admin.CreateTenant(admin_pb2.CreateTenantRequest(tenant="new"))
        return json_response({})

    async def hold(self, _: Request) -> Response:
        self.held.set()
        await asyncio.sleep(60)
        return json_response({})

    async def broken(self, _: Request) -> Response:
        raise RuntimeError("a secret of the service")

    async def broken_later(self, _: Request) -> Response:
        async def body() -> AsyncIterator[bytes]:
            yield b"first"
            raise make_error("NAN_LOGITS", "no more")

        return StreamingResponse(body())

    def face(self) -> Face:
        """Returns the face."""
        routes = [
            HttpRoute("GET", "/open", self.whoami, PUBLIC),
            HttpRoute("GET", "/whoami", self.whoami, ("train", "sample")),
            HttpRoute("POST", "/runs", self.make_run, ("train", "sample")),
            HttpRoute("POST", "/submit", self.submit, ("train",)),
            HttpRoute("POST", "/tenants", self.make_tenant, ("train",)),
            HttpRoute("GET", "/hold", self.hold, ("train",)),
            HttpRoute("GET", "/broken", self.broken, ("train",)),
            HttpRoute("GET", "/broken-later", self.broken_later, ("train",)),
        ]
        return Face("probe", "/probe", routes)


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> list[ProbeFace]:
    """Adds the probe to the faces; its first element is there once the gateway is. Ask for it before `front`."""
    made: list[ProbeFace] = []

    def make(gateway: HttpGateway) -> Face:
        made.append(ProbeFace(gateway))
        return made[-1].face()

    monkeypatch.setattr(assembly, "MAKERS", (*assembly.MAKERS, make))
    return made


@pytest.fixture
async def web(probe: list[ProbeFace], front: Front) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the gateway's HTTP side, without a key."""
    async with httpx.AsyncClient(base_url=f"http://{front.gateway.http_address}", timeout=30) as client:
        yield client


def with_key(metadata: tuple[tuple[str, str], ...]) -> dict[str, str]:
    """Returns the headers of a key given as gRPC metadata."""
    return dict(metadata)


async def test_a_key_is_taken_in_either_header_and_with_the_prefix_of_tinker(web: httpx.AsyncClient, front: Front):
    """The same keys as over gRPC; `tml-` before one changes nothing, there neither."""
    metadata = await front.tenant("acme", "sample")
    secret = metadata[0][1].removeprefix("Bearer ")
    for headers in (
        {"authorization": f"Bearer {secret}"},
        {"x-api-key": secret},
        {"x-api-key": f"tml-{secret}"},
        {"authorization": f"bearer tml-{secret}"},
    ):
        answer = await web.get("/probe/whoami", headers=headers)
        assert (answer.status_code, answer.json()) == (200, {"tenant": "acme"})
    admin = admin_pb2_grpc.AdminServiceStub(front.channel)
    prefixed = (("authorization", f"Bearer tml-{secret}"),)
    assert (await admin.GetCapabilities(admin_pb2.GetCapabilitiesRequest(), metadata=prefixed)).tenant == "acme"


async def test_nobody_gets_in_without_a_key_or_its_scope(web: httpx.AsyncClient, front: Front) -> None:
    """Each refusal says what is missing; a public route has no caller at all."""
    sampler = with_key(await front.tenant("acme", "sample"))
    for headers, status, hint in (
        ({}, 401, "carries no key"),
        ({"x-api-key": "tml-treadle_a_b_c"}, 401, "unknown, revoked or expired"),
        ({"authorization": "Basic abc"}, 401, "carries no key"),
        (sampler, 403, "needs a key with the scope 'train'"),
    ):
        answer = await web.post("/probe/submit", headers=headers)
        assert (answer.status_code, hint in answer.json()["detail"]) == (status, True), answer.text
    assert (await web.get("/probe/open", headers=sampler)).status_code == 401
    assert (await web.get("/nothing/here", headers=sampler)).status_code == 404


def test_every_route_of_every_face_names_scopes_that_exist_and_is_guarded() -> None:
    """What is served without a key is listed here by hand."""
    faces = assembly.make_faces(HttpGateway(GatewaySettings(), None, None, None, None))
    open_routes = {face.prefix + r.path for face in faces for r in (*face.routes, *face.mounts) if r.scopes == PUBLIC}
    # The dashboard, at "", asks for keys itself: see tests/dashboard/test_access.py.
    assert open_routes == {"/api/v1/healthz", "/api/v1/files/{link}", ""}
    assert {scope for face in faces for r in (*face.routes, *face.mounts) for scope in r.scopes} <= SCOPES
    served = assembly.make_app(faces, None).routes
    assert len(served) == sum(len(face.routes) + len(face.mounts) for face in faces)
    assert all(isinstance(route.app, Guard) for route in served)


async def test_a_handler_calls_the_gateways_own_methods_as_the_caller(web: httpx.AsyncClient, front: Front) -> None:
    """Routing, refusals of workers and scopes are those of the gRPC methods."""
    peer = await front.add_peer()
    owner, other = await front.tenant("acme", "train"), await front.tenant("nosy", "train")
    run = (await web.post("/probe/runs", headers=with_key(owner))).json()["run"]
    await front.claim(run, "trainer-0", peer.address)
    answer = await web.post("/probe/submit", params={"run": run, "seq": 1}, headers=with_key(owner))
    assert answer.json() == {"seq": 1}
    assert peer.metadata["x-treadle-tenant"] == "acme"
    peer.refuse_seq = 9
    refused = await web.post("/probe/submit", params={"run": run, "seq": 9}, headers=with_key(owner))
    assert (refused.status_code, refused.json()["reason"]) == (400, "SEQ_GAP")
    assert refused.headers["retry-after-ms"] == "1500"
    hidden = await web.post("/probe/submit", params={"run": run, "seq": 1}, headers=with_key(other))
    assert (hidden.status_code, hidden.json()["reason"]) == (404, "RUN_NOT_FOUND")
    # A route that asks for too little does not open what the method itself keeps closed.
    assert (await web.post("/probe/tenants", headers=with_key(owner))).status_code == 403
    sampler = with_key(await front.tenant("reader", "sample"))
    assert (await web.post("/probe/runs", headers=sampler)).status_code == 403


async def test_a_fault_of_a_handler_is_one_answer_and_tells_nothing(web: httpx.AsyncClient, front: Front) -> None:
    """And an answer that has begun can only be cut off."""
    key = with_key(await front.tenant("acme", "train"))
    answer = await web.get("/probe/broken", headers=key)
    assert (answer.status_code, "secret" in answer.text) == (500, False)
    with pytest.raises(httpx.RemoteProtocolError):
        await web.get("/probe/broken-later", headers=key)


@pytest.mark.parametrize("gateway_settings", [{"max_requests_per_tenant": 1}])
async def test_open_requests_are_bounded_per_tenant_and_end_with_their_key(
    web: httpx.AsyncClient, front: Front, probe: list[ProbeFace]
) -> None:
    """Calls over gRPC are counted apart."""
    made = await admin_pb2_grpc.AdminServiceStub(front.channel).CreateKey(
        admin_pb2.CreateKeyRequest(tenant="admin", scopes=["train"]), metadata=front.admin
    )
    key = {"x-api-key": made.secret}
    holding = asyncio.create_task(web.get("/probe/hold", headers=key))
    await probe[0].held.wait()
    answer = await web.get("/probe/whoami", headers=key)
    assert (answer.status_code, answer.json()["reason"]) == (429, "QUEUE_FULL")
    await admin_pb2_grpc.AdminServiceStub(front.channel).RevokeKey(
        admin_pb2.RevokeKeyRequest(key_id=made.key.key_id), metadata=front.admin
    )
    ended = await holding
    assert (ended.status_code, "revoked" in ended.json()["detail"]) == (401, True)


def test_only_passing_trouble_is_answered_with_a_status_that_clients_repeat() -> None:
    """Clients of these APIs send again after 429 and 503; for ever, if the trouble does not pass."""
    for reason, spec in CATALOGUE.items():
        error = make_error(reason, "sentence")
        assert (reason, status_of(error) in (429, 503)) == (reason, spec.retryable and status_of(error) in (429, 503))
        assert 400 <= error_response(error).status_code <= 504


async def test_https_shows_the_certificate_that_grpc_shows(tmp_path: Path) -> None:
    """And a changed one at the next handshake."""
    async with deployment(tmp_path) as (_, _, public):
        context = ssl.create_default_context(cafile=str(public.ca))
        address = (tmp_path / "http").read_text()
        async with httpx.AsyncClient(verify=context, base_url=f"https://{address}") as client:
            assert (await client.get("/api/v1/healthz")).json() == {"status": "ok"}


async def test_a_rotated_certificate_is_shown_without_a_restart(tmp_path: Path) -> None:
    """By the context alone, with two handshakes."""
    authority = Authority(tmp_path)
    first = authority.sign("web", "127.0.0.1")
    context = following_context(KeyPair(first.certificate, first.key))
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]

    async def serial() -> int:
        trusting = ssl.create_default_context(cafile=str(authority.ca))
        _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trusting)
        shown = writer.get_extra_info("ssl_object").getpeercert()["serialNumber"]
        writer.close()
        return int(shown, 16)

    async with server:
        assert await serial() == first.serial
        second = authority.sign("web", "127.0.0.1")
        assert await serial() == second.serial != first.serial
