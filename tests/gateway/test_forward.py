"""Bytes, statuses and lost peers, passed on."""

import asyncio
import re

import grpc
import pytest

from tests.gateway.conftest import BASE, TOKEN, Front, read_all
from treadle.errors import from_rpc_error
from treadle.v1 import adapters_pb2, adapters_pb2_grpc, training_pb2, training_pb2_grpc
from treadle_gateway.forward import LONGEST_CALL_SECONDS
from treadle_service.channels import internal_metadata
from treadle_service.principal import Principal

Frame = training_pb2.StreamOperationsRequest


def hello(run: str) -> Frame:
    return Frame(hello=training_pb2.Hello(protocol=1, run=run))


def operation(seq: int) -> Frame:
    return Frame(operation=training_pb2.Operation(seq=seq, barrier=training_pb2.Barrier()))


def bare_status(error: grpc.aio.AioRpcError):
    details = [value for key, value in error.trailing_metadata() if key == "grpc-status-details-bin"]
    # Each call has an id of its own, under which the logs have it.
    details = [re.sub(rb"[0-9a-f]{32}", b"", value) for value in details]
    return error.code(), error.details(), details


async def test_a_stream_is_joined_to_the_trainer_of_its_run(front: Front) -> None:
    """Frames arrive as sent, results come back, and the trainer hears of the tenant from the gateway."""
    peer, key = await front.add_peer(), await front.tenant("acme", "train")
    run = await front.new_run(key)
    forged = (*key, ("x-treadle-tenant", "victim"))
    call = training_pb2_grpc.TrainingServiceStub(front.channel).StreamOperations(metadata=forged)
    sent = [hello(run), *(operation(seq) for seq in range(1, 40)), Frame(goodbye=training_pb2.Goodbye(last_seq=39))]
    for frame in sent:
        await call.write(frame)
    await call.done_writing()
    answers = await read_all(call)
    assert peer.frames == sent
    assert answers[0].welcome.next_seq == 1
    assert [answer.result.seq for answer in answers[1:]] == list(range(1, 40))
    assert peer.metadata["x-treadle-tenant"] == "acme"
    assert peer.metadata["authorization"] == f"Bearer {TOKEN}"


async def test_the_holder_of_the_lease_gets_the_run(front: Front) -> None:
    """Also when the hash would send it elsewhere."""
    peers = {name: await front.add_peer(name) for name in ("trainer-0", "trainer-1")}
    key = await front.tenant("acme", "train")
    stub = training_pb2_grpc.TrainingServiceStub(front.channel)
    for name, peer in peers.items():
        run = await front.new_run(key)
        await front.claim(run, name, peer.address)
        request = training_pb2.SubmitOperationRequest(run=run, operation=training_pb2.Operation(seq=7))
        assert (await stub.SubmitOperation(request, metadata=key)).seq == 7
        assert peer.metadata.pop("x-treadle-tenant") == "acme"
        assert not any(other.metadata.get("x-treadle-tenant") for other in peers.values())


async def test_the_run_may_be_named_in_the_metadata(front: Front) -> None:
    """Then the request need not be parsed."""
    await front.add_peer()
    key = await front.tenant("acme", "train")
    run = await front.new_run(key)
    submit = front.channel.unary_unary("/treadle.v1.TrainingService/SubmitOperation")
    body = training_pb2.SubmitOperationRequest(operation=training_pb2.Operation(seq=3)).SerializeToString()
    answer = await submit(body, metadata=(*key, ("x-treadle-run", run)))
    assert training_pb2.SubmitOperationResponse.FromString(answer).seq == 3


@pytest.mark.parametrize("streaming", [True, False])
async def test_a_rich_refusal_passes_unchanged(front: Front, streaming: bool) -> None:
    """Code, sentence, reason and retry delay are the trainer's, byte for byte."""
    peer, key = await front.add_peer(), await front.tenant("acme", "train")
    run, peer.refuse_seq = await front.new_run(key), 9
    errors = []
    async with grpc.aio.insecure_channel(peer.address) as direct:
        for channel, metadata in (
            (front.channel, key),
            (direct, internal_metadata(TOKEN, Principal("acme", frozenset()))),
        ):
            stub = training_pb2_grpc.TrainingServiceStub(channel)
            request = training_pb2.SubmitOperationRequest(run=run, operation=operation(9).operation)
            call = (
                read_all(stub.StreamOperations(iter([hello(run), operation(9)]), metadata=metadata))
                if streaming
                else stub.SubmitOperation(request, metadata=metadata)
            )
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            errors.append(caught.value)
    assert bare_status(errors[0]) == bare_status(errors[1])
    assert from_rpc_error(errors[0]).retry_after_seconds == 1.5


async def test_a_callers_deadline_goes_with_the_call(front: Front) -> None:
    """Python gRPC does not pass it on by itself; a call without one gets the longest that there is."""
    peer, key = await front.add_peer(), await front.tenant("acme", "train")
    stub = training_pb2_grpc.TrainingServiceStub(front.channel)
    request = training_pb2.SubmitOperationRequest(
        run=await front.new_run(key), operation=training_pb2.Operation(seq=1, barrier=training_pb2.Barrier())
    )
    await stub.SubmitOperation(request, metadata=key, timeout=100)
    # On the wire it is rounded up, by a hundredth at most.
    assert peer.seconds_left is not None
    assert 0 < peer.seconds_left < 102
    await stub.SubmitOperation(request, metadata=key)
    assert 102 < peer.seconds_left < 1.02 * LONGEST_CALL_SECONDS


async def test_a_refusal_of_the_store_passes_unchanged(front: Front) -> None:
    """The adapter service is the store's own."""
    key = await front.tenant("acme", "train")
    request = adapters_pb2.GetRevisionRequest(name="tenants/acme/runs/r-1/revisions/a")
    errors = []
    internal = internal_metadata(TOKEN, Principal("acme", frozenset({"train"})))
    for channel, metadata in ((front.channel, key), (front.store_channel, internal)):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await adapters_pb2_grpc.AdapterServiceStub(channel).GetRevision(request, metadata=metadata)
        errors.append(caught.value)
    assert bare_status(errors[0]) == bare_status(errors[1])
    assert from_rpc_error(errors[0]).reason == "ADAPTER_NOT_FOUND"


async def test_a_stream_whose_trainer_vanishes_ends_with_worker_lost(front: Front) -> None:
    """And the next one goes to another trainer."""
    first = await front.add_peer("trainer-0")
    key = await front.tenant("acme", "train")
    run = await front.new_run(key)
    stub = training_pb2_grpc.TrainingServiceStub(front.channel)
    call = stub.StreamOperations(metadata=key)
    await call.write(hello(run))
    assert (await anext(aiter(call))).HasField("welcome")
    await first.server.stop(0)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read_all(call)
    error = from_rpc_error(caught.value)
    assert (caught.value.code(), error.reason) == (grpc.StatusCode.UNAVAILABLE, "WORKER_LOST")
    await front.add_peer("trainer-1")
    request = training_pb2.SubmitOperationRequest(run=run, operation=operation(1).operation)
    assert (await stub.SubmitOperation(request, metadata=key)).seq == 1


@pytest.mark.parametrize("first", [b"", b"\xff\xff", operation(1).SerializeToString()])
async def test_a_stream_that_does_not_begin_with_hello_is_refused(front: Front, first: bytes) -> None:
    """Nothing reaches a trainer."""
    peer, key = await front.add_peer(), await front.tenant("acme", "train")
    call = front.channel.stream_stream("/treadle.v1.TrainingService/StreamOperations")(iter([first]), metadata=key)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read_all(call)
    assert from_rpc_error(caught.value).reason == "BAD_FRAME"
    assert not peer.frames


async def test_garbage_in_a_unary_request_is_the_callers_fault(front: Front) -> None:
    """Not an internal error."""
    key = await front.tenant("acme", "train")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await front.channel.unary_unary("/treadle.v1.TrainingService/WaitOperation")(b"\xff\xff\xff", metadata=key)
    assert from_rpc_error(caught.value).reason == "BAD_VALUE"


async def test_draining_ends_open_streams_with_draining(front: Front) -> None:
    """After the grace, and retryably; readiness goes first."""
    await front.add_peer()
    key = await front.tenant("acme", "train")
    call = training_pb2_grpc.TrainingServiceStub(front.channel).StreamOperations(metadata=key)
    await call.write(hello(await front.new_run(key)))
    assert (await anext(aiter(call))).HasField("welcome")
    draining = asyncio.create_task(front.gateway.drain())
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read_all(call)
    assert from_rpc_error(caught.value).reason == "DRAINING"
    await draining


async def test_a_run_is_created_listed_and_deleted(front: Front) -> None:
    """The catalog's part of the training service, with replay by request id."""
    await front.add_peer()
    key = await front.tenant("acme", "train")
    stub = training_pb2_grpc.TrainingServiceStub(front.channel)
    request = training_pb2.CreateRunRequest(base=BASE, request_id="once", metadata={"note": "hi"})
    made, again = [await stub.CreateRun(request, metadata=key) for _ in range(2)]
    assert (made.replayed, again.replayed) == (False, True)
    assert made.run.name == again.run.name
    listed = await stub.ListRuns(training_pb2.ListRunsRequest(), metadata=key)
    assert [run.name for run in listed.runs] == [made.run.name]
    await stub.DeleteRun(training_pb2.DeleteRunRequest(name=made.run.name), metadata=key)
    assert not (await stub.ListRuns(training_pb2.ListRunsRequest(), metadata=key)).runs
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.GetRun(training_pb2.GetRunRequest(name=made.run.name), metadata=key)
    assert from_rpc_error(caught.value).reason == "RUN_NOT_FOUND"
