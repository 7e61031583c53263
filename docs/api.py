"""Writes docs/api.md, the reference of what users import, from docstrings; `render()` is what a test compares with."""

import dataclasses
import importlib
import inspect
import re
from pathlib import Path
from typing import Any, get_origin

PAGE = Path(__file__).resolve().parent / "api.md"
HEAD = """# Reference

Written by `python docs/api.py` from the docstrings. Calls of the training and sampling clients return a `Handle` at
once; calls of the service client wait for their answer.
"""
# What a user imports, by module; None for all public names that the module itself defines.
MODULES: dict[str, tuple[str, ...] | None] = {
    "treadle.client": ("ServiceClient",),
    "treadle.training": ("TrainingClient",),
    "treadle.sampling": ("SamplingClient", "SampleStream"),
    "treadle.futures": ("Handle",),
    "treadle.types": None,
    "treadle.records": None,
    "treadle.errors": None,
    "treadle.recipes.configs": None,
    "treadle.recipes.sft": ("sft", "SftResult"),
    "treadle.recipes.rl": ("rl", "RlResult"),
    "treadle.recipes.dpo": ("dpo", "DpoResult"),
    "treadle.recipes.distill": ("distill", "DistillResult"),
    "treadle.recipes.evaluate": ("evaluate", "EvalResult"),
    "treadle.recipes.reports": ("Observer", "Observers", "Report"),
    "treadle.recipes.trackers": ("open_tracker",),
    "treadle.recipes.job": ("StoppedError",),
    "treadle.recipes.rows": ("DataError", "Row", "read_rows"),
    "treadle.recipes.examples": ("Example", "encode_row", "encode_prompt", "messages_of", "prompt_of", "fit", "Cuts"),
    "treadle.recipes.chat": ("chat_datum", "completion_datum", "policy_datum", "prompt_tokens"),
    "treadle.recipes.loops": ("sft_steps", "rl_steps", "StepReport"),
}


def render() -> str:
    """Returns the page."""
    return "\n".join([HEAD, *(_module(name, wanted) for name, wanted in MODULES.items())])


def _module(name: str, wanted: tuple[str, ...] | None) -> str:
    module = importlib.import_module(name)
    parts = [f"## {name}\n", _paragraphs(module), ""]
    for each in wanted or _public(module):
        parts.append(_described(each, getattr(module, each)))
    return "\n".join(parts)


def _public(module: Any) -> list[str]:
    """Returns the classes and functions that a module defines, in their order there."""
    found = [(name, value) for name, value in vars(module).items() if not name.startswith("_")]
    own = [(n, v) for n, v in found if inspect.isclass(v) or inspect.isfunction(v)]
    own = [(n, v) for n, v in own if v.__module__ == module.__name__]
    return [n for n, v in sorted(own, key=lambda item: inspect.getsourcelines(item[1])[1])]


def _described(name: str, value: Any) -> str:
    if not inspect.isclass(value):
        return f"### {name}\n\n```\n{_signature(name, value)}\n```\n\n{_paragraphs(value)}\n"
    lines = [f"### {name}\n", _paragraphs(value), ""]
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            text = field.metadata.get("help", "")
            lines.append(f"- `{field.name}: {_annotation(field.type)}`{_default(field)}{': ' + text if text else ''}")
        lines.append("")
    for method_name, method in inspect.getmembers(value):
        function = method.fget if isinstance(method, property) else method
        if method_name.startswith("_") or not inspect.isroutine(function) or not inspect.getdoc(function):
            continue
        if not getattr(function, "__module__", "").startswith("treadle"):
            continue
        kind = "property" if isinstance(method, property) else "method"
        head = method_name if kind == "property" else _signature(method_name, function)
        lines.append(f"#### {name}.{method_name}\n\n```\n{head}\n```\n\n{_paragraphs(function)}\n")
    return "\n".join(lines)


def _signature(name: str, function: Any) -> str:
    signature = str(inspect.signature(function)).replace("'", "").replace("(self, ", "(").replace("(self)", "()")
    return name + _without_modules(signature)


def _annotation(kind: Any) -> str:
    return _without_modules(kind if isinstance(kind, str) else str(kind) if get_origin(kind) else kind.__name__)


def _without_modules(text: str) -> str:
    return re.sub(r"\b(?:[a-z_]+\.)+(?=[A-Za-z])", "", text)


def _default(field: Any) -> str:
    if field.default is not dataclasses.MISSING:
        return f" = `{field.default!r}`"
    return "" if field.default_factory is dataclasses.MISSING else " = empty"


def _paragraphs(value: Any) -> str:
    return inspect.getdoc(value) or ""


if __name__ == "__main__":
    PAGE.write_text(render())
