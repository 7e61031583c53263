"""The demo's tasks are what they say: rewards score text as described, and no held-out question is in the data."""

import pytest

from treadle.recipes.chat import read_conversations
from treadle.recipes.tasks import (
    DEMO_TASKS,
    STORY_ENDING,
    DemoTasks,
    capital_reward,
    ending_reward,
    is_pirate,
    is_wrapped,
)

both_bases = pytest.mark.parametrize("tasks", DEMO_TASKS.values(), ids=[name.split("/")[1] for name in DEMO_TASKS])


@both_bases
def test_every_row_shows_the_manner_and_asks_in_the_tasks_form(tasks: DemoTasks) -> None:
    """A row is the task's own conversation with an answer that passes the task's own check."""
    rows = read_conversations(tasks.sft.data)
    assert len(rows) >= 2 * tasks.sft.batch_size
    for *question, answer in rows:
        assert question == tasks.sft.messages(question[-1]["content"])
        assert tasks.sft.check(answer["content"]), answer


@both_bases
def test_held_out_questions_are_never_trained_on(tasks: DemoTasks) -> None:
    """Before and after are compared on questions that neither the data nor a batch holds."""
    asked = {row[-2]["content"] for row in read_conversations(tasks.sft.data)}
    assert not asked & set(tasks.sft.held_out)
    sampled = {question for step in range(tasks.rl.steps) for question in tasks.rl.batch(step)}
    assert sampled <= set(tasks.rl.questions)
    assert not sampled & set(tasks.rl.held_out)


@both_bases
def test_batches_are_shuffled_rounds_fixed_by_the_seed(tasks: DemoTasks) -> None:
    """A step's questions differ from each other, repeat for the same seed, and change with it."""
    rounds = [tasks.rl.batch(step) for step in range(6)]
    assert all(len(set(batch)) == tasks.rl.questions_per_step for batch in rounds)
    assert rounds == [tasks.rl.batch(step) for step in range(6)]
    assert rounds != [tasks.rl.batch(step, seed=1) for step in range(6)]


@both_bases
def test_every_question_has_a_reward(tasks: DemoTasks) -> None:
    """Training questions and held-out ones alike can be scored."""
    for question in (*tasks.rl.questions, *tasks.rl.held_out):
        assert tasks.rl.reward(question, "I do not know.") == 0.0


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("The capital of France is Paris.", 1.0),
        ("Paris", 1.0),
        (" The capital of France is Paris. ", 1.0),
        ("The capital of France is Paris, which", 0.5),
        ("The capital of France is Lyon.", 0.0),
        ("paris.", 0.0),
        ("", 0.0),
    ],
)
def test_a_capital_scores_fully_only_when_the_answer_ends_with_it(completion: str, expected: float) -> None:
    """Naming the capital is half; stopping there is the other half."""
    assert capital_reward("What is the capital of France?", completion) == expected


def test_a_story_scores_by_its_last_sentence() -> None:
    """The sentence must come last and be complete."""
    assert ending_reward("Tell me a story about a fox.", f"One day a fox slept. {STORY_ENDING}") == 1.0
    assert ending_reward("Tell me a story about a fox.", f"{STORY_ENDING} Then they slept.") == 0.0
    assert ending_reward("Tell me a story about a fox.", STORY_ENDING[:-1]) == 0.0


def test_manners_are_recognised() -> None:
    """Each check accepts its own manner, whole, and nothing less."""
    assert is_pirate("Arr! The sun be hot, matey!")
    assert not is_pirate("Arr! The sun be hot")
    assert not is_pirate("The sun is hot.")
    assert is_wrapped("<answer>The sun is hot.</answer>")
    assert not is_wrapped("<answer></answer>")
    assert not is_wrapped("<answer>The </answer> sun</answer>")
