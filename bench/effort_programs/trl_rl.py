"""Trains a LoRA adapter on a reward with TRL's GRPO: what `treadle rl` does."""

import sys

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

base, data = sys.argv[1:]


def friends(completions: list[list[dict[str, str]]], **_: object) -> list[float]:
    return [float(one[0]["content"].strip().endswith("They were friends from that day on.")) for one in completions]


model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
rows = load_dataset("json", data_files=data, split="train").map(
    lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]}
)
config = GRPOConfig(
    output_dir="trl-out",
    max_steps=4,
    per_device_train_batch_size=24,
    num_generations=6,
    max_completion_length=64,
    learning_rate=2e-3,
    lr_scheduler_type="constant",
    beta=0.0,
    report_to="none",
    bf16=False,
    use_cpu=True,
)
lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
trainer = GRPOTrainer(
    model=model,
    reward_funcs=friends,
    args=config,
    train_dataset=rows,
    processing_class=AutoTokenizer.from_pretrained(base),
    peft_config=lora,
)
trainer.train()
print("reward", [row["reward"] for row in trainer.state.log_history if "reward" in row])
