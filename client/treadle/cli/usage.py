"""`treadle usage`: what a tenant has used, by run."""

from datetime import datetime
from typing import TYPE_CHECKING

import click

from treadle.cli.connect import CALL_SECONDS, Place, open_channel, place_options
from treadle.cli.output import Row, print_row, print_rows

if TYPE_CHECKING:
    from treadle.v1 import admin_pb2

_DAY = click.DateTime(["%Y-%m-%d"])
_PAGE_SIZE = 500


@click.command()
@click.option("--tenant", default="", help="Whose; default: the key's own. Another's needs the scope admin.")
@click.option("--since", type=_DAY, help="First day (UTC).")
@click.option("--until", type=_DAY, help="Last day (UTC), included.")
@place_options
def usage(place: Place, tenant: str, since: datetime | None, until: datetime | None) -> None:
    """Show tokens and device time by run, and what is stored now."""
    from treadle.v1 import admin_pb2, admin_pb2_grpc

    request = admin_pb2.GetUsageRequest(tenant=tenant, page_size=_PAGE_SIZE)
    for field, day in (("since", since), ("until", until)):
        if day is not None:
            getattr(request, field).FromDatetime(day)
    parts: list[admin_pb2.RunUsage] = []
    with open_channel(place) as channel:
        admin = admin_pb2_grpc.AdminServiceStub(channel)
        while True:
            page = admin.GetUsage(request, metadata=place.metadata, timeout=CALL_SECONDS)
            parts.extend(page.runs)
            request.page_token = page.next_page_token
            if not request.page_token:
                break
    now = {
        "tenant": page.tenant,
        "stored_bytes": page.stored_bytes,
        "runs": page.num_runs,
        "active_runs": page.num_active_runs,
    }
    rows = [{"run": part.run or "(bases)", **_row(part.usage)} for part in parts]
    if place.format == "json":
        print_row(place, {**now, "total": _row(page.total), "by_run": rows})
        return
    print_rows(place, [*rows, {"run": "total", **_row(page.total)}], "nothing was used")
    click.echo()
    print_row(place, now)


def _row(found: "admin_pb2.Usage") -> Row:
    return {
        "operations": found.num_operations,
        "training_tokens": found.training_tokens,
        "prompt_tokens": found.prompt_tokens,
        "sampled_tokens": found.sampled_tokens,
        "device_seconds": round(found.device_time.ToMicroseconds() / 1e6, 3),
    }
