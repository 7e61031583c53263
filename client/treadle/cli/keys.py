"""`treadle key`: API keys of tenants."""

from typing import TYPE_CHECKING

import click

from treadle.cli.connect import CALL_SECONDS, Place, open_channel, place_options
from treadle.cli.output import Row, print_row, print_rows

if TYPE_CHECKING:
    from treadle.v1 import admin_pb2


@click.group()
def key() -> None:
    """Create, list and revoke API keys (needs a key with the scope admin)."""


@key.command()
@click.argument("tenant")
@click.option("--scope", "scopes", multiple=True, type=click.Choice(["train", "sample", "admin"]))
@click.option("--days", type=click.FloatRange(0, min_open=True), help="The key ends after so long; never by default.")
@place_options
def create(place: Place, tenant: str, scopes: tuple[str, ...], days: float | None) -> None:
    """Create a key of TENANT, and TENANT too if there is none; prints the secret, this once.

    Without --scope the key may train and sample.
    """
    import time

    import grpc

    from treadle.errors import from_rpc_error
    from treadle.v1 import admin_pb2, admin_pb2_grpc

    with open_channel(place) as channel:
        admin = admin_pb2_grpc.AdminServiceStub(channel)
        try:
            admin.CreateTenant(
                admin_pb2.CreateTenantRequest(tenant=tenant), metadata=place.metadata, timeout=CALL_SECONDS
            )
        except grpc.RpcError as error:
            if from_rpc_error(error).reason != "TENANT_EXISTS":
                raise
        request = admin_pb2.CreateKeyRequest(tenant=tenant, scopes=scopes)
        if days is not None:
            request.expires.FromMilliseconds(int((time.time() + days * 86_400) * 1e3))
        made = admin.CreateKey(request, metadata=place.metadata, timeout=CALL_SECONDS)
    if place.format == "json":
        print_row(place, {**_row(made.key), "secret": made.secret})
    else:
        click.echo(made.secret)


@key.command("list")
@click.option("--tenant", default="", help="Only this tenant's keys.")
@place_options
def list_(place: Place, tenant: str) -> None:
    """List keys, without their secrets."""
    from treadle.v1 import admin_pb2, admin_pb2_grpc

    with open_channel(place) as channel:
        answer = admin_pb2_grpc.AdminServiceStub(channel).ListKeys(
            admin_pb2.ListKeysRequest(tenant=tenant), metadata=place.metadata, timeout=CALL_SECONDS
        )
    print_rows(place, [_row(found) for found in answer.keys], "no keys")


@key.command()
@click.argument("key_id")
@place_options
def revoke(place: Place, key_id: str) -> None:
    """Revoke the key KEY_ID; it stops working at once, and what runs under it is ended."""
    from treadle.v1 import admin_pb2, admin_pb2_grpc

    with open_channel(place) as channel:
        admin_pb2_grpc.AdminServiceStub(channel).RevokeKey(
            admin_pb2.RevokeKeyRequest(key_id=key_id), metadata=place.metadata, timeout=CALL_SECONDS
        )
    print_row(place, {"revoked": key_id})


def _row(found: "admin_pb2.Key") -> Row:
    expires = found.expires.ToJsonString() if found.HasField("expires") else None
    return {
        "key_id": found.key_id,
        "tenant": found.tenant,
        "scopes": list(found.scopes),
        "created": found.created.ToJsonString(),
        "expires": expires,
        "revoked": found.revoked,
    }
