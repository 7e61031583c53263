"""`treadle adapter`: saved adapters, to and from PEFT folders."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from treadle.cli.connect import CALL_SECONDS, Place, open_channel, place_options, report_errors
from treadle.cli.output import Row, print_row, print_rows

if TYPE_CHECKING:
    from treadle.v1 import adapters_pb2

_PAGE = 500


@click.group()
def adapter() -> None:
    """List, export and import saved adapters."""


@adapter.command("list")
@click.option("--run", default="", help="Only this run's.")
@click.option("--checkpoints", is_flag=True, help="Checkpoints instead of revisions.")
@place_options
def list_(place: Place, run: str, *, checkpoints: bool) -> None:
    """List revisions, newest first."""
    from treadle.v1 import adapters_pb2, adapters_pb2_grpc

    rows: list[Row] = []
    token = ""
    with open_channel(place) as channel:
        adapters = adapters_pb2_grpc.AdapterServiceStub(channel)
        while True:
            if checkpoints:
                request = adapters_pb2.ListCheckpointsRequest(run=run, page_size=_PAGE, page_token=token)
                page = adapters.ListCheckpoints(request, metadata=place.metadata, timeout=CALL_SECONDS)
                rows += map(_row, page.checkpoints)
                token = page.next_page_token
            else:
                wanted = adapters_pb2.ListRevisionsRequest(run=run, page_size=_PAGE, page_token=token)
                found = adapters.ListRevisions(wanted, metadata=place.metadata, timeout=CALL_SECONDS)
                rows += map(_row, found.revisions)
                token = found.next_page_token
            if not token:
                break
    print_rows(place, rows, "no checkpoints" if checkpoints else "no revisions")


@adapter.command()
@click.argument("name")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@place_options
def export(place: Place, name: str, folder: Path) -> None:
    """Write the revision or checkpoint NAME to FOLDER, as peft and vLLM read it."""
    from treadle import ServiceClient
    from treadle.settings import client_settings

    with report_errors(place), ServiceClient(settings=client_settings(place.address, place.key, place.ca)) as client:
        client.pull_adapter(name, folder)
    print_row(place, {"adapter": name, "folder": str(folder)})


@adapter.command("import")
@click.argument("run")
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("revision_id")
@place_options
def import_(place: Place, run: str, folder: Path, revision_id: str) -> None:
    """Store the PEFT adapter in FOLDER as a revision REVISION_ID of RUN."""
    from treadle import ServiceClient
    from treadle.settings import client_settings

    with report_errors(place), ServiceClient(settings=client_settings(place.address, place.key, place.ca)) as client:
        client.push_adapter(run, folder, revision_id)
    print_row(place, {"adapter": f"{run}/revisions/{revision_id}"})


def _row(found: "adapters_pb2.Adapter") -> Row:
    return {
        "adapter": found.name,
        "base": found.base,
        "rank": found.lora.rank,
        "step": found.step,
        "bytes": sum(file.size for file in found.files),
        "created": found.created.ToJsonString(),
    }
