"""TLS for clients, certificates on both sides between services, and no plaintext by accident."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from click.testing import CliRunner
from grpc_health.v1 import health_pb2, health_pb2_grpc
from pydantic import SecretStr, ValidationError

from tests.gateway.conftest import TOKEN, bearer
from tests.support.certificates import Authority
from treadle import ServiceClient
from treadle.cli import COMMANDS
from treadle.cli.lazy import LazyGroup
from treadle.errors import UnavailableError
from treadle.internal.v1 import workers_pb2, workers_pb2_grpc
from treadle.settings import ClientSettings
from treadle.v1 import admin_pb2, admin_pb2_grpc
from treadle_gateway import app
from treadle_gateway.settings import GatewaySettings
from treadle_service.channels import internal_metadata, open_channel
from treadle_service.server import serve_in_process
from treadle_service.tls import ClientTls, KeyPair, is_loopback
from treadle_store import __main__ as store_app
from treadle_store.settings import StoreSettings


def service_settings(authority: Authority, role: str) -> dict[str, object]:
    """Returns a service's settings with a certificate of the deployment's authority."""
    pair = authority.sign(role, "treadle.internal")
    return {
        "listen": "127.0.0.1:0",
        "internal_token": SecretStr(TOKEN),
        "drain_grace_seconds": 0.2,
        "service_cert": pair.certificate,
        "service_key": pair.key,
        "service_ca": authority.ca,
    }


@asynccontextmanager
async def deployment(folder: Path) -> AsyncIterator[tuple[str, str, Authority]]:
    """Serves a store and a gateway; gives their addresses and the authority of the gateway's public certificate."""
    services, public = Authority(folder / "services"), Authority(folder / "public")
    pair = public.sign("gateway", "127.0.0.1", "localhost")
    store_settings = StoreSettings(data_dir=folder / "data", **service_settings(services, "store"))
    async with serve_in_process(store_settings, store_app.build, store_app.make_interceptors(store_settings)) as store:
        settings = GatewaySettings(
            store_address=store.address,
            http_listen="127.0.0.1:0",
            http_address_file=folder / "http",
            refresh_seconds=0.05,
            tls_cert=pair.certificate,
            tls_key=pair.key,
            **service_settings(services, "gateway"),
        )
        async with serve_in_process(settings, app.build, app.make_interceptors(settings)) as gateway:
            yield gateway.address, store.address, public


async def test_the_sdk_and_the_command_line_speak_tls(tmp_path: Path) -> None:
    """With the authority that was given; a gateway that another one vouches for is not spoken to."""
    async with deployment(tmp_path) as (gateway, _, public):
        key = (tmp_path / "data/admin.key").read_text().strip()
        settings = ClientSettings(f"https://{gateway}", key, str(public.ca))

        def tenants(chosen: ClientSettings) -> list[str]:
            with ServiceClient(settings=chosen) as service:
                return service.list_tenants()

        assert await asyncio.to_thread(tenants, settings) == ["admin"]
        line = ["tenant", "list", "--address", settings.address, "--key", key, "--ca", str(public.ca)]
        done = await asyncio.to_thread(CliRunner().invoke, LazyGroup(COMMANDS), line)
        assert (done.exit_code, "admin" in done.output) == (0, True)
        stranger = Authority(tmp_path / "stranger")
        for bad in (
            ClientSettings(settings.address, key, str(stranger.ca), first_contact_seconds=0.2),
            ClientSettings(gateway, key, first_contact_seconds=0.2),
        ):
            with pytest.raises(UnavailableError):
                await asyncio.to_thread(tenants, bad)


async def test_the_store_speaks_only_to_services_of_its_deployment(tmp_path: Path) -> None:
    """A certificate of its authority and the internal token, both; nothing in plaintext."""
    async with deployment(tmp_path) as (_, store, _):
        ours, stranger = tmp_path / "services", Authority(tmp_path / "stranger", "stranger")
        pair = KeyPair(ours / "gateway.pem", ours / "gateway.key")
        forged = stranger.sign("forged", "treadle.internal")
        member = ClientTls(ours / "authority.pem", pair, "treadle.internal")
        callers = {
            "member": open_channel(store, member),
            "forged": open_channel(
                store, ClientTls(member.authority, KeyPair(forged.certificate, forged.key), "treadle.internal")
            ),
            "misnamed": open_channel(store, ClientTls(member.authority, pair, "treadle.elsewhere")),
            "plain": open_channel(store),
        }
        codes = {}
        for name, channel in callers.items():
            call = workers_pb2_grpc.WorkerServiceStub(channel).ScanWorkers(
                workers_pb2.ScanWorkersRequest(), metadata=internal_metadata(TOKEN), timeout=5
            )
            codes[name] = await call.code()
        assert codes.pop("member") is grpc.StatusCode.OK
        assert set(codes.values()) == {grpc.StatusCode.UNAVAILABLE}
        call = workers_pb2_grpc.WorkerServiceStub(callers["member"]).ScanWorkers(
            workers_pb2.ScanWorkersRequest(), metadata=internal_metadata("another token"), timeout=5
        )
        assert await call.code() is grpc.StatusCode.UNAUTHENTICATED
        for channel in callers.values():
            await channel.close()


async def test_health_is_answered_in_plaintext_where_it_is_asked_for(tmp_path: Path) -> None:
    """Kubernetes' probes know no TLS: on an address of their own they get health, and nothing else."""
    services = Authority(tmp_path / "services")
    settings = StoreSettings(
        data_dir=tmp_path / "data", health_listen="127.0.0.1:0", **service_settings(services, "store")
    )
    async with (
        serve_in_process(settings, store_app.build, store_app.make_interceptors(settings)) as store,
        grpc.aio.insecure_channel(store.health_address) as channel,
    ):
        for service in ("liveness", "readiness", ""):
            request = health_pb2.HealthCheckRequest(service=service)
            answer = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=5)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        call = workers_pb2_grpc.WorkerServiceStub(channel).ScanWorkers(
            workers_pb2.ScanWorkersRequest(), metadata=internal_metadata(TOKEN), timeout=5
        )
        assert await call.code() is grpc.StatusCode.UNIMPLEMENTED


def serial_shown(address: str, ca: Path) -> int:
    """Returns the serial number of the certificate that a server shows."""
    host, _, port = address.rpartition(":")
    context = ssl.create_default_context(cafile=str(ca))
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection((host, int(port)), 5) as plain,
        context.wrap_socket(plain, server_hostname=host) as tls,
    ):
        shown = tls.getpeercert()
    assert shown is not None
    return int(str(shown["serialNumber"]), 16)


async def test_a_rotated_certificate_is_shown_without_a_restart(tmp_path: Path) -> None:
    """To new connections; those that are open go on. Half-written files change nothing."""
    async with deployment(tmp_path) as (gateway, _, public):
        key = bearer((tmp_path / "data/admin.key").read_text().strip())
        credentials = grpc.ssl_channel_credentials(public.ca.read_bytes())
        async with grpc.aio.secure_channel(gateway, credentials) as channel:
            admin = admin_pb2_grpc.AdminServiceStub(channel)
            await admin.ListTenants(admin_pb2.ListTenantsRequest(), metadata=key)
            before = await asyncio.to_thread(serial_shown, gateway, public.ca)
            fresh = public.sign("gateway", "127.0.0.1", "localhost")
            assert before != fresh.serial
            assert await asyncio.to_thread(serial_shown, gateway, public.ca) == fresh.serial
            fresh.certificate.unlink()
            assert await asyncio.to_thread(serial_shown, gateway, public.ca) == fresh.serial
            await admin.ListTenants(admin_pb2.ListTenantsRequest(), metadata=key)


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        ("127.0.0.1:7600", True),
        ("127.8.8.8:1", True),
        ("[::1]:7600", True),
        ("localhost:7600", True),
        ("unix:/run/treadle", True),
        ("0.0.0.0:7600", False),
        ("[::]:7600", False),
        ("10.0.0.1:7600", False),
        ("gateway:7600", False),
    ],
)
def test_what_counts_as_this_machine(address: str, loopback: bool) -> None:
    """A name may mean anything, so only `localhost` is believed."""
    assert is_loopback(address) is loopback


@pytest.mark.parametrize(
    ("values", "refused"),
    [
        ({}, ""),
        ({"listen": "0.0.0.0:0"}, "0.0.0.0:0 is reached from other machines"),
        ({"http_listen": "0.0.0.0:0"}, "0.0.0.0:0 is reached from other machines"),
        ({"http_listen": "0.0.0.0:0", "tls_cert": "c", "tls_key": "k"}, ""),
        ({"http_listen": "", "listen": "[::1]:0"}, ""),
        ({"store_address": "store:7630"}, "store:7630 is on another machine"),
        ({"listen": "0.0.0.0:0", "store_address": "store:7630", "allow_plaintext": True}, ""),
        ({"listen": "0.0.0.0:0", "tls_cert": "c", "tls_key": "k"}, ""),
        ({"store_address": "store:7630", "service_cert": "c", "service_key": "k", "service_ca": "a"}, ""),
        ({"listen": "0.0.0.0:0", "service_cert": "c", "service_key": "k", "service_ca": "a"}, "0.0.0.0:0 is reached"),
    ],
)
def test_plaintext_leaves_this_machine_only_when_told_to(values: dict[str, object], refused: str) -> None:
    """Otherwise the service does not start; a gateway's service certificate is none for its clients."""
    settings = GatewaySettings(**{"listen": "127.0.0.1:0", "http_listen": "127.0.0.1:0", **values})
    if not refused:
        settings.check_plaintext()
        return
    with pytest.raises(SystemExit, match=refused):
        settings.check_plaintext()


async def test_a_service_that_may_not_serve_plaintext_ends_at_its_start(tmp_path: Path) -> None:
    """Before it has taken a port."""
    settings = StoreSettings(listen="0.0.0.0:0", internal_token=SecretStr(TOKEN), data_dir=tmp_path)
    with pytest.raises(SystemExit, match="allow_plaintext"):
        async with serve_in_process(settings, store_app.build, store_app.make_interceptors(settings)):
            pass


@pytest.mark.parametrize("values", [{"tls_cert": "c"}, {"service_cert": "c"}, {"service_ca": "a", "service_key": "k"}])
def test_half_of_a_certificate_is_refused(values: dict[str, object]) -> None:
    """A typing error must not turn TLS off."""
    with pytest.raises(ValidationError, match="belong together"):
        GatewaySettings(**values)


def test_up_refuses_to_listen_on_other_machines_in_plaintext(tmp_path: Path) -> None:
    """It names the option that allows it."""
    done = CliRunner().invoke(LazyGroup(COMMANDS), ["up", "--host", "0.0.0.0", "--data-dir", str(tmp_path)])
    assert done.exit_code == 1
    assert "--allow-plaintext" in done.output
