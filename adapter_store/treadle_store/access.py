"""Which tenant a call may touch. The one place where a service of the store compares names with the caller."""

from collections.abc import Callable
from functools import partial

from sqlalchemy import Connection

from treadle.names import AdapterName, RunName, parse_adapter, parse_run
from treadle.v1 import adapters_pb2
from treadle_service.principal import INTERNAL_SCOPE, current_principal
from treadle_store.adapters import adapter_not_found, fetch_adapter
from treadle_store.catalog import run_not_found


def may_see(tenant: str) -> bool:
    """Tells whether the caller is the tenant, or a service that acts for itself."""
    principal = current_principal()
    return principal.tenant == tenant or (not principal.tenant and INTERNAL_SCOPE in principal.scopes)


def visible_run(name: str) -> RunName:
    """Returns a run's name. Raises BAD_NAME, or RUN_NOT_FOUND when it is another tenant's."""
    run = parse_run(name)
    if not may_see(run.tenant):
        raise run_not_found(run)
    return run


def visible_adapter(name: str) -> AdapterName:
    """Returns a saved adapter's name. Raises BAD_NAME, or ADAPTER_NOT_FOUND when it is another tenant's."""
    adapter = parse_adapter(name)
    if not may_see(adapter.tenant):
        raise adapter_not_found(adapter)
    return adapter


def read_adapter(name: AdapterName, *, for_worker: bool = False) -> Callable[[Connection], adapters_pb2.Adapter]:
    """Returns the body that reads a saved adapter if it is the caller's or public.

    It raises ADAPTER_NOT_FOUND, the same for all others. `for_worker` is that of fetch_adapter.
    """
    reader = None if may_see(name.tenant) else current_principal().tenant
    return partial(fetch_adapter, name=name, for_worker=for_worker, reader=reader)
