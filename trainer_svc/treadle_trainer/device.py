"""The torch side of the trainer: the base, the training state of each resident run, and what is done to them.

Two threads call it (see executor): one for passes, one for all that runs beside them. It takes and gives plain values:
names, numpy batches, bytes. It does not know the order of operations, tenants, the journal or the wire, and leaves it
to its caller that nothing changes a run while another call uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from treadle_engine.allocator import keep_freed_memory
from treadle_engine.base_model import BaseInfo, BaseModel
from treadle_engine.batch import TokenBatch
from treadle_engine.determinism import settle
from treadle_engine.errors import EngineError
from treadle_engine.lora import AdapterLayout, AdapterWeights, LoraConfig
from treadle_engine.losses import LossSpec
from treadle_engine.numerics import numerics
from treadle_engine.optim import (
    AdamParams,
    ParkedState,
    TrainState,
    add_gradients,
    optim_step,
    park,
    restore,
    state_tensors,
    unpark,
)
from treadle_engine.passes import Chunk, ChunkResult, TrainingEngine
from treadle_engine.peft_format import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    config_file,
    from_files,
    to_files,
    warm_up,
    weights_parts,
)
from treadle_engine.rank_group import RankGroup
from treadle_engine.spare_buffers import SpareBuffers
from treadle_engine.tensor_files import Parts, read_tensors, write_parts
from treadle_service.logs import get_logger
from treadle_trainer import probe
from treadle_trainer.budget import PassBudget, choose_budget
from treadle_trainer.operations import RANK_BYTES

OPTIMIZER_FILE: Final = "optimizer.safetensors"
log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class PassChunk:
    """One chunk of a pass, by the name of its run."""

    run: str
    batch: TokenBatch
    loss: LossSpec
    forward_only: bool
    apart: bool = False
    """The gradient goes into the result, not to what the run has."""


@dataclass(frozen=True, slots=True)
class Stepped:
    """What an optimizer step or a load left behind.

    `digest` is that of the run's state, with the number of ranks behind it if they are several: they add up in another
    order, so that only digests of equally many can be compared.
    """

    step: int
    digest: bytes
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True)
class StateCopy:
    """A run's state at a step boundary, serialized as safetensors, in memory or in a file."""

    data: bytes | Path
    size: int
    step: int
    digest: bytes


class Device:
    """A base and the runs that live on it."""

    def __init__(self, base: BaseModel, budget: PassBudget) -> None:
        """Serves `base` with passes within `budget`."""
        self._base = base
        self.budget = budget
        """What a pass may hold; safe to read from any thread."""
        self._engine = TrainingEngine(base, budget.max_tokens)
        self._states: dict[str, TrainState] = {}
        self._parked: dict[str, ParkedState] = {}
        self._guests: dict[str, AdapterWeights] = {}
        self._spare = SpareBuffers()

    @property
    def info(self) -> BaseInfo:
        """Facts about the base; safe to read from any thread."""
        return self._base.info

    def split(self, batch: TokenBatch, *, limited: bool = True) -> list[TokenBatch]:
        """Cuts a batch into chunks by its own content; touches no state, safe from any thread.

        SEQUENCE_TOO_LONG if a datum is longer than a pass may be, unless it is not `limited`.
        """
        return self._engine.split(batch, limited=limited)

    def join_thread(self) -> None:
        """Gives the calling thread as many torch threads as the loading one has: sums depend on their number."""
        torch.set_num_threads(torch.get_num_threads())

    @staticmethod
    def warm_up() -> None:
        """Does what the first export would have to wait for, about two seconds; safe from any thread."""
        warm_up()

    def rest(self) -> None:
        """Does nothing: when its turn has come, all calls before it are done."""

    def num_bytes(self, config: LoraConfig) -> int:
        """Returns the memory of a run of this shape, without its gradient; safe from any thread."""
        layout = AdapterLayout(self._base.lora_sites(config), config.rank)
        return 3 * 4 * layout.num_elements

    def park(self, run: str) -> None:
        """Moves a run without gradient to host memory; it must be brought back before it is used."""
        state = self._states[run]
        self._parked[run] = park(state)
        self._spare.put(state.grads)
        del self._states[run]

    def unpark(self, run: str) -> None:
        """Brings a parked run back."""
        parked = self._parked[run]
        self._states[run] = unpark(self._base, parked, self._spare.take(parked.tensors["weights"].numel()))
        del self._parked[run]

    def create(self, run: str, config: LoraConfig) -> None:
        """Starts a run from its seed."""
        self._states[run] = TrainState.fresh(AdapterWeights.init(self._base, config))

    def restore(self, run: str, config: LoraConfig, data: bytes | Path, digest: bytes) -> int:
        """Starts a run from a StateCopy's content, which must have its digest; returns its `num_failed`.

        BAD_ADAPTER_FILE or INCOMPATIBLE_ADAPTER if it is none of the run's, CHECKSUM_MISMATCH if it was damaged.
        """
        tensors = read_tensors(data, "the snapshot")
        layout = AdapterLayout(self._base.lora_sites(config), config.rank)
        state = restore(self._base, config, tensors, self._spare.take(layout.num_elements))
        if bytes.fromhex(state.digest()) != digest:
            raise EngineError("CHECKSUM_MISMATCH", f"the snapshot of {run} is not what was stored")
        self._states[run] = state
        return int(tensors["num_failed"])

    def drop(self, run: str) -> None:
        """Forgets a run."""
        self._states.pop(run, None)
        self._parked.pop(run, None)

    def run_pass(self, chunks: Sequence[PassChunk]) -> list[ChunkResult]:
        """Runs one pass; each chunk's failure is in its own result, and so is its gradient if it is wanted apart."""
        states = [self.apart(chunk.run) if chunk.apart else self._states[chunk.run] for chunk in chunks]
        results = self._engine.run_pass(
            [
                Chunk(state, chunk.batch, chunk.loss, chunk.forward_only)
                for state, chunk in zip(states, chunks, strict=True)
            ]
        )
        for state, chunk, result in zip(states, chunks, results, strict=True):
            if chunk.apart and not chunk.forward_only and result.error is None:
                result.gradient = state.grads.cpu().numpy()
        return results

    def numerics(self) -> str:
        """Returns what the bits of passes depend on; runs one, so on their thread."""
        return numerics(self._base)

    def copy_weights(self, run: str) -> tuple[bytes, bytes]:
        """Returns a run's weights, flat float32, and their xxh3-128."""
        data = self._states[run].weights.flat.detach().cpu().numpy().tobytes()
        return data, xxhash.xxh3_128_digest(data)

    def welcome(self, guest: str, config: LoraConfig, data: bytearray, digest: bytes) -> None:
        """Takes the weights of a run that another trainer holds; CHECKSUM_MISMATCH if they were damaged."""
        if xxhash.xxh3_128_digest(data) != digest:
            raise EngineError("CHECKSUM_MISMATCH", f"the weights for {guest} are not what was sent")
        # Copied into a buffer of its own: kernels may choose by alignment.
        flat = torch.frombuffer(data, dtype=torch.float32).to(self._base.device, copy=True)
        self._guests[guest] = AdapterWeights(self._base, config, flat)

    def dismiss(self, guest: str) -> None:
        """Forgets another trainer's run."""
        self._guests.pop(guest, None)

    def add_gradients(self, run: str, gradients: Sequence[NDArray[np.float32]]) -> None:
        """Adds what chunks gave that were computed apart, in this order."""
        add_gradients(self._states[run], gradients)

    def apart(self, run: str) -> TrainState:
        """Returns a state for one chunk of a run that is held here or elsewhere, with a gradient of zeros."""
        guest = self._guests.get(run)
        return self._engine.apart(self._states[run].weights if guest is None else guest)

    def optim_step(self, run: str, params: AdamParams) -> Stepped:
        """Applies and clears the run's gradient; NAN_GRADIENT drops it and changes nothing else."""
        state = self._states[run]
        metrics = optim_step(state, params)
        return Stepped(state.step, self._digest(state), metrics)

    def gradient(self, run: str) -> Tensor:
        """Returns the run's gradient itself."""
        return self._states[run].grads

    def clear_gradient(self, run: str) -> None:
        """Drops the run's gradient."""
        if run in self._states:
            self._states[run].clear_gradient()

    def copy_state(self, run: str, num_failed: int, into: Path | None = None) -> StateCopy:
        """Serializes the run's state as it is at its last step boundary, into a new file if one is given and possible.

        `num_failed` travels with it.
        """
        state = self._states.get(run) or self._parked[run]
        tensors = dict(state.tensors) if isinstance(state, ParkedState) else state_tensors(state)
        tensors["num_failed"] = torch.tensor([num_failed], dtype=torch.int64)
        step, digest = int(tensors["step"]), bytes.fromhex(state.digest())
        parts = Parts(tensors)
        if into is not None and _wrote(into, parts):
            return StateCopy(into, parts.num_bytes, step, digest)
        data = b"".join(parts)
        return StateCopy(data, len(data), step, digest)

    def export(
        self, run: str, *, with_optimizer: bool, into: Path | None = None
    ) -> tuple[dict[str, bytes | Path], int]:
        """Returns the run as PEFT files by name, and its step; the weights are written to `into` if there is one.

        With the optimizer's state the weights are float32, else in the dtype that the base computes in.
        """
        state = self._states[run]
        dtype = torch.float32 if with_optimizer else self._base.dtype
        files: dict[str, bytes | Path] = {}
        if into is None or not _wrote(into, weights_parts(state.weights, dtype)):
            files |= to_files(self._base, state.weights, dtype)
        else:
            files |= {CONFIG_FILE: config_file(self._base, state.weights.config), WEIGHTS_FILE: into}
        if with_optimizer:
            moments = {name: value for name, value in state_tensors(state).items() if name != "weights"}
            files[OPTIMIZER_FILE] = b"".join(Parts(moments))
        return files, state.step

    def load(self, run: str, config: LoraConfig, files: Mapping[str, bytes | Path], *, with_optimizer: bool) -> Stepped:
        """Replaces (or starts) a run by saved files that must fit `config`; clears the gradient.

        Without the optimizer's state the moments and the step count restart at zero.
        """
        read = from_files(self._base, files)
        if _shape(read.config) != _shape(config):
            raise EngineError(
                "INCOMPATIBLE_ADAPTER", f"the adapter is {_shape(read.config)}, the run is {_shape(config)}"
            )
        if with_optimizer:
            moments = read_tensors(files[OPTIMIZER_FILE], OPTIMIZER_FILE)
            state = restore(self._base, config, {**moments, "weights": read.flat})
        else:
            state = TrainState.fresh(AdapterWeights(self._base, config, read.flat))
        self._states[run] = state
        return Stepped(state.step, self._digest(state), {})

    def _digest(self, state: TrainState) -> bytes:
        shard = self._base.shard
        return bytes.fromhex(state.digest()) + (b"" if shard is None else shard.size.to_bytes(RANK_BYTES, "little"))


def load_device(
    path: str,
    name: str,
    *,
    dtype: str,
    device: str,
    quantize: str,
    threads: int,
    checkpoint_activations: bool,
    max_tokens_per_pass: int,
    target_pass_seconds: float,
    measure_cost: bool,
    group: RankGroup | None = None,
) -> Device:
    """Loads a base onto the device and finds out what passes cost; runs on the thread that will own it.

    In a group, all ranks load at the same time, each its part, and rank 0 says what a pass may hold.
    """
    settle(threads)
    keep_freed_memory()
    shard = None if group is None else group.shard
    base = BaseModel.load(path, name=name, dtype=dtype, device=device, quantize=quantize, shard=shard)
    base.checkpoint_activations = checkpoint_activations
    share: Callable[[float], float] = float if group is None else group.main.share
    cost = probe.measure(base, share) if measure_cost else None
    budget = choose_budget(max_tokens_per_pass, target_pass_seconds, cost, probe.device_memory(base.device))
    if group is not None:
        group.check_alike(base.info, checkpoint_activations)
        budget = group.main.share(budget)
    return Device(base, budget)


def _wrote(path: Path, parts: Parts) -> bool:
    """Writes a file in the shared folder; False when the folder cannot be written to."""
    try:
        write_parts(path, parts)
    except OSError as error:
        log.warning("shared_folder_unusable", path=str(path), error=str(error))
        path.unlink(missing_ok=True)
        return False
    return True


def _shape(config: LoraConfig) -> str:
    kinds = [kind for kind in ("attn", "mlp", "unembed") if getattr(config, f"train_{kind}")]
    return f"rank {config.rank}, alpha {config.alpha:g}, {'+'.join(kinds)}"
