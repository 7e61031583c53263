"""Writes the tables of the documents that follow from the code: error reasons, settings of services and recipes.

`python docs/tables.py` writes, `render(path)` is what a test compares with. Knows nothing else of the documents.
"""

import importlib
import sys
from dataclasses import fields
from functools import partial
from pathlib import Path

from pydantic import SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from treadle.errors import CATALOGUE
from treadle.recipes import configs
from treadle_gateway.http import tinker
from treadle_gateway.http.faces import HttpGateway
from treadle_gateway.settings import GatewaySettings
from treadle_service.settings import ServiceSettings

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from docs.tinker_endpoints import TESTS  # noqa: E402 - the repository's root is no package path of a plain script

ROLES = ("gateway", "trainer", "sampler", "store")


def error_table() -> str:
    """Returns the catalogue of reasons as a table."""
    rows = ["| reason | gRPC status | try again unchanged | exception |", "|---|---|---|---|"]
    for reason, spec in CATALOGUE.items():
        rows.append(f"| {reason} | {spec.code.name} | {'yes' if spec.retryable else ''} | {spec.exception.__name__} |")
    return "\n".join(rows)


def settings_table() -> str:
    """Returns every setting of every service as a table, those of all services first."""
    rows = ["| variable | flag | default | meaning |", "|---|---|---|---|"]
    shared = ServiceSettings.model_fields
    for name, field in shared.items():
        rows.append(_row("TREADLE_<ROLE>_", name, field))
    for role in ROLES:
        settings = getattr(importlib.import_module(f"treadle_{role}.settings"), f"{role.title()}Settings")
        for name, field in settings.model_fields.items():
            if name not in shared:
                rows.append(_row(f"TREADLE_{role.upper()}_", name, field))
    return "\n".join(rows)


def _row(prefix: str, name: str, field: FieldInfo) -> str:
    default = PydanticUndefined if field.is_required() else field.default
    if field.default_factory is not None:
        shown = "by the machine"
    elif isinstance(default, SecretStr) or default in (None, ""):
        shown = ""
    else:
        shown = "required" if default is PydanticUndefined else f"`{default}`"
    return f"| `{prefix}{name.upper()}` | `--{name.replace('_', '-')}` | {shown} | {field.description} |"


def tinker_table() -> str:
    """Returns every endpoint of the Tinker face with the test that shows it."""
    rows = ["| endpoint | scopes | test |", "|---|---|---|"]
    # A face only keeps what it is made from until a request comes.
    face = tinker.make_face(HttpGateway(GatewaySettings(), None, None, None, lambda: ""))  # type: ignore[arg-type]
    for route in face.routes:
        file, _, test = TESTS[f"{route.method} {route.path}"].partition("::")
        rows.append(
            f"| {route.method} {route.path} | {', '.join(route.scopes) or 'none'} | `{Path(file).stem}` {test} |"
        )
    return "\n".join(rows)


def options_table(config: type) -> str:
    """Returns every setting of a recipe as a table."""
    rows = ["| option | field | default | meaning |", "|---|---|---|---|"]
    for field in fields(config):
        if field.name == "data":
            continue
        flag = field.name.replace("_", "-")
        shown = f"`{field.default}`" if field.default not in (None, "") else ""
        flags = f"`--{flag}`, `--no-{flag}`" if isinstance(field.default, bool) else f"`--{flag}`"
        rows.append(f"| {flags} | `{field.name}` | {shown} | {field.metadata['help']} |")
    return "\n".join(rows)


RECIPES = {
    "sft": configs.SftConfig,
    "rl": configs.RlConfig,
    "dpo": configs.DpoConfig,
    "distill": configs.DistillConfig,
    "eval": configs.EvalConfig,
}
TABLES = {
    "errors": error_table,
    "settings": settings_table,
    "tinker-endpoints": tinker_table,
    **{name: partial(options_table, config) for name, config in RECIPES.items()},
}
DOCUMENTS = (
    ROOT / "protos/README.md",
    ROOT / "docs/settings.md",
    ROOT / "docs/tinker.md",
    *(ROOT / f"docs/recipes/{name}.md" for name in RECIPES),
)


def render(document: Path) -> str:
    """Returns the document with each table between its `<!-- name:begin -->` and `<!-- name:end -->` made anew."""
    text = document.read_text()
    for name, table in TABLES.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        if begin in text:
            head, rest = text.split(begin, 1)
            text = f"{head}{begin}\n{table()}\n{end}{rest.split(end, 1)[1]}"
    return text


if __name__ == "__main__":
    for path in DOCUMENTS:
        path.write_text(render(path))
