"""`treadle tenant`: who is kept apart from whom, and what each may use."""

import click

from treadle.cli.connect import CALL_SECONDS, Place, open_channel, place_options
from treadle.cli.output import print_row, print_rows

# Options of `quota` and what they limit, in the order of the message's fields.
_LIMITS = {
    "max_runs": "Runs that exist.",
    "max_active_runs": "Runs that a trainer holds.",
    "max_unfinished_operations": "Operations unfinished at one trainer, or requests at one sampler.",
    "training_tokens_per_minute": "Positions of training passes, over all runs.",
    "sampling_tokens_per_minute": "Prompt tokens and sampled tokens, over all models.",
    "max_stored_bytes": "Bytes of saved adapters, snapshots and kept completions.",
}


def _limit(_context: click.Context, _option: click.Parameter, value: str | None) -> int | None:
    """Returns a limit, -1 for `none`, None when it was not given."""
    if value is None or value == "none":
        return -1 if value else None
    if not value.isdecimal():
        raise click.BadParameter(f"{value!r} is neither a number from 0 on nor `none`")
    return int(value)


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
    rows = [
        {
            "tenant": found.tenant,
            "created": found.created.ToJsonString(),
            "store_completions": found.store_completions,
        }
        for found in answer.tenants
    ]
    print_rows(place, rows, "no tenants")


@tenant.command()
@click.argument("name")
@click.option(
    "--store-completions/--no-store-completions",
    required=True,
    help="Whether chat completions are kept when a request asks for it; what is kept already stays.",
)
@place_options
def consent(place: Place, name: str, *, store_completions: bool) -> None:
    """Say what the tenant NAME agrees to."""
    from treadle.v1 import admin_pb2, admin_pb2_grpc

    with open_channel(place) as channel:
        request = admin_pb2.UpdateTenantRequest(tenant=name, store_completions=store_completions)
        changed = admin_pb2_grpc.AdminServiceStub(channel).UpdateTenant(
            request, metadata=place.metadata, timeout=CALL_SECONDS
        )
    print_row(place, {"tenant": changed.tenant.tenant, "store_completions": changed.tenant.store_completions})


def _limit_options(command: click.decorators.FC) -> click.decorators.FC:
    for name, meaning in reversed(_LIMITS.items()):
        command = click.option(f"--{name.replace('_', '-')}", metavar="NUMBER|none", callback=_limit, help=meaning)(
            command
        )
    return command


@tenant.command()
@click.argument("name")
@_limit_options
@place_options
def quota(place: Place, name: str, **limits: int | None) -> None:
    """Show what the tenant NAME may use, after setting the limits that are given; `none` lifts one."""
    from treadle.v1 import admin_pb2, admin_pb2_grpc

    with open_channel(place) as channel:
        admin = admin_pb2_grpc.AdminServiceStub(channel)
        request = admin_pb2.GetQuotaRequest(tenant=name)
        found = admin.GetQuota(request, metadata=place.metadata, timeout=CALL_SECONDS).quota
        given = {limit: value for limit, value in limits.items() if value is not None}
        for limit, value in given.items():
            if value < 0:
                found.ClearField(limit)
            else:
                setattr(found, limit, value)
        if given:
            change = admin_pb2.SetQuotaRequest(tenant=name, quota=found)
            found = admin.SetQuota(change, metadata=place.metadata, timeout=CALL_SECONDS).quota
    shown = {limit: getattr(found, limit) if found.HasField(limit) else None for limit in _LIMITS}
    if place.format == "table":
        shown = {limit: "no limit" if value is None else value for limit, value in shown.items()}
    print_row(place, {"tenant": name, **shown})
