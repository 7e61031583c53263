"""Reinforcement learning learns, synchronously and one step off, and resumes to the same bits."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.recipes.conftest import Remembering
from treadle import ServiceClient
from treadle.errors import BadInputError
from treadle.recipes.configs import RlConfig
from treadle.recipes.job import StoppedError
from treadle.recipes.rewards import load_reward, score
from treadle.recipes.rl import rl
from treadle.recipes.rows import DataError, Row
from treadle.recipes.tasks import DEMO_TASKS

REWARDS = '''
"""Rewards of a user."""

def ends_well(row, completion):
    assert row["kind"] == "story"
    return float(completion.endswith("They were friends from that day on."))

def short(row, completion):
    return -float(len(completion))

def fails(row, completion):
    return 1 / 0

def nothing(row, completion):
    return float("nan")
'''


@pytest.fixture
def config(tmp_path: Path) -> RlConfig:
    """Stories, a quarter of which the base ends as wanted."""
    task = DEMO_TASKS["treadle/pip"].rl
    (tmp_path / "user_rewards.py").write_text(REWARDS)
    for name, questions in (("train", task.questions), ("held_out", task.held_out)):
        rows = (json.dumps({"prompt": question, "kind": "story"}) + "\n" for question in questions)
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
    return RlConfig(
        data=str(tmp_path / "train.jsonl"),
        reward=f"{tmp_path}/user_rewards.py:ends_well",
        steps=8,
        prompts_per_step=6,
        group_size=6,
        max_tokens=64,
        learning_rate=8e-3,
    )


def test_it_climbs_a_reward(service: ServiceClient, config: RlConfig, tmp_path: Path) -> None:
    """And reports reward, distance from the start, distance from what drew the samples, and samples."""
    seen = Remembering()
    result = rl(service, replace(config, eval_data=str(tmp_path / "held_out.jsonl"), eval_every=8), seen)
    rewards = seen.values("reward")
    assert rewards[0] < 0.4
    assert result.reward == rewards[-1]
    assert rewards[-1] > 0.7
    assert seen.values("eval_reward") == [result.eval_reward]
    assert result.eval_reward > 0.6
    kl = seen.values("kl")
    assert 0 <= kl[0] < 1e-4 < kl[-1]
    # The sampler and the trainer agree, so what was drawn from the newest weights is on policy.
    assert max(seen.values("sampler_kl")) < 1e-6
    assert all(sample.reward in (0.0, 1.0) for sample in seen.reports[0].samples)
    assert {point.step for point in service.list_metrics(result.run).points if "reward" in point.values} == set(
        range(1, 9)
    )
    assert len(service.list_samples(result.run)) == 8


@pytest.mark.parametrize("one_step_off", [False, True])
def test_a_stopped_run_goes_on_to_the_same_bits(service: ServiceClient, config: RlConfig, one_step_off: bool) -> None:
    """With samples of the newest weights, and with samples that are one step old."""
    config = replace(
        config,
        reward=config.reward.replace("ends_well", "short"),
        prompts_per_step=2,
        group_size=3,
        max_tokens=12,
        checkpoint_every=2,
        one_step_off=one_step_off,
        kl_coef=0.01,
        loss="ppo",
        scale_by_std=True,
    )
    whole, first, second = Remembering(), Remembering(stop_after=4), Remembering()
    rl(service, config, whole)
    with pytest.raises(StoppedError) as stopped:
        rl(service, config, first)
    rl(service, replace(config, resume=stopped.value.run), second)
    # One step off, only a checkpoint before which nothing was drawn ahead gives the same again.
    assert second.done == (4 if one_step_off else 5)
    joined = dict(first.numbers()) | dict(second.numbers())
    assert joined == dict(whole.numbers())
    if one_step_off:
        assert whole.values("sampler_kl")[1] > 1e-6
        assert whole.values("sampler_kl")[2] < 1e-6


def test_reward_functions_are_found_and_checked(config: RlConfig, tmp_path: Path, monkeypatch) -> None:
    """By file or module; what goes wrong names the row and the completion."""
    monkeypatch.chdir(tmp_path)
    row = Row({"kind": "story"}, "data.jsonl:3")
    reward = load_reward("user_rewards:ends_well")
    assert score(reward, row, "They were friends from that day on.") == 1.0
    for wrong, problem in (
        ("user_rewards", "names no reward function"),
        ("user_rewards:nobody", "has no function 'nobody'"),
        ("no_such_module:f", "no module 'no_such_module'"),
        ("no_such_file.py:f", "no file no_such_file.py"),
        ("", "names no reward function"),
    ):
        with pytest.raises(BadInputError, match=problem):
            load_reward(wrong)
    with pytest.raises(BadInputError, match=r"the reward of data.jsonl:3 is nan"):
        score(load_reward("user_rewards:nothing"), row, "text")
    with pytest.raises(ZeroDivisionError) as caught:
        score(load_reward("user_rewards:fails"), row, "text")
    assert "data.jsonl:3" in caught.value.__notes__[0]


def test_settings_and_prompts_that_cannot_work_are_refused(service: ServiceClient, config: RlConfig) -> None:
    """Before anything is made."""
    for wrong, problem in (
        ({"max_tokens": 510}, r"train.jsonl:1: the prompt has \d+ tokens; with max_tokens 510 1 fit"),
        ({"kl_coef": 0.1, "temperature": 0.5}, "temperature 1"),
        ({"group_size": 0}, "at least 1"),
    ):
        with pytest.raises((BadInputError, DataError), match=problem):
            rl(service, replace(config, **wrong))
    assert service.list_runs() == []
