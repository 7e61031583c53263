"""`treadle tenant`: who is kept apart from whom."""

import click

from treadle.cli.connect import CALL_SECONDS, Place, open_channel, place_options
from treadle.cli.output import print_row, print_rows


@click.group()
def tenant() -> None:
    """Create and list tenants (needs a key with the scope admin)."""


@tenant.command()
@click.argument("name")
@place_options
def create(place: Place, name: str) -> None:
    """Create the tenant NAME."""
    from treadle.v1 import admin_pb2, admin_pb2_grpc

    with open_channel(place) as channel:
        made = admin_pb2_grpc.AdminServiceStub(channel).CreateTenant(
            admin_pb2.CreateTenantRequest(tenant=name), metadata=place.metadata, timeout=CALL_SECONDS
        )
    print_row(place, {"tenant": made.tenant.tenant, "created": made.tenant.created.ToJsonString()})


@tenant.command("list")
@place_options
def list_(place: Place) -> None:
    """List all tenants."""
    from treadle.v1 import admin_pb2, admin_pb2_grpc

    with open_channel(place) as channel:
        answer = admin_pb2_grpc.AdminServiceStub(channel).ListTenants(
            admin_pb2.ListTenantsRequest(), metadata=place.metadata, timeout=CALL_SECONDS
        )
    rows = [{"tenant": found.tenant, "created": found.created.ToJsonString()} for found in answer.tenants]
    print_rows(place, rows, "no tenants")
