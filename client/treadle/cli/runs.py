"""`treadle run`: the runs of a tenant."""

from typing import TYPE_CHECKING

import click

from treadle.cli.connect import CALL_SECONDS, Place, open_channel, place_options
from treadle.cli.output import Row, print_row, print_rows

if TYPE_CHECKING:
    from treadle.v1 import training_pb2

_PAGE = 500


@click.group()
def run() -> None:
    """List, show and delete the runs of the key's tenant."""


@run.command("list")
@place_options
def list_(place: Place) -> None:
    """List runs, newest first."""
    from treadle.v1 import training_pb2, training_pb2_grpc

    rows: list[Row] = []
    with open_channel(place) as channel:
        training = training_pb2_grpc.TrainingServiceStub(channel)
        request = training_pb2.ListRunsRequest(page_size=_PAGE)
        while True:
            page = training.ListRuns(request, metadata=place.metadata, timeout=CALL_SECONDS)
            rows += [_short(found) for found in page.runs]
            if not page.next_page_token:
                break
            request.page_token = page.next_page_token
    print_rows(place, rows, "no runs")


@run.command()
@click.argument("name")
@place_options
def show(place: Place, name: str) -> None:
    """Show the run NAME."""
    from treadle.v1 import training_pb2, training_pb2_grpc

    with open_channel(place) as channel:
        found = (
            training_pb2_grpc.TrainingServiceStub(channel)
            .GetRun(training_pb2.GetRunRequest(name=name), metadata=place.metadata, timeout=CALL_SECONDS)
            .run
        )
    lora = found.lora
    skipped = [part for part in ("attn", "mlp", "unembed") if getattr(lora, f"skip_{part}")]
    details = {
        "rank": lora.rank,
        "alpha": lora.alpha,
        "seed": lora.seed,
        "skipped": skipped,
        "next_seq": found.next_seq,
        "epoch": found.epoch,
        "metadata": dict(found.metadata),
    }
    print_row(place, {**_short(found), **details, **_latest(found), **_divergence(found)})


@run.command()
@click.argument("name")
@place_options
def delete(place: Place, name: str) -> None:
    """Delete the run NAME; its saved adapters stay."""
    from treadle.v1 import training_pb2, training_pb2_grpc

    with open_channel(place) as channel:
        training_pb2_grpc.TrainingServiceStub(channel).DeleteRun(
            training_pb2.DeleteRunRequest(name=name), metadata=place.metadata, timeout=CALL_SECONDS
        )
    print_row(place, {"deleted": name})


def _short(found: "training_pb2.Run") -> Row:
    from treadle.v1 import training_pb2

    return {
        "run": found.name,
        "base": found.base,
        "created": found.created.ToJsonString(),
        "done": found.last_done_seq,
        "worker": found.worker or None,
        "state": training_pb2.RunState.Name(found.state).removeprefix("RUN_STATE_").lower(),
    }


def _latest(found: "training_pb2.Run") -> Row:
    if not found.HasField("latest"):
        return {"step": 0}
    metrics = {name: float(f"{value:.6g}") for name, value in sorted(found.latest.values.items())}
    return {"step": found.latest.step, "stepped": found.latest.time.ToJsonString(), "metrics": metrics}


def _divergence(found: "training_pb2.Run") -> Row:
    if not found.HasField("divergence"):
        return {}
    what = found.divergence
    return {
        "diverged_at": what.seq,
        "recorded_digest": what.recorded_digest.hex(),
        "replayed_digest": what.replayed_digest.hex(),
        "divergence": what.message,
        "found": what.found.ToJsonString(),
    }
