"""One starlette application from all faces; what no face serves is 404 for everybody.

Knows nothing of sockets.
"""

from collections.abc import Callable, Sequence
from typing import Final

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Mount, Route

from treadle_gateway.authenticator import Authenticator
from treadle_gateway.http import dashboard, openai, tinker
from treadle_gateway.http.faces import Face, HttpGateway, json_response
from treadle_gateway.http.guard import Guard, endpoint_app

MAKERS: Final[Sequence[Callable[[HttpGateway], Face]]] = (tinker.make_face, openai.make_face, dashboard.make_face)


def make_faces(gateway: HttpGateway) -> list[Face]:
    """Returns all faces."""
    return [make(gateway) for make in MAKERS]


def make_app(faces: Sequence[Face], authenticator: Authenticator) -> Starlette:
    """Returns the application that serves the faces."""
    routes = [route for face in faces for route in _routes_of(face, authenticator)]
    # What takes every path leaves the others theirs.
    routes.sort(key=lambda route: isinstance(route, Mount) and not route.path)
    return Starlette(routes=routes, exception_handlers={404: _not_served, 405: _not_served})


def _routes_of(face: Face, authenticator: Authenticator) -> list[BaseRoute]:
    routes: list[BaseRoute] = []
    for route in face.routes:
        guarded = Guard(endpoint_app(route.endpoint), route.scopes, face.on_error, authenticator)
        routes.append(Route(face.prefix + route.path, guarded, methods=[route.method]))
    for mount in face.mounts:
        guarded = Guard(mount.app, mount.scopes, face.on_error, authenticator)
        routes.append(Mount(face.prefix + mount.path, guarded))
    return routes


async def _not_served(request: Request, _: Exception) -> Response:
    detail = f"{request.method} {request.url.path[:200]} is not served here"
    return json_response({"detail": detail, "reason": "NOT_SERVED"}, 404)
