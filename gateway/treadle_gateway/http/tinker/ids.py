"""Names of the Tinker SDK as names of ours, and back: pure, so that any gateway reads what another one wrote.

| theirs | ours |
|---|---|
| model id and training run `SESSION:train:N` | run `SESSION.train.N` |
| `tinker://RUN/weights/NAME` | checkpoint `NAME` of the run |
| `tinker://RUN/sampler_weights/NAME` | revision `NAME` of the run |
| `tinker://RUN/external_weights/NAME` | revision `external.NAME` of the run |
| sampling session `SESSION:sample:N:MODEL` | nothing: MODEL is the base or revision, in base64 |
| request id | nothing: it says which operation or which sample it stands for |

A run that was not made here has its own id as its training run's. Knows nothing of what exists.
"""

import base64
import binascii
import re
import secrets
import string
from dataclasses import dataclass
from typing import Final

import orjson

from treadle.errors import TreadleError, make_error
from treadle.names import AdapterName, RunName, is_adapter, parse_adapter

_SESSION: Final = re.compile(r"s-[a-z0-9]{16}")
_MODEL: Final = re.compile(r"(s-[a-z0-9]{16})[:.]train[:.](\d{1,9})")
_ALPHABET: Final = string.ascii_lowercase + string.digits
EXTERNAL_PREFIX: Final = "external."
KINDS: Final = ("weights", "sampler_weights", "external_weights")
SCHEME: Final = "tinker://"


def new_session() -> str:
    """Returns a fresh session id; 82 random bits, so that no two tenants ever have the same."""
    return "s-" + "".join(secrets.choice(_ALPHABET) for _ in range(16))


def check_session(session: str) -> str:
    """Returns a session id; PERMISSION_DENIED if it is none."""
    if _SESSION.fullmatch(session) is None:
        raise make_error("PERMISSION_DENIED", "Invalid session_id")
    return session


def model_id(session: str, seq: int) -> str:
    """Returns the id of a session's training run, as the SDK computes it too."""
    return f"{check_session(session)}:train:{seq}"


def run_of(model: str, tenant: str) -> RunName:
    """Returns the run of a model id."""
    match = _MODEL.fullmatch(model)
    return RunName(tenant, f"{match[1]}.train.{match[2]}" if match else model)


def model_of(run: RunName) -> str:
    """Returns the model id of a run."""
    match = _MODEL.fullmatch(run.run)
    return f"{match[1]}:train:{match[2]}" if match else run.run


def session_of(run: RunName) -> str:
    """Returns the session that made a run, empty if none did."""
    match = _MODEL.fullmatch(run.run)
    return match[1] if match else ""


def parse_path(path: str, tenant: str) -> AdapterName:
    """Returns the saved adapter that a tinker:// path names; BAD_NAME if it is none."""
    parts = path.removeprefix(SCHEME).split("/")
    if not path.startswith(SCHEME) or len(parts) != 3 or parts[1] not in KINDS:
        raise _bad_path(path)
    return adapter_of(parts[0], parts[1], parts[2], tenant)


def adapter_of(model: str, kind: str, name: str, tenant: str) -> AdapterName:
    """Returns the saved adapter of a run by the two parts of its checkpoint id; BAD_NAME if it is none."""
    run = run_of(model, tenant)
    try:
        if kind == "weights":
            return parse_adapter(f"{run}/checkpoints/{name}")
        prefix = EXTERNAL_PREFIX if kind == "external_weights" else ""
        return parse_adapter(f"{run}/revisions/{prefix}{name}")
    except TreadleError:
        raise _bad_path(f"{SCHEME}{model}/{kind}/{name}") from None


def checkpoint_of(adapter: AdapterName) -> str:
    """Returns a saved adapter's checkpoint id, `KIND/NAME`."""
    if adapter.kind == "checkpoints":
        return f"weights/{adapter.adapter}"
    if adapter.adapter.startswith(EXTERNAL_PREFIX):
        return f"external_weights/{adapter.adapter.removeprefix(EXTERNAL_PREFIX)}"
    return f"sampler_weights/{adapter.adapter}"


def path_of(adapter: AdapterName) -> str:
    """Returns a saved adapter's tinker:// path."""
    return f"{SCHEME}{model_of(adapter.run_name)}/{checkpoint_of(adapter)}"


def sampler_id(session: str, seq: int, model: str, tenant: str) -> str:
    """Returns the id of a tenant's sampling session on a base or revision; another tenant's keeps its whole name."""
    if is_adapter(model) and (adapter := parse_adapter(model)).tenant == tenant:
        model = f"{SCHEME}{adapter.run}/{adapter.adapter}"
    return f"{check_session(session)}:sample:{seq}:{_encode(model.encode())}"


def sampled_model(sampler: str, tenant: str) -> str:
    """Returns the base or revision of a sampling session; MODEL_NOT_FOUND if the id is none of ours."""
    parts = sampler.split(":")
    try:
        model = _decode(parts[3]).decode() if len(parts) == 4 and parts[1] == "sample" else ""
    except (ValueError, binascii.Error):
        model = ""
    if not model:
        raise make_error("MODEL_NOT_FOUND", f"there is no sampling session {sampler[:100]!r} of yours")
    if not model.startswith(SCHEME):
        return model
    run, _, revision = model.removeprefix(SCHEME).partition("/")
    return str(RunName(tenant, run).adapter("revisions", revision))


@dataclass(frozen=True, slots=True)
class OperationId:
    """Stands for an operation of a run.

    `sampler_seq` is set for weights that are published for a sampling session. `sent_at`, in seconds since 1970, is set
    for an operation whose turn had not come when it was answered: until a while later it may yet be accepted.
    """

    run: str
    seq: int
    sampler_seq: int | None = None
    sent_at: int | None = None

    def __str__(self) -> str:
        return "o-" + _encode(orjson.dumps([self.run, self.seq, self.sampler_seq, self.sent_at]))


def parse_operation_id(request_id: str) -> OperationId:
    """Returns what a request id stands for; OPERATION_NOT_FOUND if it is none of an operation."""
    try:
        run, seq, sampler_seq, sent_at = orjson.loads(_decode(request_id.removeprefix("o-")))
        return OperationId(str(run), int(seq), sampler_seq, sent_at)
    except (ValueError, TypeError, binascii.Error) as error:
        raise unknown_request(request_id) from error


def unknown_request(request_id: str) -> TreadleError:
    """Returns the error for a request id that stands for nothing."""
    return make_error("OPERATION_NOT_FOUND", f"there is no request {request_id[:60]!r}")


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def _bad_path(path: str) -> TreadleError:
    return make_error(
        "BAD_NAME",
        f"{path[:200]!r} is not a path of saved weights; it looks like tinker://RUN/weights/NAME, with weights, "
        "sampler_weights or external_weights, and a NAME of letters, digits, '-', '_' and '.', at most 64",
    )
