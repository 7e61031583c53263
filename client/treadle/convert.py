"""Messages of the public services as the SDK's values, and back. Knows nothing of calls."""

import secrets
from datetime import UTC, datetime
from typing import Final, Literal

import numpy as np
from google.protobuf.timestamp_pb2 import Timestamp
from numpy.typing import NDArray

from treadle.records import (
    AdapterFile,
    AdapterInfo,
    Divergence,
    KeyInfo,
    MetricPoint,
    RunInfo,
    SampleSet,
    ServerCapabilities,
    SupportedModel,
    TextSample,
    WorkerInfo,
)
from treadle.types import AdamParams, LoraConfig, SampledSequence, SamplingParams, StopReason, TopLogprobs
from treadle.v1 import adapters_pb2, admin_pb2, metrics_pb2, sampling_pb2, training_pb2, types_pb2
from treadle.wire import decode_tokens, numpy_from_tensor

_STOP_REASONS: Final[dict[int, StopReason]] = {
    sampling_pb2.STOP_REASON_STOP: "stop",
    sampling_pb2.STOP_REASON_LENGTH: "length",
}


def time_from(stamp: Timestamp) -> datetime:
    """Returns the moment in UTC."""
    return stamp.ToDatetime(tzinfo=UTC)


def lora_to_proto(lora: LoraConfig) -> types_pb2.LoraConfig:
    """Returns the message; without a seed a fresh one is drawn."""
    return types_pb2.LoraConfig(
        rank=lora.rank,
        alpha=lora.alpha,
        seed=secrets.randbits(63) if lora.seed is None else lora.seed,
        skip_attn=not lora.train_attn,
        skip_mlp=not lora.train_mlp,
        skip_unembed=not lora.train_unembed,
    )


def lora_from_proto(lora: types_pb2.LoraConfig) -> LoraConfig:
    """Returns the value."""
    return LoraConfig(
        rank=lora.rank or 32,
        seed=lora.seed,
        train_unembed=not lora.skip_unembed,
        train_mlp=not lora.skip_mlp,
        train_attn=not lora.skip_attn,
        alpha=lora.alpha or 32.0,
    )


def adam_to_proto(adam: AdamParams) -> types_pb2.AdamParams:
    """Returns the message with every field set."""
    return types_pb2.AdamParams(
        learning_rate=adam.learning_rate,
        beta1=adam.beta1,
        beta2=adam.beta2,
        eps=adam.eps,
        weight_decay=adam.weight_decay,
        grad_clip_norm=adam.grad_clip_norm,
    )


def sampling_to_proto(params: SamplingParams) -> sampling_pb2.SamplingParams:
    """Returns the message; a seed is fixed here, so that a repeated call draws the same tokens."""
    texts, tokens = params.stops()
    return sampling_pb2.SamplingParams(
        max_tokens=params.max_tokens,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        seed=secrets.randbits(63) if params.seed is None else params.seed,
        stop_strings=texts,
        stop_tokens=tokens,
        ignore_eos=params.stop is not None and not texts and not tokens,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=params.logit_bias or {},
    )


def stop_reason_from(reason: int) -> StopReason | None:
    """Returns why a sample ended; None while it goes on."""
    return _STOP_REASONS.get(reason)


def sequence_from(sequence: sampling_pb2.SampledSequence) -> SampledSequence:
    """Returns a finished continuation."""
    return SampledSequence(
        stop_reason=stop_reason_from(sequence.stop_reason) or "length",
        tokens=decode_tokens(sequence.tokens).tolist(),
        logprobs=numpy_from_tensor(sequence.logprobs, "logprobs").tolist(),
        topk_logprobs=top_from(sequence.topk_logprobs) if sequence.HasField("topk_logprobs") else None,
    )


def top_from(top: sampling_pb2.TopLogprobs) -> TopLogprobs:
    """Returns the likeliest tokens of some positions."""
    return TopLogprobs(
        tokens=decode_tokens(top.tokens).reshape(-1, top.k), logprobs=numpy_from_tensor(top.logprobs, "topk_logprobs")
    )


def prompt_logprobs_from(tensor: types_pb2.Tensor) -> list[float | None]:
    """Returns log-probabilities with None where there is none."""
    values: NDArray[np.float32] = numpy_from_tensor(tensor, "prompt_logprobs")
    return [None if np.isnan(value) else float(value) for value in values]


def run_from(run: training_pb2.Run) -> RunInfo:
    """Returns a run of the catalog."""
    state: Literal["active", "diverged"] = "diverged" if run.state == training_pb2.RUN_STATE_DIVERGED else "active"
    return RunInfo(
        name=run.name,
        base=run.base,
        lora=lora_from_proto(run.lora),
        created=time_from(run.created),
        next_seq=run.next_seq,
        last_done_seq=run.last_done_seq,
        metadata=dict(run.metadata),
        worker=run.worker,
        epoch=run.epoch,
        state=state,
        divergence=_divergence_from(run.divergence) if run.HasField("divergence") else None,
        latest=metric_point_from(run.latest) if run.HasField("latest") else None,
    )


def metric_point_from(point: metrics_pb2.MetricPoint) -> MetricPoint:
    """Returns the metrics of a step."""
    source: Literal["service", "user"] = "user" if point.source == metrics_pb2.METRIC_SOURCE_USER else "service"
    return MetricPoint(point.step, time_from(point.time), source, dict(point.values))


def sample_set_from(found: metrics_pb2.SampleSet) -> SampleSet:
    """Returns the texts of a step."""
    samples = tuple(
        TextSample(sample.prompt, sample.response, sample.reward if sample.HasField("reward") else None)
        for sample in found.samples
    )
    return SampleSet(found.step, time_from(found.time), samples)


def _divergence_from(found: training_pb2.Divergence) -> Divergence:
    return Divergence(
        seq=found.seq,
        recorded_digest=found.recorded_digest.hex(),
        replayed_digest=found.replayed_digest.hex(),
        message=found.message,
        found=time_from(found.found),
    )


def adapter_from(adapter: adapters_pb2.Adapter) -> AdapterInfo:
    """Returns a saved revision or checkpoint."""
    return AdapterInfo(
        name=adapter.name,
        base=adapter.base,
        lora=lora_from_proto(adapter.lora),
        step=adapter.step,
        created=time_from(adapter.created),
        files=tuple(AdapterFile(file.path, file.size, file.sha256) for file in adapter.files),
        unnamed=adapter.unnamed,
        public=adapter.public,
    )


def key_from(key: admin_pb2.Key) -> KeyInfo:
    """Returns a key without its secret."""
    return KeyInfo(
        key_id=key.key_id,
        tenant=key.tenant,
        scopes=tuple(key.scopes),
        created=time_from(key.created),
        expires=time_from(key.expires) if key.HasField("expires") else None,
        revoked=key.revoked,
    )


def worker_from(worker: admin_pb2.Worker) -> WorkerInfo:
    """Returns a live worker."""
    return WorkerInfo(
        worker=worker.worker,
        kind="sampler" if worker.kind == admin_pb2.WORKER_KIND_SAMPLER else "trainer",
        base=worker.base,
        address=worker.address,
        num_resident=worker.num_resident,
        queue_depth=worker.queue_depth,
        last_seen=time_from(worker.last_seen),
        draining=worker.draining,
        load=worker.load if worker.HasField("load") else None,
    )


def capabilities_from(response: admin_pb2.GetCapabilitiesResponse) -> ServerCapabilities:
    """Returns what the deployment offers."""
    models = [
        SupportedModel(
            model_name=base.name,
            max_context_length=base.max_context,
            trainable=base.trainable,
            sampleable=base.sampleable,
            vocab_size=base.vocab_size,
            tokenizer=base.tokenizer,
            dtype=base.dtype,
            num_parameters=base.num_parameters,
            eos_token_ids=tuple(base.eos_token_ids),
            max_tokens_per_pass=base.max_tokens_per_pass,
        )
        for base in response.bases
    ]
    return ServerCapabilities(
        supported_models=models,
        version=response.version,
        losses=list(response.losses),
        max_operation_bytes=response.max_operation_bytes,
        tenant=response.tenant,
    )
