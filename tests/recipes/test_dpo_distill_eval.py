"""Preferences and distillation learn; evaluation measures what it says."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.recipes.conftest import XML, Remembering
from treadle import ServiceClient
from treadle.recipes.configs import DistillConfig, DpoConfig, EvalConfig, SftConfig
from treadle.recipes.distill import distill
from treadle.recipes.dpo import dpo, dpo_loss
from treadle.recipes.evaluate import evaluate
from treadle.recipes.examples import encode_pair, encode_row
from treadle.recipes.job import StoppedError
from treadle.recipes.rows import DataError, Row
from treadle.recipes.sft import sft

TALKS = [json.loads(line)["messages"] for line in XML.read_text().splitlines()]


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    """The tagged answers are better than the plain ones; conversations and texts by turns."""
    rows = []
    for index, (asked, answer) in enumerate(TALKS):
        plain = {**answer, "content": answer["content"].removeprefix("<answer>").removesuffix("</answer>")}
        if index % 2:
            rows.append({"chosen": [asked, answer], "rejected": [asked, plain]})
        else:
            rows.append({"prompt": asked["content"], "chosen": answer["content"], "rejected": plain["content"]})
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_dpo_learns_preferences_and_resumes_to_the_same_bits(service: ServiceClient, pairs: str) -> None:
    """It starts at log 2, where chosen and rejected have gained nothing; held-out pairs follow."""
    config = DpoConfig(data=pairs, steps=6, eval_every=3, learning_rate=2e-3, checkpoint_every=0)
    whole, first, second = Remembering(), Remembering(stop_after=4), Remembering()
    result = dpo(service, config, whole)
    assert whole.values("loss")[0] == pytest.approx(math.log(2), abs=1e-4)
    assert abs(whole.values("margin")[0]) < 1e-3
    assert result.loss < 0.2
    assert result.accuracy == whole.values("eval_accuracy")[-1] == 1.0
    with pytest.raises(StoppedError) as stopped:
        dpo(service, config, first)
    dpo(service, replace(config, resume=stopped.value.run), second)
    assert second.done == 4
    assert first.numbers() + second.numbers() == whole.numbers()


def test_loss_and_gradient_of_dpo_are_those_of_its_formula() -> None:
    """By torch's autograd; the weights of the cross entropy are the negative gradient."""
    gains = torch.tensor([[0.4, -0.3], [-1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    expected = -torch.nn.functional.logsigmoid(0.3 * (gains[:, 0] - gains[:, 1])).mean()
    expected.backward()
    loss, margins, weights = dpo_loss(gains.detach().numpy(), 0.3)
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    np.testing.assert_allclose(margins, [0.21, -0.9])
    np.testing.assert_allclose(weights, -gains.grad.numpy(), rtol=1e-12)


def test_a_pair_needs_both_sides(tokenizer) -> None:
    """Texts and conversations are the same pair; a missing side names its column."""
    asked, answer = TALKS[0]
    config = DpoConfig()
    text = Row({"prompt": asked["content"], "chosen": answer["content"], "rejected": "no"}, "d:1")
    talk = Row({"chosen": [asked, answer], "rejected": [asked, {"role": "assistant", "content": "no"}]}, "d:1")
    for one, other in zip(encode_pair(tokenizer, text, config), encode_pair(tokenizer, talk, config), strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()
    expected = encode_row(tokenizer, Row({"messages": [asked, answer]}, ""), config)
    assert encode_pair(tokenizer, text, config)[0].tokens.tolist() == expected.tokens.tolist()
    with pytest.raises(DataError, match="d:1: column 'rejected': there is no such column; there are prompt, chosen"):
        encode_pair(tokenizer, Row({"prompt": "x", "chosen": "y"}, "d:1"), config)


@pytest.fixture
def teacher(service: ServiceClient) -> str:
    return sft(service, SftConfig(data=str(XML), epochs=5, eval_fraction=0)).revision


def test_a_student_learns_from_a_teacher_that_evaluation_can_tell_apart(
    service: ServiceClient, teacher: str, tmp_path: Path
) -> None:
    """The teacher answers in tags, the base never; the student does so in the end, and resumes to the same bits."""
    out = tmp_path / "answers.jsonl"
    match = EvalConfig(data=str(XML), max_tokens=32, limit=24)
    best = evaluate(service, replace(match, model=teacher, out=str(out)))
    assert evaluate(service, match).value == 0.0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    expected = [answer["content"] for _, answer in TALKS[:24]]
    assert [row["score"] for row in rows] == [float(row["answer"] == e) for row, e in zip(rows, expected, strict=True)]
    assert best.value == sum(row["score"] for row in rows) / 24 > 0.6
    config = DistillConfig(data=str(XML), teacher=teacher, steps=48, prompts_per_step=16, group_size=1, max_tokens=32)
    whole, first, second = Remembering(), Remembering(stop_after=3), Remembering()
    result = distill(service, replace(config, eval_data=str(XML), limit=16, eval_every=48), whole)
    kl = whole.values("kl")
    assert kl[-1] < kl[0] / 4
    assert result.eval_kl == whole.values("eval_kl")[-1] < kl[0] / 2
    assert evaluate(service, replace(match, model=result.revision)).value > 0.1
    short = replace(config, steps=5, prompts_per_step=4, loss="reverse_kl")
    with pytest.raises(StoppedError) as stopped:
        distill(service, short, first)
    distill(service, replace(short, resume=stopped.value.run), second)
    unbroken = Remembering()
    distill(service, short, unbroken)
    assert first.numbers() + second.numbers() == unbroken.numbers()


def test_perplexity_is_that_of_the_learned_tokens(service: ServiceClient, tokenizer) -> None:
    """As the trainer's own forward has it."""
    config = EvalConfig(data=str(XML), metric="perplexity", limit=10)
    result = evaluate(service, config)
    examples = [encode_row(tokenizer, Row({"messages": talk}, ""), config) for talk in TALKS[:10]]
    training = service.create_lora_training_client("treadle/pip", rank=2)
    loss = training.forward([example.datum() for example in examples]).result().metrics["loss:sum"]
    assert result.tokens == sum(example.num_learned for example in examples)
    assert result.value == pytest.approx(math.exp(loss / result.tokens), rel=1e-5)


def test_evaluation_by_a_reward_and_without_a_response(service: ServiceClient, tmp_path: Path) -> None:
    """A reward function needs no response; exact match says which row has none."""
    data = tmp_path / "prompts.jsonl"
    data.write_text('{"prompt": "What does a dog say?"}\n')
    (tmp_path / "r.py").write_text("def woof(row, completion):\n    return float('woof' in completion)\n")
    config = EvalConfig(data=str(data), metric="reward", reward=f"{tmp_path}/r.py:woof", max_tokens=16)
    assert evaluate(service, config).value == 1.0
    with pytest.raises(DataError, match=r"prompts.jsonl:1: there is no response to compare with"):
        evaluate(service, replace(config, metric="exact_match"))
