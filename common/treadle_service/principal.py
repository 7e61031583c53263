"""Who is calling: a tenant and what it may do. Knows nothing of how keys are stored or checked."""

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final

from treadle.errors import make_error

INTERNAL_SCOPE: Final = "internal"
SCOPES: Final = frozenset({"train", "sample", "admin"})


@dataclass(frozen=True, slots=True)
class Principal:
    """An authenticated caller."""

    tenant: str
    scopes: frozenset[str]
    key_id: str = ""

    def require(self, scope: str) -> None:
        """Raises PERMISSION_DENIED unless the principal has `scope`."""
        if scope not in self.scopes:
            raise make_error("PERMISSION_DENIED", f"this call needs a key with the scope {scope!r}")


_current: ContextVar[Principal | None] = ContextVar("treadle_principal", default=None)


def current_principal() -> Principal:
    """Returns the caller of the RPC that runs in this task; raises UNAUTHENTICATED outside of one."""
    principal = _current.get()
    if principal is None:
        raise make_error("UNAUTHENTICATED", "this call carries no identity; send `authorization: Bearer <key>`")
    return principal


def set_principal(principal: Principal) -> None:
    """Makes `principal` the caller for the rest of this task."""
    _current.set(principal)
