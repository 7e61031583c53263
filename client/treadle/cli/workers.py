"""`treadle worker`: who works in this deployment."""

import json
import time
from typing import IO, TYPE_CHECKING

import click

from treadle.cli.connect import CALL_SECONDS, Place, open_channel, place_options
from treadle.cli.output import print_rows

if TYPE_CHECKING:
    from treadle.v1 import admin_pb2


@click.group()
def worker() -> None:
    """Look at the trainers and samplers."""


@worker.command("list")
@place_options
def list_(place: Place) -> None:
    """List the live workers (needs a key with the scope admin)."""
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
            "load": round(found.load, 2) if found.HasField("load") else None,
            "draining": found.draining,
            "tokens/s": _tokens_per_second(found.pass_cost),
        }
        for found in answer.workers
    ]
    print_rows(place, rows, "no workers")


@worker.command()
@click.option("-o", "--output", type=click.File("w", atomic=True), default="-", help="File to write; default: stdout.")
@click.option("--seconds", type=click.FloatRange(min=0.1), help="Only the last so many seconds; default: all there is.")
@place_options
def trace(place: Place, output: IO[str], seconds: float | None) -> None:
    """Write what workers did lately as a trace for ui.perfetto.dev or chrome://tracing.

    A worker is a process, each tenant a track of it. Other tenants are `other` unless the key has the scope admin.
    """
    from treadle.timeline import chrome_trace, timelines_from
    from treadle.v1 import timeline_pb2, timeline_pb2_grpc

    request = timeline_pb2.ListSpansRequest()
    if seconds is not None:
        request.after.FromNanoseconds(time.time_ns() - int(seconds * 1e9))
    with open_channel(place) as channel:
        answer = timeline_pb2_grpc.TimelineServiceStub(channel).ListSpans(
            request, metadata=place.metadata, timeout=CALL_SECONDS
        )
    json.dump(chrome_trace(timelines_from(answer)), output)


def _tokens_per_second(cost: "admin_pb2.PassCost") -> int | None:
    """Returns how fast a trainer trains, as measured at its start; None for samplers and where nothing was measured."""
    return round(1 / cost.seconds_per_token) if cost.seconds_per_token else None
