"""An adapter's PEFT folder made into what others load: a merged model, or a folder without the unembedding.

Run as `python -m treadle_engine.export`; reads {"what": "merged" | "drop_unembed" | "merge_unembed", "adapter": folder,
"out": folder, "base": folder or hub name, "dtype": name} from standard input. Merging is peft's. Needs no service.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from treadle_engine.errors import EngineError
from treadle_engine.peft_format import CONFIG_FILE, WEIGHTS_FILE

UNEMBED = "lm_head"
BASE_FOLDER = "base"


def merged(base: str, adapter: Path, out: Path, dtype: str = "auto") -> None:
    """Write the base with the adapter added to its weights, as a folder that transformers, vLLM and others load."""
    from peft import PeftModel

    model = _load(base, dtype)
    if _adapts_unembed(adapter):
        _untie(model)
    whole = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    whole.save_pretrained(out)
    _save_tokenizer(base, out)


def drop_unembed(adapter: Path, out: Path) -> None:
    """Write the adapter without its part for the unembedding, which vLLM does not load; its effect is lost."""
    tensors = {name: value for name, value in load_file(adapter / WEIGHTS_FILE).items() if f".{UNEMBED}." not in name}
    if not tensors:
        raise EngineError("INCOMPATIBLE_ADAPTER", "the adapter has nothing but the unembedding")
    settings = _settings(adapter)
    targets = settings["target_modules"]
    settings["target_modules"] = [name for name in targets if name.rpartition(".")[2] != UNEMBED]
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / WEIGHTS_FILE, metadata={"format": "pt"})
    (out / CONFIG_FILE).write_text(json.dumps(settings, indent=2, sort_keys=True))


def merge_unembed(base: str, adapter: Path, out: Path, dtype: str = "auto") -> None:
    """Write the adapter without the unembedding, and in `out/base` the base with the unembedding's part merged in.

    Together they compute what the whole adapter does on the plain base. Tied embeddings are untied.
    """
    drop_unembed(adapter, out)
    model = _load(base, dtype)
    if _adapts_unembed(adapter):
        _untie(model)
        tensors = load_file(adapter / WEIGHTS_FILE)
        pair = [next(v for k, v in tensors.items() if f".{UNEMBED}.lora_{letter}." in k) for letter in "AB"]
        settings = _settings(adapter)
        head = model.get_output_embeddings().weight
        with torch.no_grad():
            product = pair[1].float() @ pair[0].float() * (settings["lora_alpha"] / settings["r"])
            head.copy_((head.float() + product).to(head.dtype))
    model.save_pretrained(out / BASE_FOLDER)
    _save_tokenizer(base, out / BASE_FOLDER)
    settings = _settings(out)
    settings["base_model_name_or_path"] = BASE_FOLDER
    (out / CONFIG_FILE).write_text(json.dumps(settings, indent=2, sort_keys=True))


def _load(base: str, dtype: str) -> Any:  # transformers' models share no type that mypy can see.
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype="auto" if dtype == "auto" else getattr(torch, dtype))


def _untie(model: Any) -> None:
    """Gives the unembedding weights of its own, so that what is added to them does not change the embeddings."""
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False


def _save_tokenizer(base: str, out: Path) -> None:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(base).save_pretrained(out)


def _settings(adapter: Path) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((adapter / CONFIG_FILE).read_text())
    return settings


def _adapts_unembed(adapter: Path) -> bool:
    from safetensors import safe_open

    with safe_open(adapter / WEIGHTS_FILE, framework="pt") as opened:
        return any(f".{UNEMBED}." in name for name in opened.keys())  # noqa: SIM118 - not a mapping


def main() -> None:
    """Does what standard input asks for."""
    asked = json.load(sys.stdin)
    what, adapter, out = asked["what"], Path(asked["adapter"]), Path(asked["out"])
    try:
        if what == "drop_unembed":
            drop_unembed(adapter, out)
        else:
            {"merged": merged, "merge_unembed": merge_unembed}[what](asked["base"], adapter, out, asked["dtype"])
    except (EngineError, OSError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
