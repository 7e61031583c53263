"""Sessions, what the server can do, and what clients report: small answers that need no operation.

A session is a name that its runs carry; there is nothing to keep alive and nothing that ends with it. Knows nothing of
runs and samples.
"""

from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from treadle.errors import make_error
from treadle_gateway.http.faces import json_response
from treadle_gateway.http.models import Models
from treadle_gateway.http.tinker import bodies, ids
from treadle_service.principal import current_principal

# One after the other, so that each chunk is durable when it is answered: see Operations.
_CONFIG: Final[dict[str, Any]] = {
    "parallel_fwdbwd_chunks": False,
    "fwdbwd_max_chunk_bytes_count": 4_000_000,
    "proto_compress_fwdbwd": False,
}
_DYNAMIC_CONFIG: Final[dict[str, Any]] = {"sample_cancel_enabled": True}


class Service:
    """The endpoints about the service itself."""

    def __init__(self, models: Models) -> None:
        self._models = models

    async def healthz(self, _: Request) -> Response:
        """Says that this gateway is up."""
        return json_response({"status": "ok"})

    async def client_config(self, request: Request) -> Response:
        """Says how clients are to behave."""
        await bodies.read(request, bodies.ClientConfig)
        return json_response(_CONFIG)

    async def dynamic_config(self, request: Request) -> Response:
        """Says the same of what may change while they run."""
        await bodies.read(request, bodies.ClientConfig)
        return json_response(_DYNAMIC_CONFIG)

    async def create_session(self, request: Request) -> Response:
        """Draws a session id."""
        await bodies.read(request, bodies.CreateSession)
        return json_response({"type": "create_session", "session_id": ids.new_session()})

    async def session_heartbeat(self, request: Request) -> Response:
        """Hears that a client lives."""
        ids.check_session((await bodies.read(request, bodies.SessionHeartbeat)).session_id)
        return json_response({"type": "session_heartbeat"})

    async def finish_session(self, request: Request) -> Response:
        """Hears that a client is done; its runs stay."""
        ids.check_session(request.path_params["session_id"])
        return Response(status_code=204)

    async def telemetry(self, request: Request) -> Response:
        """Hears what clients report of themselves, and keeps nothing of it."""
        await bodies.read_bytes(request)
        return json_response({"status": "accepted"})

    async def get_server_capabilities(self, _: Request) -> Response:
        """Lists the bases under all their names."""
        models = [
            {
                "model_name": name,
                "max_context_length": base.max_context,
                "trainable": base.trainable,
                "sampleable": base.sampleable,
            }
            for name, base in (await self._models.all()).items()
        ]
        return json_response({"supported_models": models})

    async def whoami(self, _: Request) -> Response:
        """Returns whose key this is."""
        principal = current_principal()
        return json_response(
            {
                "user_urn": f"key:{principal.key_id}",
                "org_urn": f"tenant:{principal.tenant}",
                "api_key_id": principal.key_id,
                "email": None,
            }
        )

    async def create_custom_loss(self, _: Request) -> Response:
        """Refuses: the SDK runs such losses itself when it is told to."""
        raise make_error("UNIMPLEMENTED", "losses of your own run where you are: call forward_backward_custom")
