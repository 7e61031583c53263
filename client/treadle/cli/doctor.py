"""`treadle doctor`: looks at a deployment from where it is called, and says what is wrong and what to do about it."""

from __future__ import annotations

import shutil
import socket
import ssl
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING

import click

from treadle.cli.connect import CALL_SECONDS, Place, open_channel, place_options
from treadle.cli.output import print_rows
from treadle.cli.settings import DEFAULT_DATA_DIR

if TYPE_CHECKING:
    from treadle.doctor import Finding
    from treadle.v1 import admin_pb2

_PAGE = 500


@click.command()
@click.option(
    "--store-dir",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help=f"The store's folder, where it is reached from here; default: {DEFAULT_DATA_DIR} if `treadle up` made one.",
)
@place_options
def doctor(place: Place, store_dir: Path | None) -> None:
    """Check a deployment: connection, TLS, clocks, releases, workers, runs, quotas, the store's disk and data.

    Exits with 1 when something is wrong. With a key of the scope admin it sees the workers; runs and quotas are those
    of the key's tenant.
    """
    findings = [*_reachable(place), *_store(store_dir)]
    rank = {"error": 0, "warning": 1, "ok": 2}
    rows = [
        {"check": found.check, "": found.severity, "seen": found.seen, "what to do": found.advice}
        for found in sorted(findings, key=lambda found: rank[found.severity])
    ]
    print_rows(place, rows, "nothing was checked")
    if any(found.severity == "error" for found in findings):
        raise SystemExit(1)


def _reachable(place: Place) -> Iterator[Finding]:
    from treadle import doctor as checks

    try:
        yield checks.check_certificate(_certificate_end(place), datetime.now(UTC))
        yield from _ask(place)
    except click.ClickException as error:
        advice = "is the gateway running there, and is this its key? --address, --key, --ca"
        yield checks.Finding("connection", "error", error.message, advice)
    except OSError as error:
        yield checks.Finding("connection", "error", f"{place.address}: {error}", "is the gateway running there?")


def _ask(place: Place) -> Iterator[Finding]:
    """Asks the gateway for all that a key may see."""
    from treadle import doctor as checks
    from treadle.v1 import admin_pb2, admin_pb2_grpc, training_pb2, training_pb2_grpc

    call = {"metadata": place.metadata, "timeout": CALL_SECONDS}
    with open_channel(place) as channel:
        admin = admin_pb2_grpc.AdminServiceStub(channel)
        offers = admin.GetCapabilities(admin_pb2.GetCapabilitiesRequest(), **call)
        yield checks.Finding("connection", "ok", f"{place.address} answers; the key is {offers.tenant}'s")
        yield checks.check_versions(metadata.version("treadle"), offers.version)
        quota = admin.GetQuota(admin_pb2.GetQuotaRequest(tenant=offers.tenant), **call).quota
        usage = admin.GetUsage(admin_pb2.GetUsageRequest(tenant=offers.tenant), **call)
        yield from checks.check_quota(quota, usage)
    yield from _ask_workers(place, list(offers.bases))
    try:
        with open_channel(place) as channel:
            training = training_pb2_grpc.TrainingServiceStub(channel)
            runs = training.ListRuns(training_pb2.ListRunsRequest(page_size=_PAGE), **call).runs
    except click.ClickException as error:
        yield checks.Finding("runs", "warning", error.message, "give a key with the scope train to look at its runs")
        return
    yield from checks.check_runs(list(runs))


def _ask_workers(place: Place, bases: list[admin_pb2.BaseModel]) -> Iterator[Finding]:
    """Asks for the workers; the newest sign of life tells the store's clock too."""
    from treadle import doctor as checks
    from treadle.v1 import admin_pb2, admin_pb2_grpc

    try:
        with open_channel(place) as channel:
            answer = admin_pb2_grpc.AdminServiceStub(channel).ListWorkers(
                admin_pb2.ListWorkersRequest(), metadata=place.metadata, timeout=CALL_SECONDS
            )
    except click.ClickException as error:
        yield checks.Finding("workers", "warning", error.message, "give a key with the scope admin to look at them")
        return
    yield from checks.check_workers(list(answer.workers), bases)
    heard = max((worker.last_seen.ToDatetime(UTC) for worker in answer.workers), default=None)
    yield checks.check_clock(heard, datetime.now(UTC))


def _certificate_end(place: Place) -> datetime | None:
    """Returns when the gateway's certificate ends, None where it has none; OSError when it cannot be reached."""
    scheme, _, target = place.address.rpartition("://")
    if scheme != "https":
        return None
    host, _, port = target.rpartition(":")
    context = ssl.create_default_context(cafile=str(place.ca) if place.ca else None)
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection((host.strip("[]"), int(port)), CALL_SECONDS) as plain,
        context.wrap_socket(plain, server_hostname=host.strip("[]")) as tls,
    ):
        shown = tls.getpeercert() or {}
    return datetime.fromtimestamp(ssl.cert_time_to_seconds(str(shown["notAfter"])), UTC)


def _store(store_dir: Path | None) -> Iterator[Finding]:
    """Looks at the store's folder, if it is reached from here."""
    from treadle import doctor as checks

    folder = store_dir or Path(DEFAULT_DATA_DIR).expanduser()
    if not (folder / "store.db").exists():
        advice = "call it on the store's machine with --store-dir, or run `treadle store fsck --quick` there"
        yield checks.Finding("store", "warning", "the store's data are not reached from here", advice)
        return
    disk = shutil.disk_usage(folder)
    yield checks.check_disk(checks.Disk(str(folder), disk.free, disk.total))
    try:
        maintenance = import_module("treadle_store.maintenance")
    except ModuleNotFoundError:
        yield checks.Finding("store", "warning", "its packages are not installed here", "pip install 'treadle[store]'")
        return
    problems = maintenance.problems_of({"data_dir": folder}, quick=True)
    if problems:
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        advice = "see `treadle store fsck`; bring back a backup with `treadle store restore` if blobs are gone"
        yield checks.Finding("store", "error", f"{problems[0]}{more}", advice)
    else:
        yield checks.Finding("store", "ok", f"rows and blobs in {folder} fit together")
