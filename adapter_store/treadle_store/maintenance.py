"""What `treadle store` does: opens what the settings name, runs one tool, prints what came of it.

Knows the order of things and the words for people; the work is done in fsck, sweep and copying.
"""

import asyncio
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqlalchemy.exc import DBAPIError

from treadle.errors import TreadleError
from treadle_store.backends import lock_folders, open_blobs, open_database
from treadle_store.blobs import LocalBlobs
from treadle_store.clock import system_clock
from treadle_store.copying import CopyError, back_up, restore
from treadle_store.engines import Engines, SchemaError, open_engines, sqlite_file
from treadle_store.fsck import Report, check_store
from treadle_store.settings import StoreSettings
from treadle_store.sweep import Sweeper


def fsck(place: dict[str, Any], *, quick: bool, as_json: bool) -> bool:  # values of settings are of any type
    """Checks a store, running or not; prints what is wrong with it; returns whether all is well."""
    return _show(_checked(place, quick=quick), as_json=as_json)


def problems_of(place: dict[str, Any], *, quick: bool) -> list[str]:  # see fsck
    """Returns what is wrong with a store, running or not."""
    return list(_checked(place, quick=quick).problems)


def _checked(place: dict[str, Any], *, quick: bool) -> Report:  # see fsck
    settings = StoreSettings(**place)
    with _engines(settings) as engines:
        return check_store(engines, open_blobs(settings, beside_a_store=True), read_contents=not quick)


def gc(place: dict[str, Any], *, dry_run: bool, as_json: bool = False) -> None:  # see fsck
    """Collects unused blobs and deleted adapters now, beside a running store or without one."""
    settings = StoreSettings(**place)
    with _engines(settings):
        blobs = open_blobs(settings, beside_a_store=True)
        database = open_database(settings)
        sweeper = Sweeper(database, blobs, system_clock, settings.sweep_grace_seconds)
        try:
            if dry_run:
                unused = len(asyncio.run(sweeper.unused()))
                _say(f"{unused} blobs are named by no row", {"unused_blobs": unused}, as_json=as_json)
            else:
                removed = asyncio.run(sweeper.sweep(settings.deleted_grace_seconds))
                _say(f"{removed} blobs removed", {"removed_blobs": removed}, as_json=as_json)
        finally:
            database.close()


def backup(place: dict[str, Any], target: Path, *, as_json: bool = False) -> None:  # see fsck
    """Copies a store, running or not, to a new folder, and checks the copy."""
    settings = StoreSettings(**place)
    with _engines(settings) as engines:
        num_blobs = back_up(engines, open_blobs(settings, beside_a_store=True), target.absolute())
    # Every blob was hashed on its way in.
    with _closing(open_engines(f"sqlite:///{target.absolute() / 'store.db'}")) as engines:
        report = check_store(engines, LocalBlobs(target / "blobs", beside_a_store=True), read_contents=False)
    if not _show(report, as_json=as_json, blobs=num_blobs):
        raise SystemExit(f"{target} was written, but the store that it was taken from is damaged")
    if not as_json:
        print(f"{target}: {num_blobs} blobs")


def bring_back(place: dict[str, Any], source: Path, *, as_json: bool = False) -> None:  # see fsck
    """Copies a backup into an empty place where no store runs, and checks it."""
    settings = StoreSettings(**place)
    with lock_folders(settings), _engines(settings, must_exist=False) as engines:
        blobs = open_blobs(settings)
        num_blobs = restore(source.absolute(), engines, blobs)
        if not _show(check_store(engines, blobs, read_contents=False), as_json=as_json, blobs=num_blobs):
            raise SystemExit("what was restored is damaged")
    if not as_json:
        print(f"{num_blobs} blobs restored")


@contextlib.contextmanager
def _engines(settings: StoreSettings, *, must_exist: bool = True) -> Iterator[Engines]:
    """Opens the database and turns whatever is wrong with the store into a sentence."""
    file = sqlite_file(settings.database)
    if must_exist and file is not None and not file.is_file():
        raise SystemExit(f"there is no store at {file}; name its --data-dir or --database-url")
    try:
        with _closing(open_engines(settings.database)) as engines:
            yield engines
    except (CopyError, SchemaError, TreadleError) as error:
        raise SystemExit(str(error)) from error
    except (DBAPIError, OSError) as error:
        raise SystemExit(f"the store cannot be used: {error}") from error


@contextlib.contextmanager
def _closing(engines: Engines) -> Iterator[Engines]:
    try:
        yield engines
    finally:
        engines.dispose()


def _say(text: str, value: dict[str, int], *, as_json: bool) -> None:
    print(json.dumps(value, indent=2) if as_json else text)


def _show(report: Report, *, as_json: bool, **more: int) -> bool:
    if as_json:
        print(json.dumps({"problems": report.problems, "counts": report.counts, **more}, indent=2))
    else:
        for problem in report.problems:
            print(f"PROBLEM {problem}")
        looked_at = ", ".join(f"{count} {name}" for name, count in report.counts.items())
        print(f"{len(report.problems)} problems in {looked_at or 'a store that cannot be read'}")
    return not report.problems
