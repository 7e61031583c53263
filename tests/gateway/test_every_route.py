"""Every route of every face over HTTP against every kind of caller that must not get in: enumerated from the faces."""

import json
import re
from collections.abc import AsyncIterator

import httpx
import pytest

from tests.gateway.conftest import Front
from tests.gateway.test_every_method import COMPLETION, expired_key, keep_completion, saved_by
from treadle.internal.v1 import tinker_pb2
from treadle.names import RunName
from treadle_gateway.http import assembly
from treadle_gateway.http.faces import PUBLIC, HttpGateway, HttpRoute
from treadle_gateway.http.tinker import ids
from treadle_gateway.settings import GatewaySettings
from treadle_service.principal import SCOPES

FACES = assembly.make_faces(HttpGateway(GatewaySettings(), None, None, None, None))
ROUTES: dict[str, HttpRoute] = {
    f"{route.method} {face.prefix}{route.path}": route for face in FACES for route in face.routes
}
GUARDED = {name: route for name, route in ROUTES.items() if route.scopes != PUBLIC}

# Routes that take the name of something that a tenant owns, and a body that names it. {run} is a run's id, {session}
# the part of it that names a session, {sampler} and {operation} are ids of a sampling session and of a future that name
# the run, {completion} is what was kept.
_T, _O = "/api/v1", "/v1"
_SAVED = f"{_T}/training_runs/{{run_id}}/checkpoints/{{kind}}/{{name}}"
_RUN, _REVISION = "tenants/{tenant}/runs/{run}", "tenants/{tenant}/runs/{run}/revisions/a"
_STATE, _SAMPLER = "tinker://{run}/weights/c", "tinker://{run}/sampler_weights/a"
_HI = [{"role": "user", "content": "Hi"}]
_ADAM = {"learning_rate": 0.1}
NAMED: dict[str, dict[str, object]] = {
    f"POST {_T}/get_info": {"model_id": "{run}"},
    f"POST {_T}/optim_step": {"model_id": "{run}", "seq_id": 1, "adam_params": _ADAM},
    f"POST {_T}/save_weights": {"model_id": "{run}", "seq_id": 1, "path": "p"},
    f"POST {_T}/save_weights_for_sampler": {"model_id": "{run}", "seq_id": 1, "path": "p"},
    f"POST {_T}/save_weights_external": {"model_id": "{run}", "seq_id": 1, "path": "p"},
    f"POST {_T}/load_weights": {"model_id": "{run}", "seq_id": 1, "path": _STATE, "optimizer": False},
    f"POST {_T}/copy_weights": {"source_path": _STATE},
    f"POST {_T}/weights_info": {"tinker_path": _STATE},
    f"POST {_T}/create_sampling_session": {
        "session_id": "s-0123456789abcdef",
        "sampling_session_seq_id": 1,
        "model_path": _SAMPLER,
    },
    f"POST {_T}/forward_backward": {},
    f"POST {_T}/asample": {
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1]}]},
        "sampling_params": {"max_tokens": 1},
        "model_path": _SAMPLER,
    },
    f"POST {_T}/retrieve_future": {"request_id": "{operation}"},
    f"GET {_T}/samplers/{{sampler_id}}": {},
    f"GET {_T}/training_runs/{{run_id}}": {},
    f"DELETE {_SAVED}": {},
    f"PUT {_SAVED}/ttl": {"ttl_seconds": 3600},
    f"POST {_SAVED}/publish": {},
    f"DELETE {_SAVED}/publish": {},
    f"GET {_SAVED}/external_weights_urls": {},
    f"GET {_O}/models/{{model:path}}": {},
    f"DELETE {_O}/models/{{model:path}}": {},
    f"POST {_O}/completions": {"model": _REVISION, "prompt": "x"},
    f"POST {_O}/chat/completions": {"model": _RUN, "messages": _HI},
    f"GET {_O}/chat/completions/{{completion}}": {},
    f"POST {_O}/chat/completions/{{completion}}": {"metadata": {}},
    f"DELETE {_O}/chat/completions/{{completion}}": {},
    f"GET {_O}/chat/completions/{{completion}}/messages": {},
}
LISTS = {
    f"GET {_O}/models",
    f"GET {_O}/chat/completions",
    f"GET {_T}/training_runs",
    f"GET {_T}/training_runs/{{run_id}}/checkpoints",
    f"GET {_T}/checkpoints",
    f"GET {_T}/sessions",
    f"GET {_T}/sessions/{{session_id}}",
}
# Routes of the Tinker face that name nothing, or nothing that anybody but the caller could have: a new model, samples
# that a gateway keeps by tenant, what the caller used.
OWN = {
    *(f"POST {_T}/{name}" for name in ("client/config", "client/dynamic_config", "create_session", "telemetry")),
    *(f"POST {_T}/{name}" for name in ("session_heartbeat", "sessions/{session_id}/finish", "create_custom_loss")),
    *(f"POST {_T}/{name}" for name in ("create_model", "join_sampling_session", "retrieve_futures", "cancel_future")),
    *(f"GET {_T}/{name}" for name in ("get_server_capabilities", "auth/apikey/me")),
    *(f"GET {_T}/billing/usage/{name}" for name in ("events", "checkpoints/current")),
}
_SESSION, _NO_SESSION = "s-0123456789abcdef", "s-0000000000000000"


def names_of(tenant: str, session: str, completion: str) -> dict[str, str]:
    """Returns the names of a run that a session of the Tinker SDK made, of what belongs to it, and of a completion."""
    run = RunName(tenant, f"{session}.train.0")
    return {
        "tenant": tenant,
        "run": run.run,
        "session": session,
        "sampler": ids.sampler_id(session, 0, str(run.adapter("revisions", "a")), tenant),
        "operation": str(ids.OperationId(run.run, 1)),
        "completion": completion,
    }


@pytest.fixture
async def web(front: Front) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the gateway's HTTP side, without a key."""
    async with httpx.AsyncClient(base_url=f"http://{front.gateway.http_address}", timeout=60) as client:
        yield client


async def call(web: httpx.AsyncClient, name: str, key=(), names: dict[str, str] | None = None) -> httpx.Response:
    """Calls a route with the names filled in."""
    names = names or names_of("acme", _SESSION, "chatcmpl-1")
    method, path = name.split(" ")
    parts = {
        "run_id": names["run"],
        "session_id": names["session"],
        "sampler_id": names["sampler"],
        "kind": "external_weights" if path.endswith("external_weights_urls") else "weights",
        "name": "c",
        "model:path": _fill(_REVISION, names),
        "completion": names["completion"],
    }
    path = re.sub(r"\{([^}]+)\}", lambda match: parts.get(match[1], "x"), path)
    body = json.loads(_fill(json.dumps(NAMED.get(name, {})), names))
    content: bytes | str | None = json.dumps(body) if method in ("POST", "PUT") else None
    if path.endswith("/forward_backward"):
        wanted = tinker_pb2.TinkerForwardBackwardRequest(model_id=names["run"], seq_id=1, loss_fn="cross_entropy")
        content = wanted.SerializeToString()
    return await web.request(method, path, content=content, headers=dict(key))


def _fill(text: str, names: dict[str, str]) -> str:
    for part, value in names.items():
        text = text.replace("{" + part + "}", value)
    return text


def _nameless(text: str, names: dict[str, str]) -> str:
    """Returns an answer without the names that its request had; the Tinker face reads all as the caller's own."""
    for part in ("session", "completion"):
        text = text.replace(names[part], "it")
    return re.sub("tenants/(acme|nosy)/", "tenants/whose/", text)


def test_the_routes_below_are_routes() -> None:
    assert {name for name in GUARDED if name.split(" ")[1].startswith((_T, _O))} == {*NAMED, *LISTS, *OWN}


async def test_no_route_lets_a_caller_in_without_a_valid_key(web: httpx.AsyncClient, front: Front) -> None:
    """No key, a key of nobody, one whose end has come: 401 in the face's own form, before the body is looked at."""
    ended = await expired_key(front)
    for name in GUARDED:
        for key, hint in (
            ((), "carries no key"),
            ((("authorization", "Bearer treadle_a_b_c"),), "unknown"),
            (ended, "expired"),
        ):
            answer = await call(web, name, key)
            assert (name, answer.status_code, hint in answer.text) == (name, 401, True)


async def test_no_route_lets_a_key_in_without_its_scope(web: httpx.AsyncClient, front: Front) -> None:
    """A key with every scope but those that the route wants."""
    keys = {}
    for number, scopes in enumerate(sorted({route.scopes for route in GUARDED.values()})):
        others = sorted(SCOPES - set(scopes))
        keys[scopes] = await front.tenant(f"lacking-{number}", *others) if others else None
    for name, route in GUARDED.items():
        if keys[route.scopes] is not None:
            answer = await call(web, name, keys[route.scopes])
            assert (name, answer.status_code, "scope" in answer.text) == (name, 403, True)


async def test_what_no_face_serves_is_not_there(web: httpx.AsyncClient, front: Front) -> None:
    """Whatever the key: other paths, and other methods of paths that there are."""
    key = await front.tenant("acme", "train", "sample", "admin")
    for path in ("/v1", "/v1/embeddings", "/v2/models", "/v1/chat/completions/a/b", "/api/v1/../../etc/passwd"):
        assert (path, (await web.get(path, headers=dict(key))).status_code) == (path, 404)
    for name in GUARDED:
        path = name.split(" ")[1]
        if not any(f"PATCH {path}" == other for other in GUARDED):
            answer = await web.request("PATCH", re.sub(r"\{[^}]+\}", "x", path), headers=dict(key))
            assert (name, answer.status_code in (404, 405)) == (name, True)


async def test_anothers_thing_is_answered_like_one_that_is_not_there(web: httpx.AsyncClient, front: Front) -> None:
    """Same status and same words but for the name; and the owner still has it afterwards."""
    await front.add_peer()
    owner, other = await front.tenant("acme", "train", "sample"), await front.tenant("nosy", "train", "sample")
    theirs = names_of("acme", _SESSION, COMPLETION)
    await saved_by(front, "acme", theirs["run"])
    await keep_completion(front, "acme", COMPLETION)
    for name in NAMED:
        answer = await call(web, name, other, theirs)
        assert (name, answer.status_code) == (name, 404), answer.text
        for tenant in ("nosy", "acme"):
            absent = names_of(tenant, _NO_SESSION, "chatcmpl-0")
            missing = await call(web, name, other, absent)
            assert (name, missing.status_code) == (name, answer.status_code)
            assert (name, _nameless(missing.text, absent)) == (name, _nameless(answer.text, theirs))
    for name in LISTS:
        listed, mine = await call(web, name, other, theirs), await call(web, name, owner, theirs)
        assert (name, listed.status_code) == (name, 200)
        assert (name, [shown in listed.text for shown in (_SESSION, COMPLETION)]) == (name, [False, False])
        assert (name, _SESSION in mine.text or COMPLETION in mine.text) == (name, True)
