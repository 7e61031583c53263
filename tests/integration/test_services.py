"""What all four services have in common as processes: health by name, reflection, one server per port, drain."""

import socket
import subprocess
import sys

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.support.cluster import ROLES, Cluster

SERVICES = {
    "gateway": {
        "treadle.v1.TrainingService",
        "treadle.v1.SamplingService",
        "treadle.v1.TimelineService",
        "treadle.v1.AdapterService",
        "treadle.v1.DatasetService",
        "treadle.v1.AdminService",
        "treadle.v1.MetricsService",
    },
    "trainer": {"treadle.v1.TrainingService", "treadle.internal.v1.TrainerService"},
    "sampler": {"treadle.v1.SamplingService", "treadle.internal.v1.SamplerService"},
    "store": {
        "treadle.internal.v1.JournalService",
        "treadle.internal.v1.BlobService",
        "treadle.internal.v1.IdentityService",
        "treadle.internal.v1.RevisionService",
        "treadle.internal.v1.UsageService",
        "treadle.internal.v1.WorkerService",
        "treadle.v1.AdapterService",
        "treadle.v1.DatasetService",
        "treadle.v1.AdminService",
        "treadle.v1.MetricsService",
    },
}


@pytest.mark.parametrize("role", ROLES)
def test_health_answers_for_the_three_names(cluster: Cluster, role: str) -> None:
    """The empty name, liveness and readiness all serve; another name is unknown."""
    with grpc.insecure_channel(cluster.addresses[role]) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", "liveness", "readiness"):
            answer = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as caught:
            health.Check(health_pb2.HealthCheckRequest(service="nothing"), timeout=10)
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("role", ROLES)
def test_reflection_lists_the_services_and_describes_them(cluster: Cluster, role: str) -> None:
    """A client without our protos can find out what to call."""
    with grpc.insecure_channel(cluster.addresses[role]) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        requests = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            *(reflection_pb2.ServerReflectionRequest(file_containing_symbol=name) for name in SERVICES[role]),
        ]
        listed, *described = stub.ServerReflectionInfo(iter(requests), timeout=10)
        names = {service.name for service in listed.list_services_response.service}
        assert {name for name in names if name.startswith("treadle.")} == SERVICES[role]
        for answer in described:
            file = FileDescriptorProto.FromString(answer.file_descriptor_response.file_descriptor_proto[0])
            assert file.package.startswith("treadle.")


@pytest.mark.parametrize("role", ROLES)
def test_a_second_process_on_the_same_port_fails_instead_of_sharing_it(cluster: Cluster, role: str) -> None:
    """so_reuseport is off: two servers behind one port would answer by chance."""
    environment = cluster.environment(role)
    if role == "store":
        environment["TREADLE_STORE_DATA_DIR"] += "-second"
    if role == "gateway":
        environment["TREADLE_GATEWAY_HTTP_LISTEN"] = "127.0.0.1:0"
    command = [sys.executable, "-m", f"treadle_{role}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode != 0
    assert "bind" in done.stderr.lower()


@pytest.mark.parametrize("role", ["trainer", "sampler", "store"])
def test_services_behind_the_gateway_refuse_whoever_is_not_of_the_deployment(cluster: Cluster, role: str) -> None:
    """Without the internal token, no method of theirs answers, not even with a tenant's key."""
    service = sorted(SERVICES[role])[0]
    with grpc.insecure_channel(cluster.addresses[role]) as channel:
        pool = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(file_containing_symbol=service)
        (answer,) = pool.ServerReflectionInfo(iter([request]), timeout=10)
        file = FileDescriptorProto.FromString(answer.file_descriptor_response.file_descriptor_proto[0])
        described = next(found for found in file.service if service.endswith(f".{found.name}"))
        for method in described.method:
            call = channel.stream_stream(f"/{service}/{method.name}")
            metadata = (("authorization", f"Bearer {cluster.new_tenant()}"), ("x-treadle-tenant", "admin"))
            with pytest.raises(grpc.RpcError) as caught:
                list(call(iter([b""]), metadata=metadata, timeout=10))
            assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED, method.name


def test_a_drained_gateway_ends_with_code_zero_and_frees_its_port(own_cluster: Cluster) -> None:
    """SIGTERM of a store and a gateway, with nothing else running: both end by themselves."""
    for role in ("store", "gateway"):
        own_cluster.launch(role)
    own_cluster.wait_ready(["store", "gateway"])
    host, port = own_cluster.addresses["gateway"].split(":")
    assert own_cluster.stop("gateway") == 0
    assert own_cluster.stop("store") == 0
    with socket.socket() as probe:
        probe.bind((host, int(port)))
