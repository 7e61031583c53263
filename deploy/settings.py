"""Lists all settings of each service in its settings.env, those that are not set there as comments with their defaults.

`python deploy/settings.py` writes; a test compares the files with `render`. So whatever can be set is found where it
is set, and nothing is there that no service reads.
"""

import importlib
from pathlib import Path

from pydantic import SecretStr

from treadle_service.settings import ServiceSettings

BASE = Path(__file__).resolve().parent / "kustomize/base"
ROLES = ("gateway", "trainer", "sampler", "store")
MARK = "# Written by `python deploy/settings.py`; set where the manifests say so, or in an overlay:\n"
FOR_TESTS = frozenset({"failpoints", "allow_failpoints", "address_file", "http_address_file"})
"""Settings that no deployment needs."""


def settings_of(role: str) -> type[ServiceSettings]:
    """Returns a role's settings class."""
    found: type[ServiceSettings] = getattr(
        importlib.import_module(f"treadle_{role}.settings"), f"{role.title()}Settings"
    )
    return found


def file_of(role: str) -> Path:
    """Returns where a role's settings are."""
    return BASE / role / "settings.env"


def variables_of(role: str) -> dict[str, str]:
    """Returns variable -> default as text of what an operator may set, by name of the variable."""
    found = {}
    for name, field in settings_of(role).model_fields.items():
        if name not in FOR_TESTS:
            default = "" if field.default_factory is not None or isinstance(field.default, SecretStr) else field.default
            found[f"TREADLE_{role.upper()}_{name.upper()}"] = "" if default is None else str(default)
    return dict(sorted(found.items()))


def render(role: str) -> str:
    """Returns a role's file with the list of what it does not set made anew."""
    own = file_of(role).read_text().split(MARK)[0]
    taken = {line.partition("=")[0] for line in own.splitlines() if not line.startswith("#")}
    rest = [f"# {name}={default}\n" for name, default in variables_of(role).items() if name not in taken]
    return own + MARK + "".join(rest)


if __name__ == "__main__":
    for known in ROLES:
        file_of(known).write_text(render(known))
