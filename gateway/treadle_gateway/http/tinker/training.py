"""Making models and training them: create_model, load_weights, forward_backward, optim_step, the saves.

Each becomes one operation of a run. What cannot be translated becomes an operation that fails with the reason, so that
no gap is left in the run's order. Knows nothing of results.
"""

import asyncio
import contextlib
import secrets
from collections.abc import Mapping
from typing import Any, Final

import orjson
import zstandard
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from starlette.requests import Request
from starlette.responses import Response

from treadle.errors import NotFoundError, TreadleError, make_error, to_operation_error
from treadle.internal.v1 import tinker_pb2
from treadle.names import AdapterName, RunName, parse_adapter
from treadle.v1 import adapters_pb2, training_pb2, types_pb2
from treadle_gateway.http.faces import json_response
from treadle_gateway.http.models import Models
from treadle_gateway.http.tinker import bodies, ids
from treadle_gateway.http.tinker.batches import loss_config, to_batch
from treadle_gateway.http.tinker.operations import SEQ_SHIFT, Operations
from treadle_gateway.local_calls import LocalCalls
from treadle_service.principal import current_principal

BASE_KEY: Final = "tinker.base_model"
"""Metadata of a run: the name by which its maker called the base."""
_MAX_PACKED_BYTES: Final = 4 * 2**20 - 2**16
_ASIDE_BYTES: Final = 2**18
_FIRST_SEQ: Final = 1


class Training:
    """The endpoints that make operations."""

    def __init__(self, calls: LocalCalls, operations: Operations, models: Models) -> None:
        self._calls, self._operations, self._models = calls, operations, models

    async def create_model(self, request: Request) -> Response:
        """Makes a run; its first operation shows that a trainer has it."""
        body = await bodies.read(request, bodies.CreateModel)
        _check_optimizer(body.optimizer_config)
        base = await self._models.find(body.base_model)
        shape = _lora(body.lora_config or bodies.Lora(rank=32))
        model = ids.model_id(body.session_id, body.model_seq_id)
        run = await self._create(model, base.name, shape, body.base_model, body.user_metadata)
        barrier = training_pb2.Operation(seq=_FIRST_SEQ, barrier=training_pb2.Barrier())
        return await self._submit(run, barrier)

    async def load_weights(self, request: Request) -> Response:
        """Makes a run whose first operation loads saved weights, or loads them into one that there is."""
        body = await bodies.read(request, bodies.LoadWeights)
        if body.weights_access_token is not None:
            raise make_error("BAD_VALUE", "weights_access_token: weights of other accounts cannot be read here")
        if body.optimizer_config is not None:
            _check_optimizer(body.optimizer_config)
        tenant = current_principal().tenant
        source = ids.parse_path(body.path, tenant)
        load = training_pb2.LoadState(adapter=str(source), with_optimizer=body.optimizer)
        if body.model_id is not None and body.seq_id is not None:
            run = ids.run_of(body.model_id, tenant)
            # What is not there becomes an operation that fails.
            with contextlib.suppress(NotFoundError):
                load.adapter = (await self.saved(source)).name
            return await self._submit(run, training_pb2.Operation(seq=body.seq_id + SEQ_SHIFT, load_state=load))
        if body.session_id is None or body.model_seq_id is None:
            raise make_error("BAD_VALUE", "load_weights takes session_id and model_seq_id, or model_id and seq_id")
        if body.optimizer and source.kind != "checkpoints":
            raise make_error("NO_OPTIMIZER_STATE", f"{body.path} has no optimizer state; load a path with /weights/")
        saved = await self.saved(source)
        load.adapter = saved.name
        base = await self._base_of_load(body.base_model, saved)
        model = ids.model_id(body.session_id, body.model_seq_id)
        run = await self._create(model, saved.base, saved.lora, base, body.user_metadata)
        return await self._submit(run, training_pb2.Operation(seq=_FIRST_SEQ, load_state=load))

    async def forward_backward(self, request: Request) -> Response:
        """Adds a batch's gradient, or computes its log-probs alone."""
        data = await bodies.read_bytes(request)
        if request.headers.get("content-encoding", "") == "zstd":
            data = await asyncio.to_thread(_unpacked, data)
        wanted = _parsed(data)
        operation = training_pb2.Operation(seq=wanted.seq_id + SEQ_SHIFT)
        body = operation.forward if wanted.forward_only else operation.forward_backward
        body.SetInParent()
        try:
            body.loss_fn.CopyFrom(_loss(wanted))
            work = to_batch(wanted.data) if len(data) < _ASIDE_BYTES else await asyncio.to_thread(to_batch, wanted.data)
            if work.ByteSize() > _MAX_PACKED_BYTES:
                raise make_error(
                    "OPERATION_TOO_LARGE",
                    f"a chunk has {work.ByteSize()} bytes, at most {_MAX_PACKED_BYTES} are taken: send fewer or "
                    "shorter sequences at once",
                )
            body.batch.packed.CopyFrom(work)
        except TreadleError as error:
            body.ClearField("batch")
            operation.refused.CopyFrom(to_operation_error(error))
        return await self._submit(ids.run_of(wanted.model_id, current_principal().tenant), operation)

    async def optim_step(self, request: Request) -> Response:
        """Takes a step."""
        body = await bodies.read(request, bodies.OptimStep)
        operation = training_pb2.Operation(seq=body.seq_id + SEQ_SHIFT)
        adam = body.adam_params or bodies.Adam()
        operation.optim_step.adam.CopyFrom(types_pb2.AdamParams(**adam.model_dump(exclude={"type"})))
        if body.optimizer_params is not None:
            kind = str(body.optimizer_params.get("type", "another optimizer"))[:40]
            _refuse(operation, "BAD_OPERATION", f"{kind} is not an optimizer of this service; use AdamParams")
        return await self._submit(ids.run_of(body.model_id, current_principal().tenant), operation)

    async def save_weights(self, request: Request) -> Response:
        """Saves weights and optimizer state."""
        body = await bodies.read(request, bodies.SaveWeights)
        save = training_pb2.SaveState(
            checkpoint_id=body.path or "",
            ttl=_ttl(body.ttl_seconds),
            overwrite=body.overwrite,
            metadata=body.user_metadata or {},
        )
        operation = training_pb2.Operation(seq=body.seq_id + SEQ_SHIFT, save_state=save)
        return await self._submit(ids.run_of(body.model_id, current_principal().tenant), operation)

    async def save_weights_for_sampler(self, request: Request) -> Response:
        """Publishes weights under a name, or for a sampling session."""
        body = await bodies.read(request, bodies.SaveWeightsForSampler)
        save = training_pb2.SaveWeightsForSampler(
            revision_id=body.path or "", ttl=_ttl(body.ttl_seconds), metadata=body.user_metadata or {}
        )
        operation = training_pb2.Operation(seq=body.seq_id + SEQ_SHIFT, save_weights_for_sampler=save)
        if body.kind != "snapshot":
            _refuse(operation, "BAD_OPERATION", f"kind {body.kind[:40]!r} is not served here; publish a snapshot")
        elif (body.path or "").startswith(ids.EXTERNAL_PREFIX):
            _refuse(
                operation, "BAD_NAME", f"names that begin with {ids.EXTERNAL_PREFIX!r} are those of external weights"
            )
        run = ids.run_of(body.model_id, current_principal().tenant)
        return await self._submit(run, operation, None if body.path else body.sampling_session_seq_id)

    async def save_weights_external(self, request: Request) -> Response:
        """Publishes weights for download, as the files that PEFT reads."""
        body = await bodies.read(request, bodies.SaveWeightsExternal)
        save = training_pb2.SaveWeightsForSampler(
            revision_id=ids.EXTERNAL_PREFIX + body.path, ttl=_ttl(body.ttl_seconds)
        )
        operation = training_pb2.Operation(seq=body.seq_id + SEQ_SHIFT, save_weights_for_sampler=save)
        if body.age_encryption_recipients:
            _refuse(operation, "BAD_OPERATION", "age_encryption_recipients: files are not encrypted here; leave it out")
        return await self._submit(ids.run_of(body.model_id, current_principal().tenant), operation)

    async def saved(self, name: AdapterName) -> adapters_pb2.Adapter:
        """Returns a saved adapter of the caller, or a public one whose path is the same; ADAPTER_NOT_FOUND.

        Paths name no tenant; one that was found has its owner's in its name.
        """
        wanted = name.of_any_tenant if name.tenant == current_principal().tenant else str(name)
        if name.kind == "checkpoints":
            found = await self._calls.adapters.GetCheckpoint(adapters_pb2.GetCheckpointRequest(name=wanted))
            return found.checkpoint
        return (await self._calls.adapters.GetRevision(adapters_pb2.GetRevisionRequest(name=wanted))).revision

    async def copy_weights(self, request: Request) -> Response:
        """Saves weights once more under a run of their own."""
        body = await bodies.read(request, bodies.CopyWeights)
        source = ids.parse_path(body.source_path, current_principal().tenant)
        saved = await self.saved(source)
        session = body.session_id or ids.new_session()
        model = ids.model_id(session, body.model_seq_id or 0)
        run = await self._create(model, saved.base, saved.lora, self._models.name_of(saved.base), None)
        copy = adapters_pb2.CopyAdapterRequest(source=saved.name, run=str(run), ttl=_ttl(body.ttl_seconds))
        made = await self._calls.adapters.CopyAdapter(copy)
        return json_response({"tinker_path": ids.path_of(parse_adapter(made.adapter.name))})

    async def _create(
        self, model: str, base: str, lora: types_pb2.LoraConfig, called: str, metadata: Mapping[str, Any] | None
    ) -> RunName:
        run = ids.run_of(model, current_principal().tenant)
        texts = {str(key): value if isinstance(value, str) else _json(value) for key, value in (metadata or {}).items()}
        request = training_pb2.CreateRunRequest(
            base=base, lora=lora, request_id=model, run_id=run.run, metadata={**texts, BASE_KEY: called}
        )
        try:
            await self._calls.training.CreateRun(request)
        except TreadleError as error:
            # A seed that was drawn here is another one when the SDK repeats itself: the run is the one that it made.
            if error.reason != "REQUEST_ID_REUSED":
                raise
        return run

    async def _base_of_load(self, wanted: str | None, saved: adapters_pb2.Adapter) -> str:
        if wanted is None:
            return self._models.name_of(saved.base)
        if (await self._models.find(wanted)).name != saved.base:
            raise make_error(
                "INCOMPATIBLE_ADAPTER",
                "Checkpoint model configuration is incompatible with target model: it was trained on "
                f"{self._models.name_of(saved.base)}, not on {wanted}",
            )
        return wanted

    async def _submit(
        self, run: RunName, operation: training_pb2.Operation, sampler_seq: int | None = None
    ) -> Response:
        request_id = await self._operations.submit(run, operation, sampler_seq)
        return json_response({"request_id": request_id, "model_id": ids.model_of(run)})


def _loss(wanted: tinker_pb2.TinkerForwardBackwardRequest) -> training_pb2.LossFn:
    """Returns a request's loss with its settings."""
    return training_pb2.LossFn(name=wanted.loss_fn, config=loss_config(wanted))


def _parsed(data: bytes) -> tinker_pb2.TinkerForwardBackwardRequest:
    try:
        wanted = tinker_pb2.TinkerForwardBackwardRequest.FromString(data)
    except DecodeError as error:
        raise make_error(
            "BAD_VALUE", "the body is no ForwardBackwardRequest; this needs tinker 0.25 or newer"
        ) from error
    if wanted.seq_id < 1:
        raise make_error("BAD_VALUE", "seq_id: operations are numbered from 1")
    return wanted


def _unpacked(data: bytes) -> bytes:
    try:
        return zstandard.ZstdDecompressor().decompress(data, max_output_size=bodies.MAX_BODY_BYTES)
    except zstandard.ZstdError as error:
        raise make_error("BAD_VALUE", f"the body is no zstd frame of at most {bodies.MAX_BODY_BYTES} bytes") from error


def _check_optimizer(optimizer: bodies.Optimizer) -> None:
    if optimizer.type not in ("adamw", "adam"):
        raise make_error(
            "BAD_VALUE", f"optimizer {optimizer.type[:40]!r} is not served here; runs are trained with adamw"
        )


def _lora(config: bodies.Lora) -> types_pb2.LoraConfig:
    if config.rank < 1:
        raise make_error("BAD_LORA_CONFIG", "lora_config.rank must be positive")
    if not (config.train_unembed or config.train_mlp or config.train_attn):
        raise make_error("BAD_LORA_CONFIG", "At least one of train_unembed, train_mlp, or train_attn must be True")
    return types_pb2.LoraConfig(
        rank=config.rank,
        seed=(secrets.randbits(63) if config.seed is None else config.seed) % 2**64,
        skip_attn=not config.train_attn,
        skip_mlp=not config.train_mlp,
        skip_unembed=not config.train_unembed,
    )


def _ttl(seconds: int | None) -> Duration | None:
    return None if seconds is None else Duration(seconds=seconds)


def _json(value: object) -> str:
    return orjson.dumps(value).decode()


def _refuse(operation: training_pb2.Operation, reason: str, message: str) -> None:
    operation.refused.CopyFrom(to_operation_error(make_error(reason, message)))
