"""Every public method against every kind of caller that must not get in: enumerated from the services' descriptors."""

import time
from dataclasses import dataclass

import google_crc32c
import grpc
import pytest
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from tests.gateway.conftest import BASE, TOKEN, Front, bearer, read_all
from treadle.errors import TreadleError, from_rpc_error
from treadle.internal.v1 import blobs_pb2, blobs_pb2_grpc, journal_pb2, journal_pb2_grpc
from treadle.v1 import (
    adapters_pb2,
    admin_pb2,
    admin_pb2_grpc,
    datasets_pb2,
    datasets_pb2_grpc,
    metrics_pb2,
    sampling_pb2,
    training_pb2,
    types_pb2,
)
from treadle_gateway.scopes import METHOD_SCOPES
from treadle_gateway.service import PUBLIC_SERVICES, path
from treadle_service.channels import internal_metadata
from treadle_service.principal import SCOPES, Principal

METHODS = sorted(path(method) for service in PUBLIC_SERVICES for method in service.methods)


async def refusal(front: Front, method: str, request: Message | bytes, metadata) -> TreadleError:
    """Calls a method, whatever its kind, and returns how it failed."""
    body = request if isinstance(request, bytes) else request.SerializeToString()
    call = front.channel.stream_stream(method)(iter([body]), metadata=metadata)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read_all(call)
    return from_rpc_error(caught.value)


async def expired_key(front: Front):
    """Returns the metadata of a key that had all scopes and has ended."""
    admin = admin_pb2_grpc.AdminServiceStub(front.channel)
    expires = Timestamp()
    expires.FromMilliseconds(int(time.time() * 1000) + 1000)
    request = admin_pb2.CreateKeyRequest(tenant="admin", scopes=sorted(SCOPES), expires=expires)
    made = await admin.CreateKey(request, metadata=front.admin)
    metadata = bearer(made.secret)
    while True:
        try:
            await admin.GetCapabilities(admin_pb2.GetCapabilitiesRequest(), metadata=metadata)
        except grpc.aio.AioRpcError:
            return metadata


async def test_no_method_lets_a_caller_in_without_a_valid_key(front: Front) -> None:
    """No key, a key of nobody, one whose end has come: one answer each, before the request is looked at."""
    ended = await expired_key(front)
    for method in METHODS:
        for metadata, hint in (((), "carries no key"), (bearer("treadle_a_b_c"), "unknown"), (ended, "expired")):
            error = await refusal(front, method, b"", metadata)
            assert (method, error.reason) == (method, "UNAUTHENTICATED")
            assert hint in error.message


async def test_no_method_lets_a_key_in_without_its_scope(front: Front) -> None:
    """A key with every scope but those that the method wants."""
    keys = {}
    for number, scopes in enumerate(sorted({METHOD_SCOPES[method] for method in METHODS})):
        others = sorted(SCOPES - set(scopes))
        keys[scopes] = await front.tenant(f"lacking-{number}", *others) if others else None
    for method in METHODS:
        key = keys[METHOD_SCOPES[method]]
        if key is not None:
            assert (method, (await refusal(front, method, b"", key)).reason) == (method, "PERMISSION_DENIED")
    assert [scopes for scopes, key in keys.items() if key is None] == [tuple(METHOD_SCOPES[GET_CAPABILITIES])]


@dataclass(frozen=True)
class Named:
    """A method that takes a name of something that a tenant owns."""

    request: type[Message]
    field: str
    kind: str


_T, _S, _A = "/treadle.v1.TrainingService/", "/treadle.v1.SamplingService/", "/treadle.v1.AdapterService/"
_M = "/treadle.v1.MetricsService/"
_D = "/treadle.v1.DatasetService/"
COMPLETION = "chatcmpl-1234"
GET_CAPABILITIES = "/treadle.v1.AdminService/GetCapabilities"
NAMED = {
    _T + "GetRun": Named(training_pb2.GetRunRequest, "name", "run"),
    _T + "DeleteRun": Named(training_pb2.DeleteRunRequest, "name", "run"),
    _T + "StreamOperations": Named(training_pb2.StreamOperationsRequest, "hello.run", "run"),
    _T + "SubmitOperation": Named(training_pb2.SubmitOperationRequest, "run", "run"),
    _T + "WaitOperation": Named(training_pb2.WaitOperationRequest, "run", "run"),
    _T + "CancelOperations": Named(training_pb2.CancelOperationsRequest, "run", "run"),
    _T + "CreateRun": Named(training_pb2.CreateRunRequest, "from_adapter", "checkpoints/c"),
    _S + "Sample": Named(sampling_pb2.SampleRequest, "model", "revisions/a"),
    _S + "StreamSample": Named(sampling_pb2.StreamSampleRequest, "request.model", "revisions/a"),
    _S + "ComputeLogprobs": Named(sampling_pb2.ComputeLogprobsRequest, "model", "revisions/a"),
    _S + "GetTokenizer": Named(sampling_pb2.GetTokenizerRequest, "model", "revisions/a"),
    _D + "GetCompletion": Named(datasets_pb2.GetCompletionRequest, "id", "completion"),
    _D + "UpdateCompletion": Named(datasets_pb2.UpdateCompletionRequest, "id", "completion"),
    _D + "DeleteCompletion": Named(datasets_pb2.DeleteCompletionRequest, "id", "completion"),
    _A + "GetRevision": Named(adapters_pb2.GetRevisionRequest, "name", "revisions/a"),
    _A + "DeleteRevision": Named(adapters_pb2.DeleteRevisionRequest, "name", "revisions/a"),
    _A + "GetCheckpoint": Named(adapters_pb2.GetCheckpointRequest, "name", "checkpoints/c"),
    _A + "DeleteCheckpoint": Named(adapters_pb2.DeleteCheckpointRequest, "name", "checkpoints/c"),
    _A + "SetAdapterTtl": Named(adapters_pb2.SetAdapterTtlRequest, "name", "checkpoints/c"),
    _A + "SetAdapterPublic": Named(adapters_pb2.SetAdapterPublicRequest, "name", "checkpoints/c"),
    _A + "CopyAdapter": Named(adapters_pb2.CopyAdapterRequest, "source", "checkpoints/c"),
    _A + "PullAdapter": Named(adapters_pb2.PullAdapterRequest, "name", "revisions/a"),
    _A + "PushAdapter": Named(adapters_pb2.PushAdapterRequest, "header.run", "run"),
    _M + "LogMetrics": Named(metrics_pb2.LogMetricsRequest, "run", "run"),
    _M + "ListMetrics": Named(metrics_pb2.ListMetricsRequest, "run", "run"),
    _M + "ListSamples": Named(metrics_pb2.ListSamplesRequest, "run", "run"),
}
LISTS = {
    _T + "ListRuns": training_pb2.ListRunsRequest(page_size=500),
    _A + "ListRevisions": adapters_pb2.ListRevisionsRequest(page_size=500),
    _A + "ListCheckpoints": adapters_pb2.ListCheckpointsRequest(page_size=500),
    _D + "ListCompletions": datasets_pb2.ListCompletionsRequest(page_size=500),
}
# What they add or take away is the caller's own; tests/store/test_datasets.py has them between tenants.
OWN = {_D + "CreateCompletion", _D + "DeleteCompletions"}
# Nothing of a tenant's is in their answers: they take a key with the scope `admin`, or say what the deployment can do.
UNOWNED = {method for method in METHODS if "admin" in METHOD_SCOPES[method]}


def test_each_method_is_of_a_kind_that_the_tests_below_know() -> None:
    """A new method must be sorted in before it can be landed."""
    assert sorted([*NAMED, *LISTS, *UNOWNED, *OWN]) == METHODS


async def saved_by(front: Front, tenant: str, run_id: str = "") -> str:
    """Makes a run with revisions and a checkpoint; returns the run's name."""
    internal = internal_metadata(TOKEN)
    journal = journal_pb2_grpc.JournalServiceStub(front.store_channel)
    wanted = training_pb2.CreateRunRequest(base=BASE, lora=types_pb2.LoraConfig(rank=4), run_id=run_id)
    request = journal_pb2.RegisterRunRequest(tenant=tenant, run=wanted)
    run = (await journal.RegisterRun(request, metadata=internal)).run.name
    content, address = b"{}", "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    frames = [
        blobs_pb2.PutBlobRequest(header=blobs_pb2.BlobHeader(sha256=address, size=len(content))),
        blobs_pb2.PutBlobRequest(chunk=blobs_pb2.BlobChunk(data=content, crc32c=google_crc32c.value(content))),
    ]
    await blobs_pb2_grpc.BlobServiceStub(front.store_channel).PutBlob(iter(frames), metadata=internal)
    for kind in ("revisions/a", "revisions/external.c", "checkpoints/c"):
        file = adapters_pb2.AdapterFile(path="adapter_config.json", sha256=address, size=len(content))
        adapter = adapters_pb2.Adapter(name=f"{run}/{kind}", base=BASE, lora=types_pb2.LoraConfig(rank=4), files=[file])
        await journal.RecordAdapter(journal_pb2.RecordAdapterRequest(run=run, adapter=adapter), metadata=internal)
    return run


async def keep_completion(front: Front, tenant: str, name: str) -> None:
    """Keeps a completion of a tenant."""
    admin = admin_pb2_grpc.AdminServiceStub(front.channel)
    change = admin_pb2.UpdateTenantRequest(tenant=tenant, store_completions=True)
    await admin.UpdateTenant(change, metadata=front.admin)
    kept = datasets_pb2.StoredCompletion(
        id=name, model=BASE, messages_json="[]", response_json='{"said": "acme"}', metadata={"of": tenant}
    )
    principal = Principal(tenant, frozenset({"sample"}))
    await datasets_pb2_grpc.DatasetServiceStub(front.store_channel).CreateCompletion(
        datasets_pb2.CreateCompletionRequest(completion=kept), metadata=internal_metadata(TOKEN, principal)
    )


def request_for(method: str, run: str) -> tuple[Message, str]:
    """Returns a request that names the run, or something that was saved from it, and the name."""
    named = NAMED[method]
    name = run if named.kind == "run" else f"{run}/{named.kind}"
    if named.kind == "completion":  # has no tenant in its name: one that is not there has another end
        name = COMPLETION if run.startswith("tenants/acme/") and not run.endswith("r-0000000000") else "chatcmpl-0"
    request = message = named.request()
    *outer, last = named.field.split(".")
    for part in outer:
        message = getattr(message, part)
    setattr(message, last, name)
    if method.endswith("CopyAdapter"):
        request.run = "tenants/nosy/runs/r-0000000000"
    if method.endswith("PushAdapter"):
        request.header.revision_id = "mine"
    if method.endswith("StreamOperations"):
        request.hello.protocol = 1
    return request, name


async def test_anothers_thing_is_answered_like_one_that_is_not_there(front: Front) -> None:
    """Same status, reason and sentence but for the name; and the owner still has it afterwards."""
    await front.add_peer()
    owner, other = await front.tenant("acme", "train", "sample"), await front.tenant("nosy", "train", "sample")
    theirs = await saved_by(front, "acme")
    await keep_completion(front, "acme", COMPLETION)
    absent = {"not there": "tenants/nosy/runs/r-0000000000", "nobody's": "tenants/acme/runs/r-0000000000"}
    for method in NAMED:
        asked, name = request_for(method, theirs)
        answer = await refusal(front, method, asked, other)
        assert (method, answer.code) == (method, grpc.StatusCode.NOT_FOUND)
        for what, run in absent.items():
            asked, missing = request_for(method, run)
            other_answer = await refusal(front, method, asked, other)
            assert (method, what, other_answer.reason) == (method, what, answer.reason)
            assert other_answer.message.replace(missing, name) == answer.message
    for method, request in LISTS.items():
        asked = request.SerializeToString()
        listed = b"".join(await read_all(front.channel.unary_stream(method)(asked, metadata=other)))
        assert (method, b"acme" in listed) == (method, False)
        mine = b"".join(await read_all(front.channel.unary_stream(method)(asked, metadata=owner)))
        assert (method, b"acme" in mine) == (method, True)


@pytest.mark.parametrize("gateway_settings", [{"key_cache_seconds": 600}])
async def test_anothers_run_costs_no_question_to_the_store(front: Front) -> None:
    """So the time of the answer cannot tell whether it exists: with the store gone it is still 'not found'.

    A saved adapter may be public, so the store is asked for each that is not one's own, whether it exists or not.
    """
    await front.add_peer()
    key = await front.tenant("nosy", "train", "sample")
    theirs = await saved_by(front, "acme")
    await refusal(front, _T + "GetRun", request_for(_T + "GetRun", theirs)[0], key)
    await front.store.server.stop(0)
    for method in NAMED:
        if method.startswith(_T) and not method.endswith("CreateRun"):
            error = await refusal(front, method, request_for(method, theirs)[0], key)
            assert (method, error.code) == (method, grpc.StatusCode.NOT_FOUND)
