"""The demo: two tenants on one base at the same time, one learning from examples, the other from a reward.

Each tenant is an ordinary program with its own key, its own connection and its own loop; only the service knows of
both. Returns what was seen; knows nothing of processes, progress bars or printing.
"""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from treadle.client import ServiceClient
from treadle.recipes.chat import ChatTokenizer, chat_datum, prompt_tokens, read_conversations
from treadle.recipes.loops import StepReport, completion_text, rl_steps, sft_steps
from treadle.recipes.tasks import DEMO_TASKS, RlTask, SftTask
from treadle.sampling import SamplingClient
from treadle.types import ModelInput, SamplingParams

OnStep = Callable[[str, StepReport], None]
"""Called with "sft" or "rl" and the report of each step, from that tenant's thread."""

RL_EVALUATION_SAMPLES = 4


@dataclass(frozen=True)
class Samples:
    """Held-out questions with one answer each before and after."""

    question: str
    before: str
    after: str


@dataclass(frozen=True)
class SftSeen:
    """What the first tenant saw."""

    task: str
    run: str
    revision: str
    losses: list[float]
    right_before: float
    """Share of held-out answers in the trained manner, greedy."""
    right_after: float
    samples: list[Samples]
    num_tokens: int


@dataclass(frozen=True)
class RlSeen:
    """What the second tenant saw."""

    task: str
    run: str
    revision: str
    rewards: list[float]
    """Mean reward of each step's own samples."""
    reward_before: float
    """Mean reward over the held-out questions, sampled."""
    reward_after: float
    samples: list[Samples]
    num_tokens: int


@dataclass(frozen=True)
class ExportSeen:
    """What `peft` made of the exported adapter."""

    folder: str
    num_equal: int
    """Held-out answers that plain transformers + peft gave exactly as the service did."""
    num_asked: int


@dataclass(frozen=True)
class DemoSeen:
    """Everything that the demo saw."""

    base: str
    sft: SftSeen
    rl: RlSeen
    export: ExportSeen

    @property
    def factor(self) -> float:
        """By how much the mean reward over the held-out questions rose; one sample's worth stands for zero."""
        least = 1.0 / (RL_EVALUATION_SAMPLES * len(self.rl.samples))
        return self.rl.reward_after / max(self.rl.reward_before, least)

    def digest(self) -> str:
        """Returns a sha256 over all losses and rewards: equal for two demos that went bit for bit alike."""
        return hashlib.sha256(json.dumps([self.sft.losses, self.rl.rewards]).encode()).hexdigest()

    def as_json(self) -> dict[str, Any]:  # Any: JSON.
        """Returns it as a JSON object."""
        return {**asdict(self), "reward_factor": self.factor, "digest": self.digest()}


def run_demo(address: str, keys: tuple[str, str], base: str, export_folder: Path, on_step: OnStep) -> DemoSeen:
    """Runs both tenants at once to their end, then exports the first one's adapter and checks it with `peft`.

    Args:
        address: the gateway.
        keys: one API key per tenant.
        base: public name of a base in DEMO_TASKS.
        export_folder: where the PEFT folder goes.
        on_step: hears of each step.
    """
    tasks = DEMO_TASKS[base]
    with ServiceClient(address, keys[0]) as first, ServiceClient(address, keys[1]) as second:
        with ThreadPoolExecutor(2) as pool:
            sft = pool.submit(learn_manner, first, base, tasks.sft, lambda report: on_step("sft", report))
            rl = pool.submit(climb_reward, second, base, tasks.rl, lambda report: on_step("rl", report))
            sft_seen, rl_seen = sft.result(), rl.result()
        export = check_export(first, base, tasks.sft, sft_seen, export_folder)
    return DemoSeen(base, sft_seen, rl_seen, export)


def learn_manner(service: ServiceClient, base: str, task: SftTask, on_step: Callable[[StepReport], None]) -> SftSeen:
    """Fine-tunes a fresh adapter on the task's conversations; asks the held-out questions before and after."""
    training = service.create_lora_training_client(base, rank=task.rank, seed=1, train_unembed=False)
    tokenizer = training.get_tokenizer()
    before = greedy_answers(service.create_sampling_client(base_model=base), tokenizer, task)
    data = [chat_datum(tokenizer, messages) for messages in read_conversations(task.data)]
    losses, num_tokens = [], 0
    steps = sft_steps(
        training, data, steps=task.steps, batch_size=task.batch_size, learning_rate=task.learning_rate, seed=1
    )
    for report in steps:
        losses.append(report.value)
        num_tokens += report.num_tokens
        on_step(report)
    revision = training.save_weights_for_sampler("final").result().path
    after = greedy_answers(service.create_sampling_client(revision), tokenizer, task)
    texts = [[completion_text(tokenizer, tokens) for tokens in answers] for answers in (before, after)]
    return SftSeen(
        task=task.name,
        run=training.run,
        revision=revision,
        losses=losses,
        right_before=fmean(map(task.check, texts[0])),
        right_after=fmean(map(task.check, texts[1])),
        samples=[Samples(*row) for row in zip(task.held_out, *texts, strict=True)],
        num_tokens=num_tokens,
    )


def greedy_answers(sampler: SamplingClient, tokenizer: ChatTokenizer, task: SftTask) -> list[list[int]]:
    """Returns the tokens of the likeliest answer to each held-out question."""
    params = SamplingParams(max_tokens=task.max_tokens, temperature=0.0)
    prompts = [prompt_tokens(tokenizer, task.messages(question)) for question in task.held_out]
    handles = [sampler.sample(ModelInput.from_ints(prompt), 1, params) for prompt in prompts]
    return [list(handle.result().sequences[0].tokens) for handle in handles]


def climb_reward(service: ServiceClient, base: str, task: RlTask, on_step: Callable[[StepReport], None]) -> RlSeen:
    """Trains a fresh adapter on its own scored samples; scores the held-out questions before and after."""
    training = service.create_lora_training_client(base, rank=task.rank, seed=2, train_unembed=False)
    tokenizer = training.get_tokenizer()
    before, first = held_out_reward(service.create_sampling_client(base_model=base), tokenizer, task)

    def prompts(step: int) -> list[tuple[str, list[int]]]:
        return [(q, prompt_tokens(tokenizer, task.messages(q))) for q in task.batch(step)]

    rewards, num_tokens = [], 0
    steps = rl_steps(
        training,
        tokenizer,
        prompts,
        task.reward,
        steps=task.steps,
        group_size=task.group_size,
        params=SamplingParams(max_tokens=task.max_tokens, temperature=task.temperature, seed=7),
        learning_rate=task.learning_rate,
    )
    for report in steps:
        rewards.append(report.value)
        num_tokens += report.num_tokens
        on_step(report)
    revision = training.save_weights_for_sampler("final").result().path
    after, last = held_out_reward(service.create_sampling_client(revision), tokenizer, task)
    return RlSeen(
        task=task.name,
        run=training.run,
        revision=revision,
        rewards=rewards,
        reward_before=before,
        reward_after=after,
        samples=[Samples(*row) for row in zip(task.held_out, first, last, strict=True)],
        num_tokens=num_tokens,
    )


def held_out_reward(sampler: SamplingClient, tokenizer: ChatTokenizer, task: RlTask) -> tuple[float, list[str]]:
    """Returns the mean reward over the held-out questions, and the first sample of each."""
    params = SamplingParams(max_tokens=task.max_tokens, temperature=task.temperature, seed=99)
    prompts = [prompt_tokens(tokenizer, task.messages(question)) for question in task.held_out]
    handles = [sampler.sample(ModelInput.from_ints(prompt), RL_EVALUATION_SAMPLES, params) for prompt in prompts]
    texts = [[completion_text(tokenizer, s.tokens) for s in handle.result().sequences] for handle in handles]
    scores = [task.reward(q, text) for q, group in zip(task.held_out, texts, strict=True) for text in group]
    return fmean(scores), [group[0] for group in texts]


def check_export(
    service: ServiceClient, base: str, task: SftTask, seen: SftSeen, folder: Path, num_questions: int = 4
) -> ExportSeen:
    """Takes the adapter home as a PEFT folder and lets plain transformers + peft answer in a process of its own."""
    service.pull_adapter(seen.revision, folder)
    sampler = service.create_sampling_client(seen.revision)
    tokenizer = sampler.get_tokenizer()
    asked = replace(task, held_out=task.held_out[:num_questions])
    ours = greedy_answers(sampler, tokenizer, asked)
    models = {model.model_name: model for model in service.get_server_capabilities().supported_models}
    question = {
        "base": models[base].tokenizer,
        "adapter": str(folder),
        "prompts": [prompt_tokens(tokenizer, asked.messages(q)) for q in asked.held_out],
        "max_tokens": task.max_tokens,
        "stop": models[base].eos_token_ids[0],
    }
    command = [sys.executable, "-m", "treadle_engine.peft_check"]
    done = subprocess.run(command, input=json.dumps(question), capture_output=True, text=True, check=True)
    theirs = json.loads(done.stdout.splitlines()[-1])["completions"]
    equal = sum(a == b for a, b in zip(ours, theirs, strict=True))
    return ExportSeen(str(folder), equal, len(ours))
