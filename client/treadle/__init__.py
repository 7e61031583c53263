"""Treadle's client: fine-tune and sample LoRA adapters on a shared base model, from an ordinary Python loop.

Names load on first use, so that `import treadle` costs next to nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from treadle import errors as errors
    from treadle import types as types
    from treadle.client import ServiceClient as ServiceClient
    from treadle.errors import TreadleError as TreadleError
    from treadle.futures import Handle as Handle
    from treadle.sampling import SamplingClient as SamplingClient
    from treadle.training import TrainingClient as TrainingClient
    from treadle.types import AdamParams as AdamParams
    from treadle.types import Datum as Datum
    from treadle.types import LoraConfig as LoraConfig
    from treadle.types import ModelInput as ModelInput
    from treadle.types import SamplingParams as SamplingParams
    from treadle.types import TensorData as TensorData

_MODULE_OF: Final = {
    "AdamParams": "treadle.types",
    "Datum": "treadle.types",
    "Handle": "treadle.futures",
    "LoraConfig": "treadle.types",
    "ModelInput": "treadle.types",
    "SamplingClient": "treadle.sampling",
    "SamplingParams": "treadle.types",
    "ServiceClient": "treadle.client",
    "TensorData": "treadle.types",
    "TrainingClient": "treadle.training",
    "TreadleError": "treadle.errors",
}
_MODULES: Final = ("errors", "types")

__all__ = [
    "AdamParams",
    "Datum",
    "Handle",
    "LoraConfig",
    "ModelInput",
    "SamplingClient",
    "SamplingParams",
    "ServiceClient",
    "TensorData",
    "TrainingClient",
    "TreadleError",
    "errors",
    "types",
]


def __getattr__(name: str) -> Any:  # Classes and modules alike.
    if name in _MODULES:
        return importlib.import_module(f"treadle.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'treadle' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
