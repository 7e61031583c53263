"""Who gets in, and what those who do not get in are told."""

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.gateway.conftest import BASE, Front, bearer, read_all
from treadle.errors import from_rpc_error
from treadle.v1 import admin_pb2, admin_pb2_grpc, sampling_pb2, sampling_pb2_grpc, training_pb2, training_pb2_grpc
from treadle_gateway.scopes import METHOD_SCOPES


async def refusal(call) -> tuple[grpc.StatusCode, str, str]:
    """Returns code, reason and sentence of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    error = from_rpc_error(caught.value)
    return caught.value.code(), error.reason, error.message


@pytest.mark.parametrize("method", sorted(METHOD_SCOPES))
async def test_no_method_answers_without_a_key(front: Front, method: str) -> None:
    """Also those that stream, and whatever the caller claims to be."""
    forged = (("x-treadle-tenant", "acme"), ("x-treadle-scopes", "admin"))
    call = front.channel.stream_stream(method)(iter([b""]), metadata=forged)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read_all(call)
    assert from_rpc_error(caught.value).reason == "UNAUTHENTICATED"


@pytest.mark.parametrize("header", ["Bearer nonsense", "Bearer ", "Basic abc", "", "Bearer " + "x" * 600])
async def test_a_bad_key_is_refused(front: Front, header: str) -> None:
    """Whatever is wrong with it."""
    call = admin_pb2_grpc.AdminServiceStub(front.channel).GetCapabilities(
        admin_pb2.GetCapabilitiesRequest(), metadata=(("authorization", header),)
    )
    code, reason, sentence = await refusal(call)
    assert (code, reason) == (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")
    assert "authorization: Bearer <key>" in sentence


async def test_a_key_opens_only_what_its_scopes_name(front: Front) -> None:
    """A sampling key cannot train or administrate; the sentence names the scope that it lacks."""
    key = await front.tenant("acme", "sample")
    training = training_pb2_grpc.TrainingServiceStub(front.channel)
    admin = admin_pb2_grpc.AdminServiceStub(front.channel)
    code, reason, sentence = await refusal(training.ListRuns(training_pb2.ListRunsRequest(), metadata=key))
    assert (code, reason) == (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED")
    assert "ListRuns needs a key with the scope 'train'" in sentence
    assert (await refusal(admin.ListTenants(admin_pb2.ListTenantsRequest(), metadata=key)))[1] == "PERMISSION_DENIED"
    assert (await admin.GetCapabilities(admin_pb2.GetCapabilitiesRequest(), metadata=key)).tenant == "acme"


async def test_a_revoked_key_stops_working(front: Front) -> None:
    """As soon as the gateway's memory of it has passed, which is at once here."""
    key = await front.tenant("acme", "train")
    admin = admin_pb2_grpc.AdminServiceStub(front.channel)
    keys = await admin.ListKeys(admin_pb2.ListKeysRequest(tenant="acme"), metadata=front.admin)
    await admin.RevokeKey(admin_pb2.RevokeKeyRequest(key_id=keys.keys[0].key_id), metadata=front.admin)
    call = admin.GetCapabilities(admin_pb2.GetCapabilitiesRequest(), metadata=key)
    assert (await refusal(call))[1] == "UNAUTHENTICATED"


async def test_what_a_client_says_about_itself_is_not_believed(front: Front) -> None:
    """The identity headers of internal calls are the gateway's to set."""
    key = await front.tenant("acme", "train", "sample")
    forged = (*key, ("x-treadle-tenant", "victim"), ("x-treadle-scopes", "admin"))
    admin = admin_pb2_grpc.AdminServiceStub(front.channel)
    assert (await admin.GetCapabilities(admin_pb2.GetCapabilitiesRequest(), metadata=forged)).tenant == "acme"
    assert (await refusal(admin.ListTenants(admin_pb2.ListTenantsRequest(), metadata=forged)))[1] == "PERMISSION_DENIED"


async def test_health_and_reflection_need_no_key(front: Front) -> None:
    """Probes and grpcurl work; reflection names the public services and no internal one."""
    health = health_pb2_grpc.HealthStub(front.channel)
    await front.add_peer()
    assert (await health.Check(health_pb2.HealthCheckRequest(service="liveness"))).status == 1
    reflection = reflection_pb2_grpc.ServerReflectionStub(front.channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="*")
    async for answer in reflection.ServerReflectionInfo(iter([request])):
        names = {service.name for service in answer.list_services_response.service}
    public = {
        f"treadle.v1.{name}Service"
        for name in ("Training", "Sampling", "Adapter", "Admin", "Dataset", "Metrics", "Timeline")
    }
    assert {name for name in names if name.startswith("treadle")} == public


async def test_another_tenants_run_is_answered_like_an_absent_one(front: Front) -> None:
    """In every method that takes a run; only the name in the sentence differs."""
    await front.add_peer()
    owner, other = await front.tenant("acme", "train"), await front.tenant("nosy", "train")
    run, absent = await front.new_run(owner), "tenants/nosy/runs/r-0000000000"
    training = training_pb2_grpc.TrainingServiceStub(front.channel)

    def calls(name: str):
        hello = training_pb2.StreamOperationsRequest(hello=training_pb2.Hello(protocol=1, run=name))
        return [
            training.GetRun(training_pb2.GetRunRequest(name=name), metadata=other),
            training.DeleteRun(training_pb2.DeleteRunRequest(name=name), metadata=other),
            training.SubmitOperation(training_pb2.SubmitOperationRequest(run=name), metadata=other),
            training.WaitOperation(training_pb2.WaitOperationRequest(run=name), metadata=other),
            training.CancelOperations(training_pb2.CancelOperationsRequest(run=name), metadata=other),
            training.StreamOperations(iter([hello]), metadata=other).read(),
        ]

    foreign = [await refusal(call) for call in calls(run)]
    missing = [await refusal(call) for call in calls(absent)]
    expected = (grpc.StatusCode.NOT_FOUND, "RUN_NOT_FOUND", missing[0][2].replace(absent, run))
    assert foreign == [expected] * len(foreign)
    assert [(code, reason, text.replace(absent, run)) for code, reason, text in missing] == foreign
    assert (await training.GetRun(training_pb2.GetRunRequest(name=run), metadata=owner)).run.name == run


async def test_another_tenants_revision_is_answered_like_an_absent_one(front: Front) -> None:
    """Before any sampler is asked."""
    key = await front.tenant("nosy", "sample")
    sampling = sampling_pb2_grpc.SamplingServiceStub(front.channel)
    answers = set()
    for model in ("tenants/acme/runs/r-1/revisions/a", "tenants/nosy/runs/r-1/revisions/a"):
        code, reason, text = await refusal(sampling.Sample(sampling_pb2.SampleRequest(model=model), metadata=key))
        answers.add((code, reason, text.replace(model, "")))
    assert len(answers) == 1
    assert answers.pop()[1] == "MODEL_NOT_FOUND"


async def test_a_base_that_nobody_serves_is_named_with_those_that_are(front: Front) -> None:
    """No worker at all is another matter: that may pass."""
    key = await front.tenant("acme", "train", "sample")
    training = training_pb2_grpc.TrainingServiceStub(front.channel)
    request = training_pb2.CreateRunRequest(base="gpt-5")
    assert (await refusal(training.CreateRun(request, metadata=key)))[:2] == (grpc.StatusCode.UNAVAILABLE, "NO_WORKER")
    await front.add_peer()
    code, reason, sentence = await refusal(training.CreateRun(request, metadata=key))
    assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_BASE")
    assert "'gpt-5'" in sentence
    assert BASE in sentence


async def test_an_unreachable_store_lets_nobody_in(front: Front) -> None:
    """Fails closed and retryably."""
    key = await front.tenant("acme", "train")
    await front.store.server.stop(0)
    admin = admin_pb2_grpc.AdminServiceStub(front.channel)
    call = admin.GetCapabilities(admin_pb2.GetCapabilitiesRequest(), metadata=key)
    assert (await refusal(call))[:2] == (grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE")
    assert (await refusal(admin.GetCapabilities(admin_pb2.GetCapabilitiesRequest(), metadata=bearer("x"))))[
        1
    ] == "UNAVAILABLE"
