"""The demo's tasks, two per bundled base: a manner to learn from examples (SFT), a reward to climb by sampling (RL).

Pure data and text: questions, rows, rewards and the hyperparameters under which both are known to work. Knows no
client, no tokens and no process; `DEMO_TASKS` is what a demo or a command line picks from. All runs adapt the
attention and MLP projections with the service's default alpha of 32, and use Adam with beta 0.9, 0.95 and eps 1e-8.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from treadle.recipes.chat import Message

_DATA = Path(__file__).resolve().parent.parent / "data"

# SmolLM2's template puts a 20-token system turn before a conversation that has none of its own. An empty one costs
# 4 tokens, which halves these short prompts.
_NO_SYSTEM: tuple[Message, ...] = ({"role": "system", "content": ""},)


@dataclass(frozen=True, slots=True)
class SftTask:
    """A manner of answering that the base does not have, learned from conversations on disk."""

    name: str
    data: Path
    """JSONL rows of `{"messages": [...]}`, system turn included."""
    held_out: tuple[str, ...]
    """Questions that are not in the data, to ask before and after."""
    check: Callable[[str], bool]
    """Whether a completion shows the manner."""
    steps: int
    batch_size: int
    learning_rate: float
    """At the first step; falls to a tenth, linearly."""
    max_tokens: int
    """Enough for a held-out answer in the learned manner."""
    rank: int = 8
    opening: tuple[Message, ...] = ()

    def messages(self, question: str) -> list[Message]:
        """Returns the conversation that asks `question`, in the form of the data's rows."""
        return [*self.opening, {"role": "user", "content": question}]


@dataclass(frozen=True, slots=True)
class RlTask:
    """Questions whose sampled answers a program can score."""

    name: str
    questions: tuple[str, ...]
    held_out: tuple[str, ...]
    """Questions that training never asks."""
    reward: Callable[[str, str], float]
    """reward(question, completion without special tokens) -> 0 to 1."""
    steps: int
    questions_per_step: int
    group_size: int
    """Samples per question and step; a group whose rewards are all equal teaches nothing and need not be trained on."""
    learning_rate: float
    """The same at every step."""
    max_tokens: int
    rank: int = 8
    temperature: float = 1.0
    opening: tuple[Message, ...] = ()

    def messages(self, question: str) -> list[Message]:
        """Returns the conversation that asks `question`."""
        return [*self.opening, {"role": "user", "content": question}]

    def batch(self, step: int, seed: int = 0) -> list[str]:
        """Returns the questions of step 0, 1, ...: shuffled rounds through all of them, the same for the same seed."""
        per_round = len(self.questions) // self.questions_per_step
        round_, place = divmod(step, per_round)
        order = list(self.questions)
        random.Random(f"{seed}-{round_}").shuffle(order)
        return order[place * self.questions_per_step : (place + 1) * self.questions_per_step]


@dataclass(frozen=True, slots=True)
class DemoTasks:
    """What the demo runs at once on one base."""

    sft: SftTask
    rl: RlTask


def is_pirate(completion: str) -> bool:
    """Whether the answer opens and closes like a pirate's."""
    return completion.startswith("Arr!") and completion.endswith("matey!")


def is_wrapped(completion: str) -> bool:
    """Whether the whole answer stands in one <answer> element."""
    open_, close = "<answer>", "</answer>"
    return (
        completion.startswith(open_)
        and completion.endswith(close)
        and completion.count("<") == 2
        and len(completion) > len(open_ + close)
    )


_CAPITALS = (
    "France=Paris,Italy=Rome,Japan=Tokyo,Spain=Madrid,Russia=Moscow,China=Beijing,Greece=Athens,Kenya=Nairobi,"
    "England=London,Canada=Ottawa,Hungary=Budapest,Chile=Santiago,Syria=Damascus,Israel=Jerusalem,Bulgaria=Sofia,"
    "Afghanistan=Kabul,Romania=Bucharest,Nigeria=Abuja,Brazil=Brasilia,Iran=Tehran,Pakistan=Islamabad,"
    "Mexico=Mexico City,India=New Delhi,Colombia=Bogota,"
    "Germany=Berlin,Egypt=Cairo,Norway=Oslo,Ireland=Dublin,Thailand=Bangkok,Sweden=Stockholm,Poland=Warsaw,"
    "Austria=Vienna"
)
CAPITALS: Mapping[str, str] = dict(pair.split("=") for pair in _CAPITALS.split(","))
_HELD_OUT_COUNTRIES = ("Germany", "Egypt", "Norway", "Ireland", "Thailand", "Sweden", "Poland", "Austria")
_ASK_CAPITAL = "What is the capital of {}?"
_CAPITAL_BY_QUESTION = {_ASK_CAPITAL.format(country): capital for country, capital in CAPITALS.items()}


def capital_reward(question: str, completion: str) -> float:
    """1 for an answer that ends with the right capital, 0.5 for one that names it and rambles on, else 0."""
    capital = _CAPITAL_BY_QUESTION[question]
    if completion.strip().removesuffix(".").endswith(capital):
        return 1.0
    return 0.5 if capital in completion else 0.0


STORY_ENDING = "They were friends from that day on."
_ANIMALS = ("bear", "cat", "cow", "dog", "duck", "frog", "hen", "horse", "mouse")
_HELD_OUT_ANIMALS = ("fox", "rabbit", "owl")


def _ask_story(animal: str) -> str:
    return f"Tell me a story about {'an' if animal[0] in 'aeiou' else 'a'} {animal}."


def ending_reward(question: str, completion: str) -> float:
    """1 for a story that ends as asked, else 0; the base ends about one story in four this way."""
    return 1.0 if completion.strip().endswith(STORY_ENDING) else 0.0


DEMO_TASKS: Mapping[str, DemoTasks] = {
    "treadle/smollm2-135m-instruct": DemoTasks(
        sft=SftTask(
            name="pirate",
            data=_DATA / "sft_smollm2.jsonl",
            held_out=(
                "What is the capital of France?",
                "What do cats eat?",
                "What color is the sky?",
                "What is a guitar?",
                "How many legs does a spider have?",
                "What is the opposite of up?",
                "What is water?",
                "Where do bears live?",
            ),
            check=is_pirate,
            steps=16,
            batch_size=8,
            learning_rate=1e-3,
            max_tokens=24,
            opening=_NO_SYSTEM,
        ),
        rl=RlTask(
            name="capitals",
            questions=tuple(_ASK_CAPITAL.format(c) for c in CAPITALS if c not in _HELD_OUT_COUNTRIES),
            held_out=tuple(_ASK_CAPITAL.format(c) for c in _HELD_OUT_COUNTRIES),
            reward=capital_reward,
            steps=10,
            questions_per_step=8,
            group_size=4,
            learning_rate=3e-4,
            max_tokens=9,
            opening=_NO_SYSTEM,
        ),
    ),
    "treadle/pip": DemoTasks(
        sft=SftTask(
            name="xml",
            data=_DATA / "sft_pip.jsonl",
            held_out=(
                "What is the opposite of hot?",
                "What is the capital of Norway?",
                "What is a baby horse called?",
                "Where does a frog live?",
                "What day comes after Tuesday?",
                "What does a frog say?",
                "What is the capital of Peru?",
                "What is the opposite of right?",
            ),
            check=is_wrapped,
            steps=50,
            batch_size=16,
            learning_rate=6e-3,
            max_tokens=40,
        ),
        rl=RlTask(
            name="ending",
            questions=tuple(_ask_story(animal) for animal in _ANIMALS),
            held_out=tuple(_ask_story(animal) for animal in _HELD_OUT_ANIMALS),
            reward=ending_reward,
            steps=10,
            questions_per_step=6,
            group_size=6,
            learning_rate=5e-3,
            max_tokens=64,
        ),
    ),
}
"""By the base's public name."""
