"""Loads an exported adapter with `peft` on the plain Hugging Face base and lets it answer, as any user could.

Run as `python -m treadle_engine.peft_check`; reads {"base": folder, "adapter": folder, "prompts": [[ids]],
"max_tokens": n, "stop": id} from standard input and prints {"completions": [[ids]]}. It uses nothing of Treadle: its
agreement with the sampler is therefore evidence that the export is right.
"""

import json
import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


def complete(base: str, adapter: str, prompts: list[list[int]], max_tokens: int, stop: int) -> list[list[int]]:
    """Returns greedy completions, the stop token included, computed in float32 by transformers' `generate`."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(model, adapter).eval()
    completions = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            output = adapted.generate(  # type: ignore[no-untyped-call]
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_tokens,
                do_sample=False,
                eos_token_id=stop,
                pad_token_id=stop,
            )
        completions.append(output[0, len(prompt) :].tolist())
    return completions


if __name__ == "__main__":
    print(json.dumps({"completions": complete(**json.load(sys.stdin))}))
