"""A base without its weights: what a process must know of it that has another engine compute.

Adapters are read and written against it as against the base itself. Knows no engine.
"""

from __future__ import annotations

from typing import Self

import torch

from treadle_engine.base_model import BaseInfo, choose_dtype, describe, find_sites
from treadle_engine.loading import find_linears, load_outline
from treadle_engine.lora import LoraConfig, LoraSite


class BaseOutline:
    """A base's facts and sites; its adapters are on the CPU."""

    def __init__(self, info: BaseInfo, sites: tuple[LoraSite, ...], dtype: torch.dtype) -> None:
        """Stand for the base of these facts; use `load` to get one."""
        self.info, self.sites, self.dtype = info, sites, dtype
        self.device = torch.device("cpu")

    @classmethod
    def load(cls, path_or_name: str, *, name: str, dtype: str, device: str) -> Self:
        """Read the description of a folder or a cached hub name; `device` is the other engine's; UNKNOWN_BASE."""
        chosen = choose_dtype(dtype, torch.device(device))
        model, _ = load_outline(path_or_name, chosen)
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        info = describe(model, path_or_name, name, "none", num_parameters)
        return cls(info, find_sites(find_linears(model)), chosen)

    def lora_sites(self, config: LoraConfig) -> tuple[LoraSite, ...]:
        """Return the sites that `config` adapts, by rising index."""
        return tuple(site for site in self.sites if config.covers(site.kind))
