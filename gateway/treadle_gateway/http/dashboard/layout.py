"""What all pages look like: header, width, cards, colours of light and dark.

Knows no page.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from nicegui import ui
from starlette.requests import Request

from treadle_gateway.http.dashboard.door import Viewer
from treadle_gateway.http.dashboard.look import CSS, MARK

_NAVIGATION: Final = (("Runs", "/"), ("Workers", "/workers"), ("Start a run", "/start"))
_SHADES: Final = {"": None, "dark": True, "light": False}
_NEXT_SHADE: Final = {"": "dark", "dark": "light", "light": ""}
_SHADE_ICONS: Final = {"": "brightness_auto", "dark": "dark_mode", "light": "light_mode"}


def shade_of(request: Request) -> str:
    """Returns what the viewer chose: dark, light, or empty for what the system says."""
    shade = request.cookies.get("treadle_shade", "")
    return shade if shade in _SHADES else ""


@contextmanager
def page(request: Request, viewer: Viewer, here: str = "") -> Iterator[None]:
    """Makes the frame of a page; what is made inside is its content."""
    ui.add_css(CSS)
    shade = shade_of(request)
    ui.dark_mode(_SHADES[shade])
    ui.colors(primary="#3b82f6")
    _header(viewer, here, shade)
    with ui.element("main").classes("page"):
        yield


@contextmanager
def card(title: str = "") -> Iterator[None]:
    """Makes a card."""
    with ui.element("section").classes("card"):
        if title:
            heading(title)
        yield


def heading(text: str) -> None:
    """Makes the heading of a card."""
    with ui.element("h3"):
        ui.label(text)


def fact(name: str, value: str) -> ui.label:
    """Makes a small name above a value; returns the value's label."""
    with ui.element("div").classes("fact"):
        ui.label(name).classes("k")
        return ui.label(value).classes("v")


def empty(sentence: str, hint: str = "") -> None:
    """Makes what is shown where there is nothing yet."""
    with ui.element("div").classes("empty"):
        ui.label(sentence)
        if hint:
            ui.label(hint).classes("faint")


def _header(viewer: Viewer, here: str, shade: str) -> None:
    with ui.header().classes("bar"), ui.element("div").classes("inner"):
        with ui.link(target="/").classes("brand"):
            ui.html(MARK, sanitize=False)
            ui.label("Treadle")
        for name, target in _NAVIGATION:
            ui.link(name, target).classes("nav" + (" here" if name == here else ""))
        ui.element("div").classes("spacer")
        is_named_so = viewer.tenant == "admin" or not viewer.is_admin
        ui.label(viewer.tenant if is_named_so else f"{viewer.tenant} (admin)").classes("tenant")
        change = f"document.cookie = 'treadle_shade={_NEXT_SHADE[shade]}; path=/; max-age=31536000'; location.reload()"
        ui.button(icon=_SHADE_ICONS[shade]).props("flat round dense color=grey aria-label='light or dark'").on(
            "click", js_handler=f"() => {{ {change} }}"
        )
        with ui.link(target="/logout").classes("nav"):
            ui.label("Log out")


def number(value: float) -> str:
    """Returns a count as people read it: 950, 12.3k, 4.56M."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.4g}"


def ago(seconds: float) -> str:
    """Returns how long ago something was."""
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return "just now" if seconds < 5 else f"{seconds:.0f} s ago"
