"""Reward functions of the user's own: found by name, called with a row and a completion, checked."""

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from treadle.errors import BadInputError
from treadle.recipes.rows import Row

# Any: a row holds whatever its file held.
Reward = Callable[[Mapping[str, Any], str], float]
"""reward(row, completion) -> a number; `row` has the columns of the file, `completion` is without special tokens."""


def load_reward(name: str) -> Reward:
    """Returns the function that `module:function` or `file.py:function` names; raises BadInputError.

    Modules of the current folder are found too.
    """
    place, colon, attribute = name.rpartition(":")
    if not colon or not place or not attribute:
        raise BadInputError(f"{name!r} names no reward function; it looks like rewards:ends_well or file.py:name")
    found = getattr(_module(place), attribute, None)
    if not callable(found):
        raise BadInputError(f"{place} has no function {attribute!r}")
    reward: Reward = found
    return reward


def score(reward: Reward, row: Row, completion: str) -> float:
    """Returns what the completion is worth; what the function raises names the row."""
    try:
        worth = float(reward(row.values, completion))
    except Exception as error:
        error.add_note(f"in the reward of {row.where} for the completion {completion[:200]!r}")
        raise
    if not math.isfinite(worth):
        raise BadInputError(f"the reward of {row.where} is {worth} for the completion {completion[:200]!r}")
    return worth


def _module(place: str) -> ModuleType:
    if place.endswith(".py"):
        path = Path(place)
        spec = importlib.util.spec_from_file_location(path.stem, path) if path.is_file() else None
        if spec is None or spec.loader is None:
            raise BadInputError(f"there is no file {place}")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        raise BadInputError(f"there is no module {place!r}, also not in this folder ({error})") from error
