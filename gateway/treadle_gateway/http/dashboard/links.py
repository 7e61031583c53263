"""What is fetched by a link instead of shown on a page: logging in and out, archives, traces."""

import json
from collections.abc import AsyncIterator

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from treadle.errors import AccessError, NotFoundError, TreadleError
from treadle.names import parse_adapter
from treadle.timeline import chrome_trace, timelines_from
from treadle.v1 import adapters_pb2
from treadle_gateway.http.dashboard import shared
from treadle_gateway.http.dashboard.archive import zipped
from treadle_gateway.http.dashboard.door import forget, remember
from treadle_gateway.http.dashboard.page_login import login_page
from treadle_gateway.http.faces import status_of
from treadle_service.principal import set_principal

# Longer than any worker remembers.
_TRACE_SECONDS = 3600.0


def add_routes(app: FastAPI) -> None:
    """Adds the routes."""
    app.router.routes += [
        Route("/login", login_page, methods=["GET"]),
        Route("/login", log_in, methods=["POST"]),
        Route("/logout", log_out, methods=["GET"]),
        Route("/download/{name:path}", download, methods=["GET"]),
        Route("/trace.json", trace, methods=["GET"]),
    ]


async def log_in(request: Request) -> Response:
    """Gives a key that holds to the browser, and goes where it wanted to."""
    form = await request.form()
    secret, target = str(form.get("key", "")).strip(), str(form.get("next", "/"))
    if not target.startswith("/") or target.startswith(("//", "/\\")):
        target = "/"
    try:
        viewer = await shared.parts().door.identify(secret)
        refused = "" if viewer.may_look else "scope"
    except AccessError:
        refused = "unknown"
    except TreadleError:
        refused = "away"
    if refused:
        return RedirectResponse(f"/login?refused={refused}", 303)
    response = RedirectResponse(target, 303)
    remember(response, secret, secure=request.url.scheme == "https")
    return response


async def log_out(_: Request) -> Response:
    """Takes the key from the browser."""
    response = RedirectResponse("/login", 303)
    forget(response)
    return response


async def download(request: Request) -> Response:
    """Answers with a saved adapter as a zip archive of its PEFT folder."""
    name = request.path_params["name"].removesuffix(".zip")
    viewer = shared.viewer_of(request)
    calls = shared.parts().gateway.calls
    try:
        parsed = parse_adapter(name)
        set_principal(viewer.acting_for(parsed.tenant))
        if parsed.kind == "revisions":
            await calls.adapters.GetRevision(adapters_pb2.GetRevisionRequest(name=name))
        else:
            await calls.adapters.GetCheckpoint(adapters_pb2.GetCheckpointRequest(name=name))
    except TreadleError as error:
        found = not isinstance(error, NotFoundError)
        return PlainTextResponse(error.message if found else "there is no such adapter of yours", status_of(error))
    folder = f"{parsed.run}-{parsed.adapter}"

    async def content() -> AsyncIterator[bytes]:
        frames = calls.adapters.PullAdapter(adapters_pb2.PullAdapterRequest(name=name))
        async for part in zipped(frames, folder):
            yield part

    headers = {"content-disposition": f'attachment; filename="{folder}.zip"'}
    return StreamingResponse(content(), media_type="application/zip", headers=headers)


async def trace(request: Request) -> Response:
    """Answers with the timeline as a trace for Perfetto."""
    try:
        spans = await shared.parts().reader.spans(shared.viewer_of(request), _TRACE_SECONDS)
    except TreadleError as error:
        return PlainTextResponse(error.message, status_of(error))
    content = json.dumps(chrome_trace(timelines_from(spans)))
    headers = {"content-disposition": 'attachment; filename="treadle-trace.json"'}
    return Response(content, media_type="application/json", headers=headers)
