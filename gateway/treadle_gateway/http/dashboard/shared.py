"""What all pages stand on: the gateway, the door, what is read, and the jobs. Set when the site is served."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from nicegui import ui
from starlette.requests import Request

from treadle.errors import AccessError, TreadleError
from treadle_gateway.http.dashboard.door import Door, Viewer
from treadle_gateway.http.dashboard.jobs import Jobs
from treadle_gateway.http.dashboard.reading import Reader
from treadle_gateway.http.faces import HttpGateway


@dataclass(frozen=True, slots=True)
class Shared:
    """The parts."""

    gateway: HttpGateway
    door: Door
    reader: Reader
    jobs: Jobs


_serving: list[Shared] = []


def serve(parts: Shared | None) -> None:
    """Makes the pages those of a gateway, or nobody's."""
    _serving[:] = [] if parts is None else [parts]


def parts() -> Shared:
    """Returns what the pages stand on."""
    return _serving[0]


def viewer_of(request: Request) -> Viewer:
    """Returns whom a page is made for; the door has let nobody else in."""
    viewer: Viewer | None = request.state.viewer
    if viewer is None:
        raise LookupError("a page without a viewer")
    return viewer


async def live(viewer: Viewer, seconds: float, refresh: Callable[[], Awaitable[None]]) -> None:
    """Calls `refresh` now, and every so many seconds while the page is open and its key holds.

    Trouble is shown in a line on top of the page, until it has passed.
    """
    trouble = ui.label().classes("trouble")
    trouble.set_visibility(False)
    client, busy = ui.context.client, False

    async def again() -> None:
        nonlocal busy
        if busy or not client.has_socket_connection:
            return
        busy = True
        try:
            await parts().door.identify(viewer.secret)
            await refresh()
        except AccessError:
            timer.deactivate()
            ui.navigate.to("/login")
        except TreadleError as error:
            trouble.set_text(error.message)
            trouble.set_visibility(True)
        else:
            trouble.set_visibility(False)
        finally:
            busy = False

    try:
        await refresh()
    except TreadleError as error:
        trouble.set_text(error.message)
        trouble.set_visibility(True)
    timer = ui.timer(seconds, again, immediate=False)
