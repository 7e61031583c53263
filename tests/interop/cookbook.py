"""Runs one recipe of the real cookbook on local data: `python cookbook.py RECIPE FOLDER`.

The recipes are as they are installed. What they fetch from a hub is given to them here: rows, and in the working
folder the tokenizer under the name of the model. The one other thing that is exchanged is the reward of rl_loop: a tiny
model answers no question of its data set, and a batch without any reward is skipped.
"""

import asyncio
import sys
import warnings
from pathlib import Path

import datasets

warnings.simplefilter("ignore")

MODEL = "Qwen/Qwen3-8B-Base"
QUESTIONS = [f"What is {n} and {n}?" for n in range(40)]
CHATS = [
    [{"role": "user", "content": question}, {"role": "assistant", "content": f"It is {2 * n}."}]
    for n, question in enumerate(QUESTIONS)
]
ROWS = {
    "HuggingFaceH4/no_robots": {"messages": CHATS},
    "openai/gsm8k": {"question": QUESTIONS, "answer": [f"#### {2 * n}" for n in range(40)]},
    "Anthropic/hh-rlhf": {
        side: [f"\n\nHuman: {question}\n\nAssistant: {answer}" for question in QUESTIONS]
        for side, answer in (("chosen", "Gladly: it is a number."), ("rejected", "No."))
    },
}


def load_dataset(name: str, *_: object, split: str | None = None, **__: object):
    """Returns local rows under the name of a hub's data set."""
    rows = datasets.Dataset.from_dict(ROWS[name])
    found = datasets.DatasetDict(train=rows, test=rows.select(range(8)))
    return found[split] if split else found


def sl_loop(folder: Path) -> None:
    from tinker_cookbook.recipes import sl_loop as recipe

    recipe.main(
        recipe.Config(
            log_path=str(folder), model_name=MODEL, batch_size=4, max_steps=4, lora_rank=4, save_every=2, max_length=256
        )
    )


def rl_loop(folder: Path) -> None:
    from tinker_cookbook.recipes import rl_loop as recipe

    recipe.get_reward = lambda response, _: float(len(response) % 2)
    recipe.main(
        recipe.Config(
            log_path=str(folder), model_name=MODEL, batch_size=2, group_size=4, max_steps=2, lora_rank=4, max_tokens=12
        )
    )


def sl_basic(folder: Path) -> None:
    import chz
    from tinker_cookbook.recipes import sl_basic as recipe
    from tinker_cookbook.supervised import train

    blueprint = recipe.build_config_blueprint(MODEL)
    config = blueprint.apply({"log_path": str(folder), "max_steps": 3, "lora_rank": 4, "eval_every": 0}).make()
    common = chz.replace(config.dataset_builder.common_config, batch_size=4, max_length=256)
    asyncio.run(
        train.main(chz.replace(config, dataset_builder=chz.replace(config.dataset_builder, common_config=common)))
    )


def dpo(folder: Path) -> None:
    from tinker_cookbook.recipes.preference.dpo import train as recipe

    recipe.cli_main(
        recipe.CLIConfig(
            log_path=str(folder),
            model_name=MODEL,
            batch_size=4,
            max_steps=2,
            renderer_name="role_colon",
            max_length=256,
        )
    )


if __name__ == "__main__":
    datasets.load_dataset = load_dataset
    {run.__name__: run for run in (sl_loop, rl_loop, sl_basic, dpo)}[sys.argv[1]](Path(sys.argv[2]))
