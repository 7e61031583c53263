"""The recipes as commands, and the commands that look at and talk to what came of them."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.recipes.conftest import XML
from tests.support.cluster import Cluster
from treadle.cli import COMMANDS
from treadle.cli.lazy import LazyGroup

PROMPTS = ["What does a dog say?", "What does a cat say?", "Where does a fish live?"]


@pytest.fixture
def run(cluster: Cluster):
    """Runs a command as a new tenant; returns its result, which must be good unless a code is given."""
    environment = {"TREADLE_ADDRESS": cluster.gateway_address, "TREADLE_API_KEY": cluster.new_tenant()}

    def treadle(*arguments: str, code: int = 0, stdin: str = "") -> Result:
        done = CliRunner().invoke(LazyGroup(COMMANDS), [*arguments], env=environment, input=stdin)
        assert done.exit_code == code, done.output
        return done

    treadle.environment = environment  # type: ignore[attr-defined]
    return treadle


def as_json(done: Result):
    return json.loads(done.stdout)


def test_one_command_fine_tunes_and_tracks_and_the_result_can_be_asked(run, tmp_path: Path) -> None:
    """JSON on standard output alone; curves in an event file and in a file of lines; a person gets a next step."""
    lines = tmp_path / "curve.jsonl"
    line = ["sft", str(XML), "--epochs", "5", "--eval-every", "20", "--name", "mine"]
    done = as_json(run(*line, "--track", f"tensorboard:{tmp_path}/logs", "--track", f"jsonl:{lines}", "-f", "json"))
    assert done["loss"] < 0.3
    rows = [json.loads(row) for row in lines.read_text().splitlines()]
    losses = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    assert len(losses) == done["steps"]
    events = EventAccumulator(str(tmp_path / "logs" / done["run"].rpartition("/")[2])).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (step, pytest.approx(loss, rel=1e-6)) for step, loss in losses
    ]
    assert events.Tensors("sample/0")[0].tensor_proto.string_val[0].decode().startswith("What")
    shown = as_json(run("run", "show", done["run"], "-f", "json"))
    assert (shown["metadata"]["recipe"], shown["metadata"]["name"]) == ("sft", "mine")
    said = run("chat", done["revision"], "--temperature", "0", "-f", "json", stdin="What does a dog say?\n\n").stdout
    assert json.loads(said)["response"].startswith("<answer>")
    evaluated = as_json(run("eval", str(XML), "--model", done["revision"], "--max-tokens", "32", "-f", "json"))
    assert evaluated["value"] > 0.5
    seen = as_json(run("top", "--window", "600", "-f", "json"))
    assert {row["worker"] for row in seen["workers"]} == {"trainer-0", "sampler-0"}
    assert all(row["tokens/s"] > 0 for row in seen["workers"])
    assert seen["runs"][0]["run"] == done["run"]
    assert seen["runs"][0]["recipe"] == "sft"
    assert done["run"].rpartition("/")[2] in run("top", "--once").stdout
    text = run("sft", str(XML), "--steps", "2", "--eval-fraction", "0")
    assert "treadle chat tenants/" in text.stdout
    assert "loss" in text.stderr


def test_a_dry_run_shows_every_token_and_makes_nothing(run, tmp_path: Path) -> None:
    """For each recipe."""
    shown = as_json(run("sft", str(XML), "--dry-run", "-f", "json"))
    first = shown["examples"][0]
    assert first["where"] == f"{XML}:1"
    learned = [token for token, weight in zip(first["tokens"], first["weights"], strict=True) if weight]
    assert "".join(learned) == "<answer>A fish lives in a sea.</answer><|im_end|>"
    assert shown["steps"] == 32
    prompts, pairs = tmp_path / "prompts.jsonl", tmp_path / "pairs.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    pairs.write_text("".join(json.dumps({"prompt": p, "chosen": "Yes.", "rejected": "No."}) + "\n" for p in PROMPTS))
    assert as_json(run("rl", str(prompts), "--dry-run", "-f", "json"))["prompts"] == 3
    assert as_json(run("distill", str(prompts), "--dry-run", "-f", "json"))["samples_per_step"] == 32
    assert as_json(run("dpo", str(pairs), "--dry-run", "-f", "json"))["pairs"] == 2
    assert "19 of 33 tokens are learned" in run("sft", str(XML), "--dry-run").stdout
    assert as_json(run("run", "list", "-f", "json")) == []


def test_mistakes_in_data_and_settings_are_one_line(run, tmp_path: Path) -> None:
    """With file, line and column, and no traceback."""
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "x", "response": "y"}\n{"prompt": "x", "response" "y"}\n')
    assert f"Error: {data}:2:28: not JSON: Expecting ':' delimiter" in run("sft", str(data), code=1).output
    assert "no base 'no/such'" in run("sft", str(XML), "--base", "no/such", code=1).output
    assert "there is no tracker 'paper'" in run("sft", str(XML), "--track", "paper", code=1).output
    assert "needs the package wandb" in run("sft", str(XML), "--track", "wandb", code=1).output
    assert "names no reward function" in run("rl", str(XML), code=1).output
    assert "is not one of" in run("sft", str(XML), "--schedule", "wavy", code=2).output


def test_ctrl_c_stops_at_a_checkpoint_and_says_how_to_go_on(run) -> None:
    """The first Ctrl-C; the run that it names resumes."""
    command = [sys.executable, "-m", "treadle.cli", "sft", str(XML), "--epochs", "60", "--eval-fraction", "0"]
    environment = {**os.environ, **run.environment}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        assert process.stderr is not None
        text = ""
        while "/675" not in text:
            text += process.stderr.readline().decode()
        process.send_signal(signal.SIGINT)
        text += process.stderr.read().decode()
    assert process.returncode == 130, text
    name = text.split("go on with --resume ")[1].strip()
    assert [row["run"] for row in as_json(run("run", "list", "-f", "json"))] == [name]
    checkpoints = as_json(run("adapter", "list", "--checkpoints", "-f", "json"))
    assert int(checkpoints[0]["adapter"].rpartition("-")[2]) == checkpoints[0]["step"] > 0


def test_a_deployment_is_measured(run) -> None:
    """Every figure is there, and the throw-away run is gone."""
    done = as_json(run("bench", "--steps", "2", "--length", "16", "--num-samples", "2", "-f", "json"))
    assert all(value > 0 for name, value in done.items() if name != "base")
    assert as_json(run("run", "list", "-f", "json")) == []


def test_shells_complete_commands_and_options(tmp_path: Path) -> None:
    """By click's own scripts; completing a command's name imports no command's work."""
    environment = {**os.environ, "_TREADLE_COMPLETE": "bash_complete", "COMP_WORDS": "treadle sf", "COMP_CWORD": "1"}
    command = [str(Path(sys.executable).parent / "treadle")]
    assert subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout == "plain,sft\n"
    environment |= {"COMP_WORDS": "treadle sft --batch-s", "COMP_CWORD": "2"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "plain,--batch-size\n"
    for shell in ("bash", "zsh", "fish"):
        assert "treadle" in CliRunner().invoke(LazyGroup(COMMANDS), ["completion", shell]).output


def test_every_option_of_a_recipe_is_explained() -> None:
    """What help says is what the settings say."""
    for name in ("sft", "rl", "dpo", "distill", "eval"):
        text = CliRunner().invoke(LazyGroup(COMMANDS), [name, "--help"]).output
        assert "--learning-rate" in text or name == "eval"
