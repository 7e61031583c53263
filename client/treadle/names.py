"""Resource names: the only place that knows their patterns.

`tenants/{tenant}/runs/{run}` and, below it, `revisions/{revision}` and `checkpoints/{checkpoint}`.
Knows nothing of whether a named thing exists.
"""

import re
from dataclasses import dataclass
from typing import Literal

from treadle.errors import BadNameError

AdapterKind = Literal["revisions", "checkpoints"]

ANY_TENANT = "tenants/-/"
"""Begins the name of an adapter that is looked up as one's own, else as the only public one."""

_TENANT = r"[a-z0-9][a-z0-9-]{0,31}"
_ID = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
_RUN_PATTERN = re.compile(rf"tenants/({_TENANT})/runs/({_ID})")
_ADAPTER_PATTERN = re.compile(rf"tenants/({_TENANT})/runs/({_ID})/(revisions|checkpoints)/({_ID})")
_TENANT_PATTERN = re.compile(_TENANT)
_ID_PATTERN = re.compile(_ID)


@dataclass(frozen=True, slots=True)
class RunName:
    """Name of a run."""

    tenant: str
    run: str

    def __str__(self) -> str:
        return f"tenants/{self.tenant}/runs/{self.run}"

    def adapter(self, kind: AdapterKind, adapter: str) -> "AdapterName":
        """Returns the name of one of the run's saved adapters."""
        return AdapterName(self.tenant, self.run, kind, check_id(adapter))


@dataclass(frozen=True, slots=True)
class AdapterName:
    """Name of a revision or checkpoint."""

    tenant: str
    run: str
    kind: AdapterKind
    adapter: str

    def __str__(self) -> str:
        return f"tenants/{self.tenant}/runs/{self.run}/{self.kind}/{self.adapter}"

    @property
    def of_any_tenant(self) -> str:
        """The name with the tenant left open."""
        return f"{ANY_TENANT}runs/{self.run}/{self.kind}/{self.adapter}"

    @property
    def run_name(self) -> RunName:
        """The run that the adapter was saved from."""
        return RunName(self.tenant, self.run)


def parse_run(name: str) -> RunName:
    """Returns the parts of a run's name, or raises BadNameError."""
    match = _RUN_PATTERN.fullmatch(name)
    if match is None:
        raise BadNameError(f"{name[:100]!r} is not a run name; it looks like tenants/acme/runs/r-1a2b3c")
    return RunName(match[1], match[2])


def parse_adapter(name: str) -> AdapterName:
    """Returns the parts of a revision's or checkpoint's name, or raises BadNameError."""
    match = _ADAPTER_PATTERN.fullmatch(name)
    if match is None:
        raise BadNameError(
            f"{name[:100]!r} is not the name of a revision or checkpoint; it looks like "
            "tenants/acme/runs/r-1a2b3c/revisions/step-20"
        )
    kind: AdapterKind = "revisions" if match[3] == "revisions" else "checkpoints"
    return AdapterName(match[1], match[2], kind, match[4])


def is_adapter(name: str) -> bool:
    """Tells whether `name` is a revision or checkpoint rather than a base."""
    return _ADAPTER_PATTERN.fullmatch(name) is not None


def plain_base(name: str) -> str:
    """Returns the name of the weights of a base, without what says how they are quantized (`@int8`, `@nf4`)."""
    plain, _, kind = name.rpartition("@")
    return plain if kind in ("int8", "nf4") else name


def check_tenant(tenant: str) -> str:
    """Returns `tenant`, or raises BadNameError."""
    if _TENANT_PATTERN.fullmatch(tenant) is None:
        raise BadNameError(
            f"{tenant[:100]!r} is not a tenant name: lower-case letters, digits and '-', at most 32, no leading '-'"
        )
    return tenant


def check_id(value: str) -> str:
    """Returns the last part of a name, or raises BadNameError."""
    if _ID_PATTERN.fullmatch(value) is None:
        raise BadNameError(
            f"{value[:100]!r} is not a valid id: letters, digits, '-', '_' and '.', at most 64, first a letter or digit"
        )
    return value
