"""The adapter store as a process: opens what is durable, serves it, sweeps what nobody needs."""

import asyncio
import contextlib
import os
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
from sqlalchemy import Connection

from treadle.errors import ConflictError
from treadle.internal.v1 import (
    blobs_pb2_grpc,
    identity_pb2_grpc,
    journal_pb2_grpc,
    revisions_pb2_grpc,
    usage_pb2_grpc,
    workers_pb2_grpc,
)
from treadle.v1 import adapters_pb2_grpc, admin_pb2_grpc, datasets_pb2_grpc, metrics_pb2_grpc
from treadle_service.interceptors import InternalAuthInterceptor
from treadle_service.logs import get_logger
from treadle_service.principal import SCOPES
from treadle_service.server import DrainCallback, ServiceHost, run_service
from treadle_store import identity
from treadle_store.backends import lock_folders, open_blobs, open_database
from treadle_store.blobs import sync_folder
from treadle_store.clock import Clock, system_clock
from treadle_store.database import Database
from treadle_store.figures import StoreFigures
from treadle_store.revision_feed import RevisionFeed
from treadle_store.service_adapters import AdapterService
from treadle_store.service_admin import AdminService
from treadle_store.service_blobs import BlobService
from treadle_store.service_datasets import DatasetService
from treadle_store.service_journal import JournalService
from treadle_store.service_metrics import MetricsService
from treadle_store.service_revisions import RevisionService
from treadle_store.service_usage import UsageService
from treadle_store.service_workers import IdentityService, WorkerService
from treadle_store.settings import StoreSettings
from treadle_store.sweep import Sweeper
from treadle_store.unnamed import UnnamedRevisions
from treadle_store.worker_exchange import WorkerExchange
from treadle_store.workers import WorkerRegistry

ADMIN_TENANT = "admin"
WORKER_EXCHANGE_SECONDS = 1.0
SERVICES = (
    "treadle.internal.v1.JournalService",
    "treadle.internal.v1.BlobService",
    "treadle.internal.v1.IdentityService",
    "treadle.internal.v1.WorkerService",
    "treadle.internal.v1.UsageService",
    "treadle.internal.v1.RevisionService",
    "treadle.v1.AdapterService",
    "treadle.v1.DatasetService",
    "treadle.v1.AdminService",
    "treadle.v1.MetricsService",
)
log = get_logger(__name__)


def make_interceptors(settings: StoreSettings) -> Sequence[grpc.aio.ServerInterceptor]:
    """Returns what guards the store: only services of the deployment get in."""
    return [InternalAuthInterceptor(settings.internal_token.get_secret_value())]


@asynccontextmanager
async def build(host: ServiceHost, settings: StoreSettings, clock: Clock = system_clock) -> AsyncIterator[None]:
    """Serves the store on `host` until the context ends. Raises SystemExit when it cannot."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(lock_folders(settings))
        # Blocking work on blobs waits for disks and buckets, not for processors.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(32, "store-blobs"))
        database = await asyncio.to_thread(open_database, settings)
        stack.callback(database.close)
        blobs = await asyncio.to_thread(open_blobs, settings)
        await _issue_first_key(database, settings.admin_key, clock)
        workers = WorkerRegistry(clock, time.monotonic)
        feed = RevisionFeed()
        unnamed = UnnamedRevisions(
            database,
            blobs,
            feed,
            clock,
            num_kept=settings.unnamed_kept,
            idle_seconds=settings.unnamed_idle_seconds,
        )
        journal = JournalService(database, blobs, clock, feed, unnamed)
        server = host.server
        journal_pb2_grpc.add_JournalServiceServicer_to_server(journal, server)
        blobs_pb2_grpc.add_BlobServiceServicer_to_server(BlobService(blobs), server)
        identity_pb2_grpc.add_IdentityServiceServicer_to_server(IdentityService(database, clock), server)
        workers_pb2_grpc.add_WorkerServiceServicer_to_server(WorkerService(workers), server)
        usage_pb2_grpc.add_UsageServiceServicer_to_server(UsageService(database, clock), server)
        adapter_service = AdapterService(database, blobs, clock, settings.max_adapter_bytes, feed)
        revisions_pb2_grpc.add_RevisionServiceServicer_to_server(RevisionService(feed, workers), server)
        adapters_pb2_grpc.add_AdapterServiceServicer_to_server(adapter_service, server)
        admin_pb2_grpc.add_AdminServiceServicer_to_server(AdminService(database, workers, clock), server)
        metrics_pb2_grpc.add_MetricsServiceServicer_to_server(MetricsService(database, clock), server)
        datasets = DatasetService(database, clock, settings.max_completion_bytes)
        datasets_pb2_grpc.add_DatasetServiceServicer_to_server(datasets, server)
        for service in SERVICES:
            host.add_service(service)
        sweeper = Sweeper(database, blobs, clock, settings.sweep_grace_seconds)
        tasks = [
            asyncio.create_task(sweeper.run(settings.sweep_period_seconds, settings.deleted_grace_seconds)),
            asyncio.create_task(unnamed.run(settings.unnamed_period_seconds)),
        ]
        figures = StoreFigures(database, workers, settings, clock)
        host.metrics.add(*figures.readings())
        if settings.metrics_listen:
            tasks.append(asyncio.create_task(figures.run()))
        if settings.replicas > 1:
            exchange = WorkerExchange(workers, database, clock)
            tasks.append(asyncio.create_task(exchange.run(WORKER_EXCHANGE_SECONDS)))
        host.on_drain(_closing(feed))
        await host.start()
        await host.set_ready(True)
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)


def main() -> None:
    """Runs the store until SIGTERM or SIGINT."""
    run_service("store", StoreSettings, build, make_interceptors)


def _closing(feed: RevisionFeed) -> DrainCallback:
    async def close() -> None:
        feed.close()

    return close


async def _issue_first_key(database: Database, path: Path, clock: Clock) -> None:
    """Creates the tenant `admin` with a key for everything, if no key was ever issued, and writes its secret down."""
    if await database.read(identity.has_keys):
        return
    now_us = clock()
    key = identity.make_key(ADMIN_TENANT, SCOPES, None, now_us)
    # The file comes first: a crash in between leaves a useless file, which the next start replaces, not a lost key.
    await asyncio.to_thread(_write_secret, path, key.secret)

    def add(connection: Connection) -> None:
        identity.create_tenant(connection, ADMIN_TENANT, now_us)
        identity.add_key(connection, key, now_us)

    try:
        await database.write(add)
    except ConflictError:
        log.info("first_key_issued_elsewhere", tenant=ADMIN_TENANT)
        path.unlink(missing_ok=True)
        return
    log.info("first_key_issued", tenant=ADMIN_TENANT, key_id=key.key_id, file=str(path))


def _write_secret(path: Path, secret: str) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secret + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


if __name__ == "__main__":
    main()
