"""The recipe for supervised fine-tuning learns, stops early, and goes on after an interruption to the same bits."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.recipes.conftest import XML, Remembering
from tests.support.cluster import Cluster
from treadle import ModelInput, SamplingParams, ServiceClient
from treadle.errors import BadInputError, ConflictError
from treadle.recipes.configs import SftConfig
from treadle.recipes.job import StoppedError
from treadle.recipes.sft import sft
from treadle.recipes.tasks import is_wrapped

CONFIG = SftConfig(data=str(XML), epochs=1.5, eval_every=6, checkpoint_every=5)


def test_it_learns_from_a_file(service: ServiceClient, tokenizer) -> None:
    """Loss falls, held-out loss falls, and the published adapter answers new questions in the learned manner."""
    seen = Remembering()
    result = sft(service, SftConfig(data=str(XML), epochs=6), seen)
    assert seen.plan["batch_size"] == 8
    assert [report.step for report in seen.reports if report.num_tokens] == list(range(1, seen.plan["steps"] + 1))
    losses, held_out = seen.values("loss"), seen.values("eval_loss")
    assert losses[0] > 5
    assert result.loss == losses[-1]
    assert losses[-1] < 0.2
    assert result.eval_loss == held_out[-1] < 0.5
    assert any("<answer>" in text.response for report in seen.reports[-3:] for text in report.samples)
    sampler = service.create_sampling_client(result.revision)
    questions = ("What is the capital of Norway?", "What is a baby horse called?", "What does a frog say?")
    answers = []
    for question in questions:
        text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        prompt = ModelInput.from_ints(tokenizer.encode(text, add_special_tokens=False))
        sample = sampler.sample(prompt, 1, SamplingParams(max_tokens=40, temperature=0)).result().sequences[0]
        answers.append(tokenizer.decode(sample.tokens, skip_special_tokens=True))
    assert all(map(is_wrapped, answers)), answers


@pytest.mark.parametrize("patience", [0, 2])
def test_a_stopped_run_goes_on_to_the_same_bits(service: ServiceClient, patience: int) -> None:
    """Every number of both halves together is that of a run that nobody stopped, also where it stops early."""
    config = replace(CONFIG, patience=patience, learning_rate=3e-2 if patience else None)
    whole, first, second = Remembering(), Remembering(stop_after=7), Remembering()
    expected = sft(service, config, whole)
    with pytest.raises(StoppedError) as stopped:
        sft(service, replace(config, seed=0, name="stopped"), first)
    result = sft(service, replace(config, resume=stopped.value.run), second)
    assert second.done == len(first.steps) < len(whole.steps)
    assert first.numbers() + second.numbers() == whole.numbers()
    assert (result.loss, result.eval_loss, result.steps) == (expected.loss, expected.eval_loss, expected.steps)
    kept = [service.get_adapter(found.revision).files for found in (expected, result)]
    assert kept[0] == kept[1]
    with pytest.raises(ConflictError, match="is finished"):
        sft(service, replace(config, resume=stopped.value.run))


def test_early_stopping_publishes_the_best_weights(service: ServiceClient) -> None:
    """With a learning rate that rises until it is far too high the held-out loss is lowest on the way."""
    seen = Remembering()
    rising = replace(CONFIG, learning_rate=5e-2, warmup_steps=16, schedule="constant")
    config = replace(rising, patience=2, eval_every=2, epochs=3)
    result = sft(service, config, seen)
    held_out = seen.values("eval_loss")
    assert result.steps < seen.plan["steps"]
    assert result.eval_loss == min(held_out)
    assert held_out.index(min(held_out)) == len(held_out) - 3
    assert any(f"lowest at step {2 * held_out.index(min(held_out)) + 2}" in notice for notice in seen.notices)


def test_a_killed_program_goes_on_from_its_last_checkpoint(
    cluster: Cluster, service: ServiceClient, tmp_path: Path
) -> None:
    """kill -9 in the middle; the same command with --resume last ends with the losses of an unbroken run."""
    whole = Remembering()
    sft(service, replace(CONFIG, epochs=6), whole)
    curve = tmp_path / "curve.jsonl"
    command = [sys.executable, "-m", "treadle.cli", "sft", str(XML), "--epochs", "6", "--eval-every", "6"]
    command += ["--checkpoint-every", "5", "--resume", "last", "--track", f"jsonl:{curve}", "-f", "json"]
    environment = {**os.environ, "TREADLE_ADDRESS": cluster.gateway_address, "TREADLE_API_KEY": cluster.new_tenant()}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 100
        while not curve.exists() or curve.read_text().count("\n") < 12:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    before = len(curve.read_text().splitlines())
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == len(whole.steps)
    rows = [json.loads(line) for line in curve.read_text().splitlines()]
    again = [row["step"] for row in rows[before:] if "loss" in row]
    assert 1 < again[0] <= rows[before - 1]["step"] + 3
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    assert [losses[step] for step in sorted(losses)] == whole.values("loss")


def test_other_settings_and_other_data_are_not_resumed(service: ServiceClient, tmp_path: Path) -> None:
    """The error says what differs; `last` then starts anew."""
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(XML.read_text().splitlines()[:20]))
    config = SftConfig(data=str(data), epochs=4)
    with pytest.raises(StoppedError) as stopped:
        sft(service, config, Remembering(stop_after=2))
    run = stopped.value.run
    with pytest.raises(ConflictError, match="rank was 16, is 8"):
        sft(service, replace(config, resume=run, rank=8))
    moved = data.rename(tmp_path / "moved.jsonl")
    with pytest.raises(StoppedError) as stopped:
        sft(service, replace(config, data=str(moved), resume=run), Remembering(stop_after=1))
    assert stopped.value.run == run
    data.write_text("\n".join(XML.read_text().splitlines()[1:21]))
    with pytest.raises(ConflictError, match="made from other data"):
        sft(service, replace(config, resume=run))
    seen = Remembering()
    sft(service, replace(config, resume="last", epochs=2), seen)
    assert seen.run != run
    assert any("no unfinished run" in notice for notice in seen.notices)


def test_packing_fills_steps_by_tokens(service: ServiceClient) -> None:
    """And trains further from a saved adapter; its shape is the adapter's."""
    seen = Remembering()
    result = sft(service, replace(CONFIG, pack=True, batch_tokens=300, steps=6), seen)
    assert all(200 < report.num_tokens <= 300 for report in seen.reports if report.num_tokens)
    further = Remembering()
    sft(service, replace(CONFIG, start_from=result.revision, steps=2, eval_fraction=0), further)
    assert further.values("loss")[0] < 0.7 * seen.values("loss")[0]
    assert not further.values("eval_loss")


def test_a_base_that_is_not_served_is_refused(service: ServiceClient) -> None:
    """With the names of those that are."""
    with pytest.raises(BadInputError, match="no base 'treadle/pop'; served: treadle/pip"):
        sft(service, replace(CONFIG, base="treadle/pop"))
