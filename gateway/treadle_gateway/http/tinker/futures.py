"""retrieve_future and its kin: results of operations and samples, as the SDK reads them.

A poll is held until there is a result, or for half a minute. Knows nothing of how operations and samples are made.
"""

from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from treadle.errors import TreadleError, from_operation_error, make_error
from treadle.names import RunName, parse_adapter
from treadle.v1 import training_pb2
from treadle_gateway.http.faces import json_response, retry_headers
from treadle_gateway.http.tinker import bodies, ids
from treadle_gateway.http.tinker.batches import to_output
from treadle_gateway.http.tinker.operations import Operations
from treadle_gateway.http.tinker.samples import Samples
from treadle_service.principal import current_principal

_HOLD_SECONDS: Final = 28.0
_PROTOBUF: Final = "application/x-protobuf"
# Reasons that are nobody's mistake.
_OURS: Final = frozenset(
    {"INTERNAL", "CHECKSUM_MISMATCH", "OUT_OF_MEMORY", "DIVERGED", "UNIMPLEMENTED", "DEADLINE_EXCEEDED"}
)


class Futures:
    """The endpoints that give results."""

    def __init__(self, operations: Operations, samples: Samples) -> None:
        self._operations, self._samples = operations, samples

    async def retrieve_future(self, request: Request) -> Response:
        """Returns a result, or 408 when it is not there yet; may be asked again."""
        body = await bodies.read(request, bodies.RetrieveFuture)
        try:
            if body.request_id.startswith("o-"):
                return await self._operation(ids.parse_operation_id(body.request_id), body.request_id)
            data = await self._samples.wait(body.request_id, _HOLD_SECONDS)
        except TreadleError as error:
            return _failed(error)
        return _try_again(body.request_id) if data is None else Response(data, media_type=_PROTOBUF)

    async def cancel_future(self, request: Request) -> Response:
        """Ends a sample; an operation that was accepted takes effect."""
        body = await bodies.read(request, bodies.RetrieveFuture)
        self._samples.cancel(body.request_id)
        return Response(status_code=204)

    async def retrieve_futures(self, request: Request) -> Response:
        """Returns which samples of a session have ended since the cursor."""
        body = await bodies.read(request, bodies.RetrieveFutures)
        self._samples.forget(body.retrieved_request_ids)
        seconds = _HOLD_SECONDS if body.timeout is None else min(max(body.timeout, 0.0), _HOLD_SECONDS)
        session = body.target.sampling_session_id
        found, cursor = await self._samples.completed(session, body.prev_cursor, seconds)
        completions: list[dict[str, Any]] = [
            {"state": "failed", "request_id": request_id}
            if size is None
            else {"state": "finished", "request_id": request_id, "response_payload_uncompressed_size": size}
            for request_id, size in found
        ]
        return json_response({"completions": completions, "cursor": cursor})

    async def _operation(self, wanted: ids.OperationId, request_id: str) -> Response:
        result = await self._operations.wait(wanted, _HOLD_SECONDS)
        if result is None:
            return _try_again(request_id)
        if result.HasField("error"):
            return _ended_badly(from_operation_error(result.error))
        run = RunName(current_principal().tenant, wanted.run)
        kind = result.WhichOneof("kind")
        if kind in ("forward", "forward_backward"):
            return Response(to_output(getattr(result, kind).outputs), media_type=_PROTOBUF)
        return json_response(_as_json(result, run, wanted))


def _as_json(result: training_pb2.OperationResult, run: RunName, wanted: ids.OperationId) -> dict[str, Any]:
    model = ids.model_of(run)
    match result.WhichOneof("kind"):
        case "optim_step":
            return {"metrics": dict(result.optim_step.metrics), "type": "optim_step"}
        case "save_state":
            return {"path": ids.path_of(parse_adapter(result.save_state.checkpoint)), "type": "save_weights"}
        case "save_weights_for_sampler":
            revision = parse_adapter(result.save_weights_for_sampler.revision)
            if wanted.sampler_seq is not None:
                sampler = ids.sampler_id(ids.session_of(run), wanted.sampler_seq, str(revision), run.tenant)
                return {"sampling_session_id": sampler, "type": "save_weights_for_sampler"}
            external = revision.adapter.startswith(ids.EXTERNAL_PREFIX)
            kind = "save_weights_external" if external else "save_weights_for_sampler"
            return {"path": ids.path_of(revision), "type": kind}
        case "load_state":
            return {"type": "load_weights", "model_id": model, "path": None}
    return {"type": "create_model", "model_id": model}


def _try_again(request_id: str) -> Response:
    return json_response({"type": "try_again", "request_id": request_id, "queue_state": "active"}, 408)


def _failed(error: TreadleError) -> Response:
    """Returns a failure for good as the SDK reads it; raises what passes, for another poll."""
    if error.retryable:
        raise error
    if error.reason == "RESULT_GONE":
        return json_response({"detail": error.message}, 410, retry_headers(error))
    if error.reason in ("RUN_NOT_FOUND", "BAD_NAME", "PERMISSION_DENIED", "UNAUTHENTICATED"):
        raise error
    if error.reason == "OPERATION_NOT_FOUND":
        error = make_error(error.reason, f"{error.message}; an operation before it never came, so it was dropped")
    return _ended_badly(error)


def _ended_badly(error: TreadleError) -> Response:
    """Returns the failure of an operation: its result, and the same whenever it is asked for."""
    category = "server" if error.reason in _OURS else "user"
    return json_response({"error": error.message, "category": category, "reason": error.reason})
