"""Open calls: ended with their key, and bounded in number."""

import time

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from tests.gateway.conftest import Front, bearer
from treadle.errors import TreadleError, from_rpc_error
from treadle.v1 import admin_pb2, admin_pb2_grpc, training_pb2, training_pb2_grpc

Frame = training_pb2.StreamOperationsRequest


async def open_stream(front: Front, run: str, metadata):
    """Opens a stream of a run and reads its Welcome; the stream stays open."""
    call = training_pb2_grpc.TrainingServiceStub(front.channel).StreamOperations(metadata=metadata)
    await call.write(Frame(hello=training_pb2.Hello(protocol=1, run=run)))
    assert (await call.read()).HasField("welcome")
    return call


async def how_it_ends(call) -> TreadleError:
    """Waits for the end of a call that must fail."""

    async def read_to_the_end() -> None:
        while await call.read() is not grpc.aio.EOF:
            pass

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read_to_the_end()
    return from_rpc_error(caught.value)


async def key_for(front: Front, tenant: str, **fields: object):
    """Issues a key; returns its public part and its metadata."""
    request = admin_pb2.CreateKeyRequest(tenant=tenant, scopes=["train"], **fields)
    made = await admin_pb2_grpc.AdminServiceStub(front.channel).CreateKey(request, metadata=front.admin)
    return made.key.key_id, bearer(made.secret)


# Longer than the test may take: what ends the stream is the news of the revocation, not the next look.
@pytest.mark.parametrize("gateway_settings", [{"key_cache_seconds": 600}])
async def test_an_open_stream_ends_when_its_key_is_revoked(front: Front) -> None:
    """That key's streams alone, at once, and for good: the sentence says why."""
    await front.add_peer()
    run = await front.new_run(await front.tenant("acme", "train"))
    key_id, key = await key_for(front, "acme")
    _, other_key = await key_for(front, "acme")
    ended, going_on = await open_stream(front, run, key), await open_stream(front, run, other_key)
    admin = admin_pb2_grpc.AdminServiceStub(front.channel)
    await admin.RevokeKey(admin_pb2.RevokeKeyRequest(key_id=key_id), metadata=front.admin)
    error = await how_it_ends(ended)
    assert (error.reason, error.retryable) == ("UNAUTHENTICATED", False)
    assert "revoked" in error.message
    await going_on.write(Frame(operation=training_pb2.Operation(seq=1, barrier=training_pb2.Barrier())))
    assert (await going_on.read()).result.seq == 1
    again = admin.GetCapabilities(admin_pb2.GetCapabilitiesRequest(), metadata=key)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await again
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    going_on.cancel()


async def test_an_open_stream_ends_when_its_key_expires(front: Front) -> None:
    """Nobody has to do anything for it."""
    await front.add_peer()
    run = await front.new_run(await front.tenant("acme", "train"))
    expires = Timestamp()
    expires.FromMilliseconds(int(time.time() * 1000) + 1000)
    _, key = await key_for(front, "acme", expires=expires)
    assert (await how_it_ends(await open_stream(front, run, key))).reason == "UNAUTHENTICATED"


@pytest.mark.parametrize("gateway_settings", [{"max_streams_per_tenant": 2, "max_calls_per_tenant": 1}])
async def test_one_tenant_cannot_take_all_streams(front: Front) -> None:
    """Beyond the limit: QUEUE_FULL with a time to wait; others are let in, and so is the tenant once one has ended."""
    await front.add_peer()
    key, other = await front.tenant("flood", "train"), await front.tenant("light", "train")
    run, other_run = await front.new_run(key), await front.new_run(other)
    streams = [await open_stream(front, run, key) for _ in range(2)]
    refused = training_pb2_grpc.TrainingServiceStub(front.channel).StreamOperations(metadata=key)
    error = await how_it_ends(refused)
    assert (error.reason, error.retryable, error.retry_after_seconds) == ("QUEUE_FULL", True, 1.0)
    streams.append(await open_stream(front, other_run, other))
    await streams[0].write(Frame(goodbye=training_pb2.Goodbye()))
    assert await streams[0].read() is grpc.aio.EOF
    streams.append(await open_stream(front, run, key))
    for stream in streams[1:]:
        stream.cancel()


@pytest.mark.parametrize("gateway_settings", [{"max_calls": 2}])
async def test_a_full_gateway_says_so_before_it_asks_who_is_calling(front: Front) -> None:
    """Nothing is queued: a flood without keys costs the store nothing."""
    await front.add_peer()
    key = await front.tenant("acme", "train")
    run = await front.new_run(key)
    streams = [await open_stream(front, run, key) for _ in range(2)]
    for metadata in ((), bearer("nonsense"), key):
        call = front.channel.stream_stream("/treadle.v1.AdminService/GetCapabilities")(iter([b""]), metadata=metadata)
        error = await how_it_ends(call)
        assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
    for stream in streams:
        stream.cancel()


async def test_a_message_beyond_the_limit_is_refused_and_not_passed_on(front: Front) -> None:
    """4 MiB, gRPC's own limit, in a unary call; the trainer hears nothing of it."""
    peer = await front.add_peer()
    key = await front.tenant("acme", "train")
    run = await front.new_run(key)
    submit = front.channel.unary_unary("/treadle.v1.TrainingService/SubmitOperation")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await submit(b"\0" * (4 * 2**20 + 1), metadata=(*key, ("x-treadle-run", run)))
    error = from_rpc_error(caught.value)
    assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "FRAME_TOO_LARGE")
    assert not peer.metadata
