"""What `model` may say: a base, an alias of one, a saved revision, or a run, which means its newest revision.

| form | means |
|---|---|
| `treadle/pip`, an alias | the base as it is |
| `tenants/acme/runs/r-1/revisions/step-20` | that revision |
| `tenants/acme/runs/r-1` | the run's newest revision, as of the request |
| `tinker://r-1/sampler_weights/step-20` | the same revision, as the Tinker SDK names it |
| `BASE;` before any of the last three | the same, if it is a revision of that base |

Knows nothing of prompts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from treadle.errors import NotFoundError, TreadleError
from treadle.names import is_adapter, parse_adapter, parse_run
from treadle.v1 import adapters_pb2, admin_pb2
from treadle_gateway.cache import AsyncCache
from treadle_gateway.directory import ADAPTER_CACHE_SECONDS, Directory, model_not_found
from treadle_gateway.http.tinker.ids import SCHEME, parse_path
from treadle_gateway.local_calls import LocalCalls
from treadle_service.principal import current_principal

# Revisions that a list of models shows; a run's own list has all.
_LISTED: Final = 500
_OWNER: Final = "treadle"


@dataclass(frozen=True, slots=True)
class Model:
    """What answers: `name` is exact, that of a base or of a revision."""

    name: str
    base: str


class Models:
    """Finds and lists what the caller may sample from."""

    def __init__(self, calls: LocalCalls, directory: Directory, aliases: Mapping[str, str]) -> None:
        self._calls = calls
        self._directory = directory
        self._aliases = dict(aliases)
        self._own_revisions: AsyncCache[str, str] = AsyncCache(ADAPTER_CACHE_SECONDS)

    async def find(self, name: str) -> Model:
        """Returns what a name means to the caller; MODEL_NOT_FOUND for all that is not there, or not the caller's."""
        principal = current_principal()
        wanted_base, divider, rest = name.partition(";")
        exact = self.exact_name(rest if divider else name)
        if _is_run(exact):
            exact = await self._newest(exact, name)
        elif SCHEME in name:
            exact = await self._of_path(exact, name)
        try:
            base, _ = await self._directory.base_of_model(exact, principal)
        except TreadleError as error:
            # The name as the caller gave it, whatever became of it on the way.
            raise model_not_found(name) if error.reason == "MODEL_NOT_FOUND" else error from error
        if divider and (not is_adapter(exact) or base != self._aliases.get(wanted_base, wanted_base)):
            raise model_not_found(name)
        return Model(exact, base)

    def exact_name(self, name: str) -> str:
        """Returns what answers call a base or revision, whether there is one or not; BAD_NAME for a bad path."""
        exact = _from_tinker(name, current_principal().tenant)
        return self._aliases.get(exact, exact)

    async def describe(self, name: str) -> dict[str, Any]:
        """Returns one model as OpenAI shows it."""
        model = await self.find(name)
        bases = await self._bases()
        if not is_adapter(model.name):
            return _entry(name, 0, _OWNER, bases.get(model.base), model.base)
        answer = await self._calls.adapters.GetRevision(adapters_pb2.GetRevisionRequest(name=model.name))
        return _revision(answer.revision, bases.get(model.base), name)

    async def list(self) -> list[dict[str, Any]]:
        """Returns the bases, their aliases, and the caller's revisions, newest first."""
        bases = await self._bases()
        names = {name: name for name in bases} | {a: base for a, base in self._aliases.items() if base in bases}
        shown = [_entry(name, 0, _OWNER, bases[base], base) for name, base in names.items()]
        answer = await self._calls.adapters.ListRevisions(adapters_pb2.ListRevisionsRequest(page_size=_LISTED))
        return shown + [_revision(revision, bases.get(revision.base)) for revision in answer.revisions]

    async def delete(self, name: str) -> str:
        """Deletes a saved revision and returns its exact name; MODEL_NOT_FOUND for all else."""
        exact = self.exact_name(name)
        if not is_adapter(exact):
            # A run is no name of a revision here: which one it means may have changed since the caller looked.
            raise model_not_found(name)
        try:
            await self._calls.adapters.DeleteRevision(adapters_pb2.DeleteRevisionRequest(name=exact))
        except NotFoundError as error:
            raise model_not_found(name) from error
        self._own_revisions.drop(exact)
        return exact

    async def _bases(self) -> dict[str, admin_pb2.BaseModel]:
        answer = await self._calls.admin.GetCapabilities(admin_pb2.GetCapabilitiesRequest())
        return {base.name: base for base in answer.bases if base.sampleable}

    async def _of_path(self, own: str, asked: str) -> str:
        """Returns the revision that a path means, which names no tenant: the caller's own, else a public one.

        One's own is remembered: that it has been deleted since, the sampler says. A public one may be taken back.
        """
        wanted = adapters_pb2.GetRevisionRequest(name=parse_adapter(own).of_any_tenant)

        async def ask() -> str:
            return (await self._calls.adapters.GetRevision(wanted)).revision.name

        try:
            found = await self._own_revisions.get(own, ask)
        except TreadleError as error:
            raise model_not_found(asked) if error.reason in ("ADAPTER_NOT_FOUND", "BAD_NAME") else error from error
        if found != own:
            self._own_revisions.drop(own)
        return found

    async def _newest(self, run: str, asked: str) -> str:
        request = adapters_pb2.ListRevisionsRequest(run=run, page_size=1)
        found = (await self._calls.adapters.ListRevisions(request)).revisions
        if not found:
            raise model_not_found(asked)
        return found[0].name


def _is_run(name: str) -> bool:
    try:
        parse_run(name)
    except TreadleError:
        return False
    return True


def _from_tinker(name: str, tenant: str) -> str:
    """Returns the Treadle name of a tinker:// path; other names as they are. Raises BAD_NAME."""
    return str(parse_path(name, tenant)) if name.startswith(SCHEME) else name


def _revision(
    revision: adapters_pb2.Adapter, base: admin_pb2.BaseModel | None, name: str | None = None
) -> dict[str, Any]:
    tenant = revision.name.split("/")[1]
    return _entry(name or revision.name, revision.created.ToSeconds(), tenant, base, revision.base)


def _entry(name: str, created: int, owner: str, base: admin_pb2.BaseModel | None, root: str) -> dict[str, Any]:
    entry: dict[str, Any] = {"id": name, "object": "model", "created": created, "owned_by": owner, "root": root}
    return entry if base is None else entry | {"max_model_len": base.max_context}
