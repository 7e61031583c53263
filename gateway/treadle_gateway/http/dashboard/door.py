"""Who looks at the dashboard: the key in a browser's cookie, checked again as long as a page is open.

The cookie is the whole session: nothing is kept here, so any gateway, and this one after a restart, takes it. Scripts
cannot read it and other sites cannot send it. Knows nothing of pages.
"""

from dataclasses import dataclass, field
from typing import Final

from starlette.requests import HTTPConnection
from starlette.responses import Response

from treadle.errors import AccessError, make_error
from treadle.names import parse_run
from treadle_gateway.authenticator import Authenticator
from treadle_service.principal import Principal

COOKIE: Final = "treadle_key"
COOKIE_SECONDS: Final = 30 * 24 * 3600
_OWNER_SCOPES: Final = frozenset({"train", "sample"})


@dataclass(frozen=True, slots=True)
class Viewer:
    """A browser's user."""

    secret: str = field(repr=False)
    principal: Principal

    @property
    def tenant(self) -> str:
        """The tenant of the key."""
        return self.principal.tenant

    @property
    def is_admin(self) -> bool:
        """Whether all tenants' runs are shown."""
        return "admin" in self.principal.scopes

    @property
    def may_look(self) -> bool:
        """Whether the key may see runs at all; one that may only sample may not."""
        return not self.principal.scopes.isdisjoint({"train", "admin"})

    def acting_for(self, tenant: str) -> Principal:
        """Returns as whom calls about a tenant's things are made; administrators look with its owner's eyes.

        Raises RUN_NOT_FOUND for another tenant's.
        """
        if self.is_admin:
            return Principal(tenant, self.principal.scopes | _OWNER_SCOPES, self.principal.key_id)
        if tenant != self.tenant:
            raise make_error("RUN_NOT_FOUND", "there is no such run of yours")
        return self.principal

    def acting_for_run(self, run: str) -> Principal:
        """The same for the tenant that a run's or adapter's name begins with; raises BAD_NAME."""
        return self.acting_for(parse_run("/".join(run.split("/")[:4])).tenant)


class Door:
    """From a request to a viewer."""

    def __init__(self, authenticator: Authenticator) -> None:
        self._authenticator = authenticator

    async def viewer(self, connection: HTTPConnection) -> Viewer | None:
        """Returns whose browser it is; None without a key that holds."""
        secret = connection.cookies.get(COOKIE, "")
        if not secret:
            return None
        try:
            viewer = await self.identify(secret)
        except AccessError:
            return None
        return viewer if viewer.may_look else None

    async def identify(self, secret: str) -> Viewer:
        """Returns whose key it is; raises UNAUTHENTICATED or UNAVAILABLE."""
        return Viewer(secret, await self._authenticator.identify(secret))


def remember(response: Response, secret: str, *, secure: bool) -> None:
    """Gives the key to the browser to keep."""
    response.set_cookie(COOKIE, secret, max_age=COOKIE_SECONDS, path="/", secure=secure, httponly=True, samesite="lax")


def forget(response: Response) -> None:
    """Takes the key from the browser."""
    response.delete_cookie(COOKIE, path="/", httponly=True, samesite="lax")
