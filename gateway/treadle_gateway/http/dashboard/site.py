"""The pages as a NiceGUI application, and what they share.

NiceGUI knows one application per process; a gateway is one. Imported late: see face.
"""

import contextlib
from collections.abc import AsyncIterator

from fastapi import FastAPI
from nicegui import Client, ui

from treadle_gateway.http.dashboard import links, page_run, page_runs, page_start, page_workers, shared
from treadle_gateway.http.dashboard.door import Door, Viewer
from treadle_gateway.http.dashboard.jobs import Jobs
from treadle_gateway.http.dashboard.reading import Reader
from treadle_gateway.http.faces import HttpGateway

FAVICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><rect width="32" height="32" rx="7" fill="#1f2a44"/>'
    '<g fill="none" stroke="#7cb7ff" stroke-width="3" stroke-linecap="round"><path d="M6 11h20M6 21h20"/>'
    '<path d="M11 6v20M21 6v20" stroke="#ffc857"/></g></svg>'
)

app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
links.add_routes(app)
ui.run_with(
    app,
    title="Treadle",
    favicon=FAVICON,
    dark=None,
    tailwind=False,
    binding_refresh_interval=None,
    reconnect_timeout=10.0,
    show_welcome_message=False,
)
for _page in (page_runs, page_run, page_workers, page_start):
    _page.register()


@contextlib.asynccontextmanager
async def serving(gateway: HttpGateway, door: Door) -> AsyncIterator[None]:
    """Makes the pages those of a gateway, as long as the context lasts."""
    jobs = Jobs(gateway.settings, gateway.address)
    shared.serve(shared.Shared(gateway, door, Reader(gateway), jobs))
    async with app.router.lifespan_context(app):
        try:
            yield
        finally:
            await jobs.close()
            shared.serve(None)


def belongs_to(viewer: Viewer, client_id: str) -> bool:
    """Tells whether a page was made for this viewer's key."""
    client = Client.instances.get(client_id)
    # Where the page is gone, what its browser hears is to load it again.
    return client is None or _viewer_of(client) == viewer


def count_pages(viewer: Viewer) -> int:
    """Returns how many pages of the viewer's tenant are open."""
    viewers = map(_viewer_of, list(Client.instances.values()))
    return sum(other is not None and other.tenant == viewer.tenant for other in viewers)


def _viewer_of(client: Client) -> Viewer | None:
    viewer: Viewer | None = getattr(client.request.state, "viewer", None)
    return viewer
