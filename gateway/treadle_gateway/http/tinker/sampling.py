"""Sampling sessions and samples: create_sampling_session, asample and what belongs to them.

Knows nothing of results.
"""

import secrets
from hashlib import sha256
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from treadle.errors import make_error
from treadle.names import is_adapter, parse_adapter
from treadle_gateway.http.faces import json_response
from treadle_gateway.http.models import Models
from treadle_gateway.http.tinker import bodies, ids, sample_bodies
from treadle_gateway.http.tinker.samples import Samples, Wanted
from treadle_gateway.http.tinker.training import Training
from treadle_service.principal import current_principal

_MOST_CLIENTS: Final = 2**31 - 2


class Sampling:
    """The endpoints about samples."""

    def __init__(self, training: Training, samples: Samples, models: Models) -> None:
        self._training, self._samples, self._models = training, samples, models

    async def create_sampling_session(self, request: Request) -> Response:
        """Names what is sampled; what is not there is said here, not at the first sample."""
        body = await bodies.read(request, bodies.CreateSamplingSession)
        model, _ = await self._model(body.base_model, body.model_path)
        tenant = current_principal().tenant
        sampler = ids.sampler_id(body.session_id, body.sampling_session_seq_id, model, tenant)
        return json_response({"type": "create_sampling_session", "sampling_session_id": sampler})

    async def get_sampler(self, request: Request) -> Response:
        """Returns what a sampling session samples from."""
        sampler = request.path_params["sampler_id"]
        model = ids.sampled_model(sampler, current_principal().tenant)
        base, path = model, None
        if is_adapter(model):
            adapter = parse_adapter(model)
            saved = await self._training.saved(adapter)
            base, path = saved.base, ids.path_of(adapter)
        return json_response({"sampler_id": sampler, "base_model": self._models.name_of(base), "model_path": path})

    async def join_sampling_session(self, request: Request) -> Response:
        """Numbers a client of a sampling session; drawn, since no two of them need know of each other."""
        body = await bodies.read(request, bodies.JoinSamplingSession)
        ids.sampled_model(body.sampling_session_id, current_principal().tenant)
        return json_response({"type": "join_sampling_session", "client_counter": 1 + secrets.randbelow(_MOST_CLIENTS)})

    async def asample(self, request: Request) -> Response:
        """Begins a sample."""
        body = await bodies.read(request, bodies.Sample)
        if body.sampling_session_id is not None:
            model = ids.sampled_model(body.sampling_session_id, current_principal().tenant)
            max_context = await self._max_context(model)
        else:
            model, max_context = await self._model(body.base_model, body.model_path)
        place = secrets.token_hex(8) if body.seq_id is None else f"{body.sampling_session_id}/{body.seq_id}"
        wanted = Wanted(sample_bodies.to_request(body, model, max_context), place, body.target_prompt_logprobs)
        request_id = self._samples.start(wanted, body.sampling_session_id or "")
        stem = sha256(request_id.encode()).hexdigest()[:24]
        sequences = [f"q-{stem}-{index}" for index in range(body.num_samples)]
        return json_response({"request_id": request_id, "sample_sequence_ids": sequences})

    async def _model(self, base_model: str | None, model_path: str | None) -> tuple[str, int]:
        """Returns a base or revision by its name here, and the longest context."""
        if model_path is not None:
            adapter = ids.parse_path(model_path, current_principal().tenant)
            if adapter.kind != "revisions":
                raise make_error("BAD_NAME", f"{model_path} is for training; sample from a path with /sampler_weights/")
            saved = await self._training.saved(adapter)
            return saved.name, (await self._models.find(saved.base)).max_context
        if base_model is None:
            raise make_error("BAD_VALUE", "base_model is required, or model_path")
        base = await self._models.find(base_model)
        return base.name, base.max_context

    async def _max_context(self, model: str) -> int:
        """Returns the longest context of what a session samples; 0, which checks nothing, for an adapter."""
        return 0 if is_adapter(model) else (await self._models.find(model)).max_context
