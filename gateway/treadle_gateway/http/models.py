"""The bases that this deployment serves, and the names under which users know them.

Shared by the faces. Knows nothing of adapters.
"""

import re
from collections.abc import Mapping
from typing import Final

from treadle.errors import TreadleError, make_error
from treadle.v1 import admin_pb2
from treadle_gateway.cache import AsyncCache
from treadle_gateway.local_calls import LocalCalls

_CACHE_SECONDS: Final = 2.0
# `NAME:peft:32768` asks the hosted service for a longer context; here a base has the one that it has.
_SUFFIX: Final = re.compile(r":peft(:\d+)?$")


class Models:
    """Answers which base a name means; the same name is in every answer about it."""

    def __init__(self, calls: LocalCalls, aliases: Mapping[str, str]) -> None:
        self._calls = calls
        self._aliases = dict(aliases)
        self._cache: AsyncCache[str, admin_pb2.GetCapabilitiesResponse] = AsyncCache(_CACHE_SECONDS, max_entries=1)

    async def all(self) -> dict[str, admin_pb2.BaseModel]:
        """Returns the served bases by every name that they have, their own names first."""
        bases = {base.name: base for base in (await self._capabilities()).bases}
        aliases = {alias: bases[name] for alias, name in self._aliases.items() if name in bases}
        return bases | aliases

    async def find(self, name: str) -> admin_pb2.BaseModel:
        """Returns the base that a name means; UNKNOWN_BASE with those that there are."""
        known = await self.all()
        base = known.get(name) or known.get(_SUFFIX.sub("", name))
        if base is None:
            raise unknown_base(name, list(known))
        return base

    def name_of(self, base: str) -> str:
        """Returns the name of `base` that is shown: its first alias if it has one."""
        return next((alias for alias, name in self._aliases.items() if name == base), base)

    async def _capabilities(self) -> admin_pb2.GetCapabilitiesResponse:
        # What is served is the same for every caller; the answer's tenant is not used.
        return await self._cache.get("", lambda: self._calls.admin.GetCapabilities(admin_pb2.GetCapabilitiesRequest()))


def unknown_base(name: str, known: list[str]) -> TreadleError:
    """Returns the error for a base that is not served."""
    shown = ", ".join(known[:20]) or "none"
    return make_error("UNKNOWN_BASE", f"base_model {name[:100]!r} is not served here; there is: {shown}")
