"""The dashboard as a face of the gateway. NiceGUI is imported when the first browser comes, not before.

Knows nothing of what pages show.
"""

import asyncio
import contextlib
import importlib
from typing import Any, Final
from urllib.parse import parse_qs, quote

from starlette.requests import HTTPConnection
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from treadle_gateway.http.dashboard.door import Door, Viewer
from treadle_gateway.http.faces import PUBLIC, Face, HttpGateway, HttpMount, json_response

ASSETS: Final = "/_nicegui/"
UPLOADS: Final = "/_nicegui/client/"
SOCKET: Final = "/_nicegui_ws/"
LOGIN: Final = "/login"
MAX_PAGES: Final = 200
"""Open pages of one tenant; each is kept in memory."""
_FORM_BYTES: Final = 2**16
_PAGES: Final = ("/runs", "/workers", "/start", "/logout", "/download", "/trace.json")
# Nothing from elsewhere is loaded, and nobody may put the pages into a frame of theirs.
_HEADERS: Final = ((b"x-frame-options", b"DENY"), (b"referrer-policy", b"same-origin"))


def make_face(gateway: HttpGateway) -> Face:
    """Returns the face; it asks for keys itself, since a browser carries them in a cookie."""
    dashboard = Dashboard(gateway)
    mounts = (HttpMount("", dashboard, PUBLIC),) if gateway.settings.dashboard else ()
    return Face("dashboard", "", (), mounts, on_drain=dashboard.close)


class Dashboard:
    """An ASGI application that lets those in who have a key, and shows everybody else where to give one."""

    def __init__(self, gateway: HttpGateway) -> None:
        self._gateway = gateway
        self._door = Door(gateway.authenticator)
        self._site: Any = None  # Any: the module is imported late.
        self._opening = asyncio.Lock()
        self._closing = contextlib.AsyncExitStack()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request or carries one websocket."""
        path: str = scope["path"]
        if not _is_served(path):
            detail = f"{scope.get('method', 'GET')} {path[:200]} is not served here"
            await json_response({"detail": detail, "reason": "NOT_SERVED"}, 404)(scope, receive, send)
            return
        site = await self._open()
        viewer = None if _is_asset(path) else await self._door.viewer(HTTPConnection(scope))
        app = self._way_in(site, path, viewer, scope)
        # The scope's own dictionary may be shared between requests.
        scope["state"] = {**scope.get("state", {}), "viewer": viewer}
        await app(scope, receive, _with_headers(send))

    async def close(self) -> None:
        """Ends managed jobs and open pages."""
        await self._closing.aclose()

    def _way_in(self, site: Any, path: str, viewer: Viewer | None, scope: Scope) -> ASGIApp:
        app: ASGIApp = site.app
        if _is_asset(path) or path.startswith(LOGIN):
            return app
        if viewer is None:
            return _turned_away(scope)
        # A page's socket and uploads are for whom the page was made for.
        if path.startswith(SOCKET):
            client = parse_qs(scope["query_string"].decode()).get("client_id", [""])[0]
            return app if site.belongs_to(viewer, client) else _turned_away(scope)
        if path.startswith(UPLOADS):
            client = path.removeprefix(UPLOADS).partition("/")[0]
            return self._upload(app, scope) if site.belongs_to(viewer, client) else _turned_away(scope)
        if site.count_pages(viewer) >= MAX_PAGES:
            detail = f"{MAX_PAGES} pages of yours are open at this gateway; close some"
            return json_response({"detail": detail, "reason": "QUEUE_FULL"}, 429)
        return app

    def _upload(self, app: ASGIApp, scope: Scope) -> ASGIApp:
        """Lets an upload in whose length is known beforehand and not too much; a form adds a little to its file."""
        limit = self._gateway.settings.max_upload_bytes
        length = HTTPConnection(scope).headers.get("content-length", "")
        if length.isdecimal() and int(length) <= limit + _FORM_BYTES:
            return app
        return json_response({"detail": f"a file has at most {limit} bytes", "reason": "OPERATION_TOO_LARGE"}, 413)

    async def _open(self) -> Any:
        async with self._opening:
            if self._site is None:
                # In a thread: it takes about a second in which others are served.
                site = await asyncio.to_thread(importlib.import_module, "treadle_gateway.http.dashboard.site")
                await self._closing.enter_async_context(site.serving(self._gateway, self._door))
                self._site = site
        return self._site


def _is_served(path: str) -> bool:
    return path in ("/", "/favicon.ico") or path.startswith((ASSETS, SOCKET, LOGIN, *_PAGES))


def _is_asset(path: str) -> bool:
    return path == "/favicon.ico" or (path.startswith(ASSETS) and not path.startswith(UPLOADS))


def _turned_away(scope: Scope) -> ASGIApp:
    if scope["type"] == "websocket":
        return _refuse_socket
    path: str = scope["path"]
    if path.startswith((SOCKET, UPLOADS)):
        return Response("the page's session has ended", 403)
    return RedirectResponse(f"{LOGIN}?next={quote(path)}", 303)


async def _refuse_socket(_: Scope, receive: Receive, send: Send) -> None:
    await receive()
    await send({"type": "websocket.close", "code": 1008})


def _with_headers(send: Send) -> Send:
    async def sending(message: Any) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], *_HEADERS]}
        await send(message)

    return sending
