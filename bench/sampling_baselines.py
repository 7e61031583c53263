"""What others do with the same prompts and adapters: transformers' generate, PEFT's mixed batch, vLLM.

Every side samples the same number of tokens after the same prompts at temperature 1 and never stops early. They
share no code with the engine.
"""

# Shape suffix legend
#   S = requests of a batch, L = longest prompt

from __future__ import annotations

import json
import subprocess
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from treadle_engine.lora import AdapterWeights

_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_VLLM_SIDE = Path(__file__).with_name("vllm_side.py")


@dataclass(frozen=True)
class Load:
    """The requests of a benchmark: prompts, whose adapter each one uses, and how many tokens each one gets."""

    prompts: tuple[tuple[int, ...], ...]
    adapter_of: tuple[int, ...]
    new_tokens: int


class PeftModel:
    """One base with every adapter of the load, as PEFT holds them."""

    def __init__(self, folder: str, dtype: torch.dtype, adapters: Sequence[AdapterWeights]) -> None:
        """Load the base and copy the adapters."""
        base: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self.plain: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        for index, weights in enumerate(adapters):
            config = peft.LoraConfig(
                r=weights.config.rank, lora_alpha=int(weights.config.alpha), target_modules=_LINEARS
            )
            if index == 0:
                self.model = peft.get_peft_model(base, config, adapter_name="adapter0")
            else:
                self.model.add_adapter(f"adapter{index}", config)
        parameters = dict(self.model.named_parameters())
        for index, weights in enumerate(adapters):
            for name, tensor in weights.to_tensors().items():
                parameters[f"base_model.model.{name.removesuffix('.weight')}.adapter{index}.weight"].data.copy_(tensor)
        self.model.eval()
        self.plain.eval()

    def save(self, folder: Path) -> list[Path]:
        """Write every adapter as a folder of PEFT files."""
        self.model.save_pretrained(folder)
        return [folder / name for name in self.model.peft_config]


class SequentialGenerate:
    """`generate` for one request after the other; requests of one adapter follow each other, as suits `set_adapter`."""

    name = "transformers.generate, one request at a time"

    def __init__(self, held: PeftModel, load: Load) -> None:
        """Sample the load on `held`."""
        self._held, self._load = held, load

    def run(self) -> int:
        """Sample every request; return the number of new tokens."""
        total = 0
        active = -1
        for adapter, prompt in sorted(zip(self._load.adapter_of, self._load.prompts, strict=True)):
            if adapter != active:
                self._held.model.set_adapter(f"adapter{adapter}")
                active = adapter
            total += _generate(self._held.model, [prompt], self._load.new_tokens)
        return total


class PaddedGenerate:
    """`generate` on one left-padded batch, all of it with one adapter: nothing to mix."""

    name = "transformers.generate, one padded batch, one adapter"

    def __init__(self, held: PeftModel, load: Load) -> None:
        """Sample the load on `held`."""
        self._held, self._load = held, load

    def run(self) -> int:
        """Sample every request; return the number of new tokens."""
        self._held.model.set_adapter("adapter0")
        return _generate(self._held.model, self._load.prompts, self._load.new_tokens)


class MixedGenerate:
    """`generate` on one left-padded batch with PEFT's `adapter_names`, which names an adapter for each row."""

    name = "peft.generate, mixed batch (adapter_names)"

    def __init__(self, held: PeftModel, load: Load) -> None:
        """Sample the load on `held`."""
        self._held, self._load = held, load

    def run(self) -> int:
        """Sample every request; return the number of new tokens."""
        names = [f"adapter{adapter}" for adapter in self._load.adapter_of]
        return _generate(self._held.model, self._load.prompts, self._load.new_tokens, adapter_names=names)


class ContinuousGenerate:
    """Transformers' continuous batching on the base alone: it has no adapter per row."""

    name = "transformers.generate_batch (continuous), base alone"

    def __init__(self, held: PeftModel, load: Load) -> None:
        """Sample the load on the plain base of `held`."""
        self._model, self._load = held.plain, load
        self._config = GenerationConfig(max_new_tokens=load.new_tokens, do_sample=True, eos_token_id=-1, pad_token_id=0)

    def run(self) -> int:
        """Sample every request; return the number of new tokens."""
        inputs = [list(prompt) for prompt in self._load.prompts]
        done = self._model.generate_batch(inputs, generation_config=self._config, progress_bar=False)
        return sum(len(output.generated_tokens) for output in done.values())


def run_vllm(
    python: str, folder: str, dtype: str, adapters: Sequence[Path], load: Load, rounds: int
) -> list[dict[str, float]]:
    """Sample the load with vLLM under another interpreter; return the seconds of each round, with LoRA and without.

    A round is `{"lora_wall", "lora_cpu", "base_wall", "base_cpu"}`. vLLM pins its own torch and transformers, which is
    why it lives in an environment of its own; it runs on one thread.
    """
    request = {
        "folder": folder,
        "dtype": dtype,
        "adapters": [str(path) for path in adapters],
        "prompts": load.prompts,
        "adapter_of": load.adapter_of,
        "new_tokens": load.new_tokens,
        "rounds": rounds,
    }
    done = subprocess.run(
        [python, "-P", str(_VLLM_SIDE)], input=json.dumps(request), stdout=subprocess.PIPE, text=True, check=True
    )
    answer: list[dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return answer


@torch.inference_mode()
def _generate(
    model: peft.PeftModel, prompts: Sequence[Sequence[int]], new_tokens: int, adapter_names: list[str] | None = None
) -> int:
    tokens_SL, mask_SL = _left_padded(prompts)
    extra = {} if adapter_names is None else {"adapter_names": adapter_names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out_SL = model.generate(
            input_ids=tokens_SL,
            attention_mask=mask_SL,
            do_sample=True,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            pad_token_id=0,
            **extra,
        )
    return int((out_SL.shape[1] - tokens_SL.shape[1]) * out_SL.shape[0])


def _left_padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    shape = (len(prompts), max(len(prompt) for prompt in prompts))
    tokens_SL, mask_SL = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        tokens_SL[row, shape[1] - len(prompt) :] = torch.tensor(prompt)
        mask_SL[row, shape[1] - len(prompt) :] = 1
    return tokens_SL, mask_SL
