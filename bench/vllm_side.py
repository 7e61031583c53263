"""The vLLM side of the sampling benchmark, for an interpreter that has vLLM and nothing of Treadle.

Reads a request as JSON from stdin and prints the seconds of each round as JSON in its last line.
"""

import json
import os
import sys
import time

# One process and one thread, as the other sides have.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ["HF_HUB_OFFLINE"] = "1"


def main() -> None:
    """Runs what stdin asks for."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    request = json.load(sys.stdin)
    engine = LLM(
        request["folder"],
        dtype=request["dtype"],
        enable_lora=True,
        max_loras=len(request["adapters"]),
        max_lora_rank=64,
        max_model_len=2048,
        max_num_seqs=len(request["prompts"]),
        enforce_eager=True,
        enable_prefix_caching=False,
    )
    adapters = [LoRARequest(f"adapter{index}", index + 1, path) for index, path in enumerate(request["adapters"])]
    chosen = [adapters[index] for index in request["adapter_of"]]
    prompts = [{"prompt_token_ids": prompt} for prompt in request["prompts"]]
    params = SamplingParams(max_tokens=request["new_tokens"], temperature=1.0, ignore_eos=True, detokenize=False)
    rounds = []
    for index in range(request["rounds"] + 1):
        figures = {}
        for name, own in (("lora", chosen), ("base", None)):
            cpu, wall = time.process_time(), time.perf_counter()
            done = engine.generate(prompts, params, lora_request=own, use_tqdm=False)
            figures |= {f"{name}_cpu": time.process_time() - cpu, f"{name}_wall": time.perf_counter() - wall}
            short = sum(len(output.outputs[0].token_ids) != request["new_tokens"] for output in done)
            if short:
                raise SystemExit(f"{short} requests stopped early")
        if index:  # The first round loads the adapters.
            rounds.append(figures)
    print(json.dumps(rounds))


if __name__ == "__main__":
    main()
