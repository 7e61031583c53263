"""`treadle worker`: who works in this deployment."""

import click

from treadle.cli.connect import CALL_SECONDS, Place, open_channel, place_options
from treadle.cli.output import print_rows


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
        }
        for found in answer.workers
    ]
    print_rows(place, rows, "no workers")
