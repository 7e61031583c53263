"""Bytes that no client of ours would send, to every decoder: a reason comes back, never a fault."""

import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import SimpleNamespace

import grpc
import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.cluster import Cluster
from treadle import wire
from treadle.errors import CATALOGUE, TreadleError, from_rpc_error
from treadle.frames import prepare
from treadle.ledger import OperationLedger
from treadle.tensors import numpy_from_tensor, tensor_from_numpy
from treadle.v1 import adapters_pb2, sampling_pb2, training_pb2, types_pb2
from treadle_gateway.service import PUBLIC_SERVICES, _run_of_stream, path
from treadle_trainer import operations
from treadle_trainer.streams import Fragments

VOCABULARY, LONGEST = 500, 64


def packed() -> types_pb2.Batch:
    """Returns a batch that is right."""
    batch = types_pb2.PackedBatch(
        lengths=np.array([3, 2], "<u4").tobytes(),
        tokens=tensor_from_numpy(np.arange(5, dtype=np.int32)),
        targets=tensor_from_numpy(np.arange(1, 6, dtype=np.int32)),
    )
    batch.columns["weights"].CopyFrom(tensor_from_numpy(np.ones(5, np.float32)))
    return types_pb2.Batch(packed=batch)


def listed() -> types_pb2.Batch:
    """Returns the readable form."""
    weights = {"weights": types_pb2.FloatList(values=[1.0, 1.0])}
    datum = types_pb2.Datum(tokens=[1, 2], target_tokens=[2, 3], loss_fn_inputs=weights)
    return types_pb2.Batch(list=types_pb2.DatumList(data=[datum]))


def forward_backward(batch: types_pb2.Batch) -> training_pb2.ForwardBackward:
    """Returns the operation's kind on a batch."""
    return training_pb2.ForwardBackward(batch=batch, loss_fn=training_pb2.LossFn(name="cross_entropy"))


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """Bytes of a message with some changed, cut out, doubled or put in; nearly right, so that most of it parses."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(data) - 1)))
        change = draw(st.sampled_from(("set", "cut", "insert", "double")))
        if change == "set" and data:
            data[place] = draw(st.integers(0, 255))
        elif change == "cut":
            del data[place : place + draw(st.integers(1, 8))]
        elif change == "insert":
            data[place:place] = draw(st.binary(max_size=8))
        else:
            data[place:place] = data[place : place + draw(st.integers(1, 16))]
    return bytes(data)


def parsed(kind: type, data: bytes) -> object | None:
    """Returns the message, None when protobuf itself refuses."""
    try:
        return kind.FromString(data)
    except DecodeError:
        return None


def only_reasons(call: Callable[[], object]) -> object | None:
    """Returns what the call returns, None when it raised a reason of the catalogue; anything else is a failure."""
    try:
        return call()
    except TreadleError as error:
        if error.reason not in CATALOGUE or error.reason == "INTERNAL":
            raise
        return None


@pytest.mark.parametrize("batch", [packed(), listed()], ids=["packed", "list"])
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_damaged_batch_is_refused_or_whole(batch: types_pb2.Batch, data: st.DataObject) -> None:
    """What the trainer's decoder lets through has columns that fit each other, and tokens that the base has."""
    message = parsed(types_pb2.Batch, data.draw(damaged(batch.SerializeToString())))
    if message is None:
        return
    columns = only_reasons(lambda: wire.decode_batch(message, LONGEST))
    if columns is None:
        return
    total = int(columns.lengths_R.sum())
    assert len(columns.tokens_T) == total == len(columns.targets)
    assert all(len(column) in (total, len(columns.lengths_R)) for column in columns.columns.values())
    operation = training_pb2.Operation(seq=1, forward_backward=forward_backward(message))
    limits = SimpleNamespace(vocab_size=VOCABULARY, max_context=LONGEST)
    work = only_reasons(lambda: operations.prepare(operation, limits, lambda batch: [batch]))
    if work is not None:
        (checked,) = work.chunks
        assert checked.tokens_T.min() >= 0
        assert checked.tokens_T.max() < VOCABULARY
        assert np.isfinite(checked.columns["weights"]).all()


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damaged_tensors_and_tokens_are_refused_or_whole(data: st.DataObject) -> None:
    """The SDK's and the services' tensor decoder gives as many numbers as the shape says."""
    right = tensor_from_numpy(np.arange(6, dtype=np.float32).reshape(2, 3)).SerializeToString()
    tensor = parsed(types_pb2.Tensor, data.draw(damaged(right)))
    if tensor is not None:
        array = only_reasons(lambda: numpy_from_tensor(tensor))
        assert array is None or array.size == int(np.prod(tensor.shape))
    right = wire.encode_tokens(np.arange(5, dtype=np.int32)).SerializeToString()
    tokens = parsed(types_pb2.Tokens, data.draw(damaged(right)))
    if tokens is not None:
        array = only_reasons(lambda: wire.decode_tokens(tokens))
        assert array is None or array.ndim == 1


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damaged_results_do_not_break_the_client(data: st.DataObject) -> None:
    """What a client reads of a loss is rows of numbers, or a reason."""
    outputs = training_pb2.LossOutputs(
        lengths=np.array([3, 2], "<u4").tobytes(), logprobs=tensor_from_numpy(np.ones(5, np.float32))
    )
    message = parsed(training_pb2.LossOutputs, data.draw(damaged(outputs.SerializeToString())))
    if message is not None:
        rows = only_reasons(lambda: wire.decode_outputs(message))
        assert rows is None or all(row.dtype == np.float32 for row in rows[0])


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60), st.integers(0, 2**63), st.integers(0, 2**63), st.integers(0, 2**33))
def test_first_frames_fragments_and_welcomes_are_refused_or_whole(data: bytes, one: int, other: int, size: int) -> None:
    """The gateway's first frame, the trainer's parts of an operation, the client's Welcome: reasons, no faults."""
    assert isinstance(only_reasons(lambda: _run_of_stream(data)) or "", str)
    part = training_pb2.OperationFragment(total_bytes=size % 2**32, offset=one % 2**32, data=data)
    only_reasons(lambda: Fragments().add(part))
    ledger = OperationLedger(1)
    ledger.add([prepare(training_pb2.OptimStep())] * 3)
    credit = training_pb2.Credit(max_seq=one, max_unfinished_bytes=other)
    with suppress(TreadleError):
        ledger.connect(training_pb2.Welcome(next_seq=one, last_done_seq=other, credit=credit))
    with suppress(TreadleError):
        ledger.receive(other)
    assert ledger.received_seq <= max(other, 1)


def requests(rng: random.Random, count: int) -> Iterator[bytes]:
    """Yields noise and damaged requests of all kinds."""
    name = "tenants/acme/runs/none"
    right = [
        training_pb2.SubmitOperationRequest(run=name, operation=training_pb2.Operation(seq=1)).SerializeToString(),
        sampling_pb2.SampleRequest(model="treadle/pip", num_samples=1).SerializeToString(),
        adapters_pb2.PullAdapterRequest(name=f"{name}/revisions/x").SerializeToString(),
        training_pb2.StreamOperationsRequest(hello=training_pb2.Hello(protocol=1, run=name)).SerializeToString(),
    ]
    for _ in range(count):
        data = bytearray(rng.choice([*right, rng.randbytes(rng.randrange(40))]))
        for _ in range(rng.randrange(3)):
            data[rng.randrange(len(data) + 1) : 0] = rng.randbytes(rng.randrange(4))
        yield bytes(data)


def test_noise_on_every_public_method_is_refused_and_costs_nobody_a_worker(cluster: Cluster) -> None:
    """Through gateway, trainer, sampler and store: every answer has a reason of its own; routing is as before."""
    rng, metadata = random.Random(7), (("authorization", f"Bearer {cluster.new_tenant()}"),)
    with grpc.insecure_channel(cluster.gateway_address) as channel:
        create = channel.unary_unary("/treadle.v1.TrainingService/CreateRun")
        run = training_pb2.CreateRunRequest(base="treadle/pip", lora=types_pb2.LoraConfig(rank=1)).SerializeToString()
        made = training_pb2.CreateRunResponse.FromString(create(run, metadata=metadata, timeout=20)).run.name
        # With these the gateway does not look into the request, and the noise goes on to trainer and sampler.
        routed = (*metadata, ("x-treadle-run", made), ("x-treadle-model", "treadle/pip"))
        reasons = set()
        for method in [method for service in PUBLIC_SERVICES for method in service.methods]:
            for data in requests(rng, 12):
                with suppress(StopIteration):
                    reasons.add(answer(channel, method, data, routed))
        assert reasons <= {*CATALOGUE, ""} - {"INTERNAL", "WORKER_LOST", "NO_WORKER", "UNAVAILABLE"}, reasons
        assert {"BAD_VALUE", "BAD_FRAME"} <= reasons


def answer(channel: grpc.Channel, method, data: bytes, metadata) -> str:
    """Returns the reason with which a call of raw bytes fails, "" if it does not."""
    many, more = method.client_streaming, method.server_streaming
    kind = f"{'stream' if many else 'unary'}_{'stream' if more else 'unary'}"
    call = getattr(channel, kind)(path(method))
    try:
        answered = call(iter([data]) if many else data, metadata=metadata, timeout=20)
        if more:
            next(answered)
            answered.cancel()
    except grpc.RpcError as error:
        return from_rpc_error(error).reason
    return ""
