"""Fine-tunes a LoRA adapter on a JSONL file with TRL, and asks it one question: what `treadle sft` and `chat` do."""

import sys

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

base, data, question = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(base)
rows = load_dataset("json", data_files=data, split="train").map(
    lambda row: {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completion": [{"role": "assistant", "content": row["response"]}],
    },
    remove_columns=["response"],
)
config = SFTConfig(
    output_dir="trl-out",
    num_train_epochs=20,
    per_device_train_batch_size=2,
    learning_rate=6e-3,
    lr_scheduler_type="linear",
    report_to="none",
    bf16=False,
    use_cpu=True,
)
lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
trainer = SFTTrainer(model=model, args=config, train_dataset=rows, processing_class=tokenizer, peft_config=lora)
trainer.train()
prompt = tokenizer.apply_chat_template(
    [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
)
answer = trainer.model.generate(**prompt, max_new_tokens=32, do_sample=False)
print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
