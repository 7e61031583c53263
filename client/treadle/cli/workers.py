"""`treadle worker`: who works in this deployment."""

from typing import TYPE_CHECKING

import click

from treadle.cli.connect import CALL_SECONDS, Place, open_channel, place_options
from treadle.cli.output import print_rows

if TYPE_CHECKING:
    from treadle.v1 import admin_pb2


@click.group()
def worker() -> None:
    """Look at the trainers and samplers (needs a key with the scope admin)."""


@worker.command("list")
@place_options
def list_(place: Place) -> None:
    """List the live workers."""
    from treadle.v1 import admin_pb2, admin_pb2_grpc

    with open_channel(place) as channel:
        answer = admin_pb2_grpc.AdminServiceStub(channel).ListWorkers(
            admin_pb2.ListWorkersRequest(), metadata=place.metadata, timeout=CALL_SECONDS
        )
    rows = [
        {
            "worker": found.worker,
            "kind": admin_pb2.WorkerKind.Name(found.kind).removeprefix("WORKER_KIND_").lower(),
            "base": found.base,
            "address": found.address,
            "resident": found.num_resident,
            "queue": found.queue_depth,
            "draining": found.draining,
            "tokens/s": _tokens_per_second(found.pass_cost),
        }
        for found in answer.workers
    ]
    print_rows(place, rows, "no workers")


def _tokens_per_second(cost: "admin_pb2.PassCost") -> int | None:
    """Returns how fast a trainer trains, as measured at its start; None for samplers and where nothing was measured."""
    return round(1 / cost.seconds_per_token) if cost.seconds_per_token else None
