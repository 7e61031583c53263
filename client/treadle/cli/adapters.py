"""`treadle adapter`: saved adapters, to and from PEFT folders, merged models, and repositories of a model hub."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from treadle.cli.connect import CALL_SECONDS, Place, open_channel, place_options
from treadle.cli.output import Row, print_row, print_rows

if TYPE_CHECKING:
    from treadle.v1 import adapters_pb2

_PAGE = 500
_BASE_HELP = "Folder or hub name of the base's weights.  [default: what the service says, if that is a folder here]"


@click.group()
def adapter() -> None:
    """List, share, export, publish and import saved adapters."""


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
@click.option("--undo", is_flag=True, help="Keep it to your own tenant again.")
@place_options
def share(place: Place, name: str, *, undo: bool) -> None:
    """Let every tenant of the deployment read the revision or checkpoint NAME.

    They may sample from it, start runs from it, download and copy it; what they made of it stays theirs.
    """
    from treadle.cli.connect import open_service

    with open_service(place) as service:
        shared = service.set_adapter_public(name, public=not undo)
    print_row(place, {"adapter": shared.name, "public": shared.public})


@adapter.command()
@click.argument("name")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--unembed",
    type=click.Choice(["keep", "drop", "merge"]),
    default="keep",
    show_default=True,
    help="Its part for the unembedding, which vLLM cannot load: leave it out, or merge it into FOLDER/base.",
)
@click.option("--merge", is_flag=True, help="Write the whole model, base and adapter in one, instead of the adapter.")
@click.option("--base", default="", help=_BASE_HELP)
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto")
@place_options
def export(place: Place, name: str, folder: Path, *, unembed: str, merge: bool, base: str, dtype: str) -> None:
    """Write the revision or checkpoint NAME to FOLDER, as peft and vLLM read it.

    A broken download goes on where it broke, also when the command is given again.
    """
    from treadle.cli.adapter_files import convert, pull
    from treadle.cli.connect import open_service

    what = "merged" if merge else {"keep": "", "drop": "drop_unembed", "merge": "merge_unembed"}[unembed]
    with open_service(place) as service:
        if what:
            convert(place, service, name, folder, what, base, dtype)
        else:
            pull(place, service, name, folder)
    print_row(place, {"adapter": name, "folder": str(folder), "what": what or "adapter"})


@adapter.command()
@click.argument("name")
@click.argument("repository")
@click.option("--token", envvar="HF_TOKEN", help="Your token for the hub.  [default: the one you are logged in with]")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--hub", default="", help="Address of the hub.  [default: Hugging Face's]")
@click.option("--merge", is_flag=True, help="Publish the whole model instead of the adapter.")
@click.option("--base", default="", help=_BASE_HELP)
@click.option("--base-name", default="", help="Hub name of the base, for the model card and whoever loads the adapter.")
@place_options
def publish(
    place: Place,
    name: str,
    repository: str,
    *,
    token: str | None,
    private: bool,
    hub: str,
    merge: bool,
    base: str,
    base_name: str,
) -> None:
    """Push the revision NAME to REPOSITORY (owner/name) of a model hub, with your own token."""
    from treadle.cli.adapter_files import convert, pull, scratch_folder
    from treadle.cli.connect import open_service
    from treadle.recipes.publishing import publish_folder

    with open_service(place) as service, scratch_folder() as scratch:
        folder = scratch / "adapter"
        if merge:
            convert(place, service, name, folder, "merged", base, "auto")
        else:
            pull(place, service, name, folder)
        info = service.get_adapter(name)
        where = publish_folder(folder, repository, info, base_name, token=token, private=private, hub=hub)
    print_row(place, {"adapter": name, "repository": repository, "commit": where})


@adapter.command("import")
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--base", default="", help="Base that it was trained on.  [default: the only one that is served]")
@click.option("--as", "revision_id", default="imported", show_default=True, help="Last part of the revision's name.")
@click.option("--run", default="", help="Store it as a revision of this run of the same shape, instead of a new run.")
@place_options
def import_(place: Place, folder: Path, *, base: str, revision_id: str, run: str) -> None:
    """Take the PEFT adapter in FOLDER, from anywhere, as a run to go on training and a revision to sample from."""
    from treadle.cli.connect import open_service
    from treadle.recipes.job import choose_base

    with open_service(place) as service:
        if run:
            revision = service.push_adapter(run, folder, revision_id)
        else:
            client, revision = service.import_adapter(folder, choose_base(service, base).model_name, revision_id)
            run = client.run
    shape = {"rank": revision.lora.rank, "alpha": revision.lora.alpha}
    print_row(place, {"run": run, "adapter": revision.name, **shape})


def _row(found: "adapters_pb2.Adapter") -> Row:
    return {
        "adapter": found.name,
        "base": found.base,
        "rank": found.lora.rank,
        "step": found.step,
        "bytes": sum(file.size for file in found.files),
        "public": found.public,
        "created": found.created.ToJsonString(),
    }
