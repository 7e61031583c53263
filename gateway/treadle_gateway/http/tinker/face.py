"""The routes of the Tinker face. Knows nothing of how each is answered."""

from starlette.requests import Request
from starlette.responses import Response

from treadle_gateway.http.faces import PUBLIC, Face, HttpGateway, HttpRoute, json_response

PREFIX = "/api/v1"


def make_face(_: HttpGateway) -> Face:
    """Returns the face."""
    return Face("tinker", PREFIX, [HttpRoute("GET", "/healthz", healthz, PUBLIC)])


async def healthz(_: Request) -> Response:
    """Says that this gateway is up."""
    return json_response({"status": "ok"})
