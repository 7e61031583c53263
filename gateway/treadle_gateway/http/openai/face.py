"""The routes of the OpenAI face. Knows nothing of how each is answered."""

from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from treadle_gateway.http.faces import Face, HttpGateway, HttpRoute, json_response
from treadle_gateway.http.openai.chat import ChatCompletions
from treadle_gateway.http.openai.completions import Completions
from treadle_gateway.http.openai.models import Models
from treadle_gateway.http.openai.problems import respond
from treadle_gateway.http.openai.stored import Stored
from treadle_gateway.scopes import READ, SAMPLE, TRAIN
from treadle_gateway.text.tokenizers import Tokenizers

PREFIX: Final = "/v1"


def make_face(gateway: HttpGateway) -> Face:
    """Returns the face."""
    calls = gateway.calls
    models = Models(calls, gateway.directory, gateway.settings.model_aliases)
    tokenizers = Tokenizers(calls)
    stored = Stored(calls, models)
    chat = ChatCompletions(calls, models, tokenizers, stored)
    completions = Completions(calls, models, tokenizers)
    shown = _ModelRoutes(models)
    routes = [
        HttpRoute("GET", "/models", shown.list, READ),
        HttpRoute("GET", "/models/{model:path}", shown.retrieve, READ),
        HttpRoute("DELETE", "/models/{model:path}", shown.delete, TRAIN),
        HttpRoute("POST", "/completions", completions.create, SAMPLE),
        HttpRoute("POST", "/chat/completions", chat.create, SAMPLE),
        HttpRoute("GET", "/chat/completions", stored.list, TRAIN),
        HttpRoute("GET", "/chat/completions/{completion}", stored.retrieve, TRAIN),
        HttpRoute("POST", "/chat/completions/{completion}", stored.update, TRAIN),
        HttpRoute("DELETE", "/chat/completions/{completion}", stored.delete, TRAIN),
        HttpRoute("GET", "/chat/completions/{completion}/messages", stored.messages, TRAIN),
    ]
    return Face("openai", PREFIX, routes, on_error=respond)


class _ModelRoutes:
    def __init__(self, models: Models) -> None:
        self._models = models

    async def list(self, _: Request) -> Response:
        """GET /v1/models."""
        return json_response({"object": "list", "data": await self._models.list()})

    async def retrieve(self, request: Request) -> Response:
        """GET /v1/models/{model}."""
        return json_response(await self._models.describe(request.path_params["model"]))

    async def delete(self, request: Request) -> Response:
        """DELETE /v1/models/{model}: a saved revision."""
        deleted = await self._models.delete(request.path_params["model"])
        return json_response({"id": deleted, "object": "model", "deleted": True})
