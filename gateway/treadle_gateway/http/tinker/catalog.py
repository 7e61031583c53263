"""What there is: training runs, their checkpoints, sessions, usage; and what may be done with a checkpoint.

Knows nothing of operations.
"""

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from starlette.requests import Request
from starlette.responses import Response

from treadle.errors import make_error
from treadle.names import AdapterName, parse_adapter, parse_run
from treadle.v1 import adapters_pb2, admin_pb2, training_pb2, types_pb2
from treadle_gateway.http.faces import json_response
from treadle_gateway.http.models import Models
from treadle_gateway.http.tinker import bodies, ids
from treadle_gateway.http.tinker.training import BASE_KEY, Training
from treadle_gateway.local_calls import LocalCalls
from treadle_service.principal import current_principal

_PAGE: Final = 500
_MOST: Final = 10_000
"""Rows that one listing looks through."""
_RANK: Final = 32
_TYPES: Final = {"weights": "training", "sampler_weights": "sampler", "external_weights": "external"}


class Catalog:
    """The endpoints that list, show and remove."""

    def __init__(self, calls: LocalCalls, training: Training, models: Models) -> None:
        self._calls, self._training, self._models = calls, training, models

    async def get_info(self, request: Request) -> Response:
        """Says what a model is."""
        body = await bodies.read(request, bodies.GetInfo)
        run = await self._run(body.model_id)
        base = await self._models.find(run.base)
        name = run.metadata.get(BASE_KEY) or self._models.name_of(run.base)
        data = {"arch": "decoder", "model_name": name, "tokenizer_id": base.tokenizer or name}
        return json_response(
            {
                "type": "get_info",
                "model_data": data,
                "model_id": body.model_id,
                "is_lora": True,
                "lora_rank": run.lora.rank or _RANK,
                "model_name": name,
            }
        )

    async def weights_info(self, request: Request) -> Response:
        """Says what saved weights are of."""
        body = await bodies.read(request, bodies.WeightsInfo)
        saved = await self._training.saved(ids.parse_path(body.tinker_path, current_principal().tenant))
        return json_response({"base_model": self._models.name_of(saved.base), "is_lora": True, **_shape(saved.lora)})

    async def list_training_runs(self, request: Request) -> Response:
        """Lists the tenant's runs, newest first."""
        runs = await self._runs()
        shown, cursor = _page(runs, request)
        return json_response({"training_runs": [await self._training_run(run) for run in shown], "cursor": cursor})

    async def get_training_run(self, request: Request) -> Response:
        """Shows one run."""
        return json_response(await self._training_run(await self._run(request.path_params["run_id"])))

    async def list_run_checkpoints(self, request: Request) -> Response:
        """Lists what was saved from a run; unnamed revisions, which pass, are left out."""
        run = ids.run_of(request.path_params["run_id"], current_principal().tenant)
        return json_response({"checkpoints": [_checkpoint(a) for a in await self._saved(str(run))], "cursor": None})

    async def list_checkpoints(self, request: Request) -> Response:
        """Lists what was saved from all runs."""
        shown, cursor = _page(await self._saved(""), request)
        return json_response({"checkpoints": [_checkpoint(adapter) for adapter in shown], "cursor": cursor})

    async def delete_checkpoint(self, request: Request) -> Response:
        """Deletes saved weights."""
        name = self._named(request)
        if name.kind == "checkpoints":
            await self._calls.adapters.DeleteCheckpoint(adapters_pb2.DeleteCheckpointRequest(name=str(name)))
        else:
            await self._calls.adapters.DeleteRevision(adapters_pb2.DeleteRevisionRequest(name=str(name)))
        return Response(status_code=204)

    async def set_ttl(self, request: Request) -> Response:
        """Sets when saved weights go."""
        body = await bodies.read(request, bodies.Ttl)
        ttl = None if body.ttl_seconds is None else Duration(seconds=body.ttl_seconds)
        name = str(self._named(request))
        await self._calls.adapters.SetAdapterTtl(adapters_pb2.SetAdapterTtlRequest(name=name, ttl=ttl))
        return Response(status_code=204)

    async def publish(self, request: Request) -> Response:
        """Lets every tenant read saved weights."""
        await self._set_public(request, public=True)
        return Response(status_code=204)

    async def unpublish(self, request: Request) -> Response:
        """Keeps saved weights to their owner again."""
        await self._set_public(request, public=False)
        return Response(status_code=204)

    async def _set_public(self, request: Request, *, public: bool) -> None:
        wanted = adapters_pb2.SetAdapterPublicRequest(name=str(self._named(request)), public=public)
        await self._calls.adapters.SetAdapterPublic(wanted)

    async def list_sessions(self, request: Request) -> Response:
        """Lists the sessions that made runs, newest first."""
        found = dict.fromkeys(filter(None, (ids.session_of(parse_run(run.name)) for run in await self._runs())))
        shown, _ = _page(list(found), request)
        return json_response({"sessions": shown})

    async def get_session(self, request: Request) -> Response:
        """Shows the runs of a session."""
        session = ids.check_session(request.path_params["session_id"])
        names = [parse_run(run.name) for run in await self._runs()]
        models = [ids.model_of(name) for name in names if ids.session_of(name) == session]
        return json_response({"training_run_ids": models, "sampler_ids": []})

    async def usage_events(self, request: Request) -> Response:
        """Returns what the tenant used, by run, over the days that were asked for."""
        since, until = (_day(request, name) for name in ("starting_on", "ending_before"))
        events: list[dict[str, Any]] = []
        token = ""
        while True:
            wanted = admin_pb2.GetUsageRequest(page_size=_PAGE, page_token=token)
            wanted.since.CopyFrom(since)
            wanted.until.CopyFrom(until)
            answer = await self._calls.admin.GetUsage(wanted)
            bucket = {"bucket_start": _time(since), "bucket_end": _time(until)}
            for used in answer.runs:
                session = ids.session_of(parse_run(used.run)) if used.run else ""
                where = {**bucket, "session_id": session or None}
                events += [{**where, "event_info": info} for info in _used(used.usage)]
            token = answer.next_page_token
            if not token:
                return json_response({"data": events, "events": events, "sessions": {}})

    async def storage_usage(self, _: Request) -> Response:
        """Returns what the tenant stores now."""
        saved = await self._saved("")
        size = sum(file.size for adapter in saved for file in adapter.files)
        item = {"checkpoint_count": len(saved), "size_bytes": size, "size_gigabytes": size / 1e9}
        return json_response({"data": [item]})

    async def _run(self, model: str) -> training_pb2.Run:
        name = ids.run_of(model, current_principal().tenant)
        return (await self._calls.training.GetRun(training_pb2.GetRunRequest(name=str(name)))).run

    async def _runs(self) -> list[training_pb2.Run]:
        found: list[training_pb2.Run] = []
        token = ""
        while len(found) < _MOST:
            page = await self._calls.training.ListRuns(training_pb2.ListRunsRequest(page_size=_PAGE, page_token=token))
            found += page.runs
            token = page.next_page_token
            if not token:
                break
        return found

    async def _saved(self, run: str) -> list[adapters_pb2.Adapter]:
        """Returns checkpoints and named revisions, newest first."""
        found: list[adapters_pb2.Adapter] = []
        token = ""
        while len(found) < _MOST:
            page = await self._calls.adapters.ListCheckpoints(
                adapters_pb2.ListCheckpointsRequest(run=run, page_size=_PAGE, page_token=token)
            )
            found += page.checkpoints
            token = page.next_page_token
            if not token:
                break
        while len(found) < 2 * _MOST:
            revisions = await self._calls.adapters.ListRevisions(
                adapters_pb2.ListRevisionsRequest(run=run, page_size=_PAGE, page_token=token)
            )
            found += [revision for revision in revisions.revisions if not revision.unnamed]
            token = revisions.next_page_token
            if not token:
                break
        return sorted(found, key=lambda adapter: adapter.created.ToNanoseconds(), reverse=True)

    async def _training_run(self, run: training_pb2.Run) -> dict[str, Any]:
        saved = [_checkpoint(adapter) for adapter in await self._saved(run.name)]
        newest = {kind: next((c for c in saved if c["checkpoint_type"] == kind), None) for kind in _TYPES.values()}
        last = run.latest.time if run.HasField("latest") else run.created
        return {
            "training_run_id": ids.model_of(parse_run(run.name)),
            "base_model": run.metadata.get(BASE_KEY) or self._models.name_of(run.base),
            "model_owner": parse_run(run.name).tenant,
            "is_lora": True,
            "corrupted": run.state == training_pb2.RUN_STATE_DIVERGED,
            "lora_rank": run.lora.rank or _RANK,
            "last_request_time": _time(last),
            "last_checkpoint": newest["training"],
            "last_sampler_checkpoint": newest["sampler"],
            "user_metadata": {key: value for key, value in run.metadata.items() if key != BASE_KEY} or None,
        }

    def _named(self, request: Request) -> AdapterName:
        part = request.path_params
        return ids.adapter_of(part["run_id"], part["kind"], part["name"], current_principal().tenant)


def _checkpoint(adapter: adapters_pb2.Adapter) -> dict[str, Any]:
    name = parse_adapter(adapter.name)
    checkpoint = ids.checkpoint_of(name)
    return {
        "checkpoint_id": checkpoint,
        "checkpoint_type": _TYPES[checkpoint.partition("/")[0]],
        "time": _time(adapter.created),
        "tinker_path": ids.path_of(name),
        "size_bytes": sum(file.size for file in adapter.files),
        "public": adapter.public,
        "user_metadata": dict(adapter.metadata) or None,
        "expires_at": _time(adapter.expires) if adapter.HasField("expires") else None,
    }


def _shape(lora: types_pb2.LoraConfig) -> dict[str, Any]:
    return {
        "lora_rank": lora.rank or _RANK,
        "train_unembed": not lora.skip_unembed,
        "train_mlp": not lora.skip_mlp,
        "train_attn": not lora.skip_attn,
    }


def _used(usage: admin_pb2.Usage) -> Iterable[dict[str, Any]]:
    if usage.training_tokens:
        yield {"type": "training", "token_count": usage.training_tokens}
    if usage.prompt_tokens:
        yield {"type": "sampling_prefill", "cached": False, "token_count": usage.prompt_tokens}
    if usage.sampled_tokens:
        yield {"type": "sampling_sample", "token_count": usage.sampled_tokens}


def _page(rows: list[Any], request: Request) -> tuple[list[Any], dict[str, int]]:
    """Returns the rows that `limit` and `offset` ask for; Any: rows of any kind."""
    limit, offset = (_number(request, name, default) for name, default in (("limit", 20), ("offset", 0)))
    return rows[offset : offset + limit], {"offset": offset, "limit": limit, "total_count": len(rows)}


def _number(request: Request, name: str, default: int) -> int:
    text = request.query_params.get(name, str(default))
    if not (text.isascii() and text.isdigit()) or len(text) > 9:
        raise make_error("BAD_VALUE", f"{name} is a number of rows, not {text[:40]!r}")
    return int(text)


def _day(request: Request, name: str) -> Timestamp:
    text = request.query_params.get(name, "")
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise make_error("BAD_VALUE", f"{name} is a time as 2026-11-28T00:00:00Z, not {text[:40]!r}") from error
    stamp = Timestamp()
    stamp.FromDatetime(moment.astimezone(UTC) - (timedelta(microseconds=1) if name == "ending_before" else timedelta()))
    return stamp


def _time(stamp: Timestamp) -> str:
    return stamp.ToDatetime(tzinfo=UTC).isoformat()
