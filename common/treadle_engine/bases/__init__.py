"""Where a base model's files come from: the two bases that need no hub, and everything else.

`resolve` turns what a person wrote in a setting ("smollm2", "pip", a folder, a hub name) into a folder (or hub
name) that `BaseModel.load` can read and the public name that clients see. It loads no model and imports torch
only when a conversion has to be made; for the two bundled bases it never touches a network.
"""

from __future__ import annotations

from pathlib import Path

from treadle_engine.bases.smollm2 import SMOLLM2_NAME, materialize_smollm2
from treadle_engine.errors import EngineError

PIP_NAME = "treadle/pip"
"""Public name of the tiny bundled base."""

ALIASES = {"smollm2": SMOLLM2_NAME, "pip": PIP_NAME}
"""Short names that a person may write instead of the public ones."""

__all__ = ["ALIASES", "PIP_NAME", "SMOLLM2_NAME", "pip_folder", "resolve", "served_name"]


def pip_folder() -> Path:
    """Return the package-data folder that holds Pip, the 0.87 M parameter base."""
    return Path(__file__).resolve().parent.parent / "data" / "pip"


def resolve(base: str, cache_dir: Path, dtype: str = "float32") -> tuple[str, str]:
    """Return `(folder or hub name, public name)` of `base`; convert SmolLM2 into `cache_dir` on first use.

    `dtype` ("float32" or "bfloat16") is the type in which a converted base is stored: what is served is what is
    on disk, so that processes on one machine can map the same pages. Raises EngineError UNKNOWN_BASE.
    """
    name = ALIASES.get(base, base)
    if name == PIP_NAME:
        return str(pip_folder()), name
    if name == SMOLLM2_NAME:
        return str(materialize_smollm2(cache_dir, dtype)), name
    if not base:
        raise EngineError("UNKNOWN_BASE", "the base is empty: give 'smollm2', 'pip', a folder or a hub name")
    folder = Path(base).expanduser()
    if folder.is_dir():
        return str(folder), folder.resolve().name
    if folder.is_absolute() or base.startswith(("./", "../", "~")):
        raise EngineError("UNKNOWN_BASE", f"the base folder {base} does not exist")
    return base, base


def served_name(name: str, quantize: str = "none") -> str:
    """Return the name under which a base is served: other weights are another base, whose runs must not be mixed."""
    return name if quantize == "none" else f"{name}@{quantize}"
