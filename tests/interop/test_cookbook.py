"""Recipes of the real cookbook run to their end, with numbers that can be right."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.cluster import Cluster
from treadle import ServiceClient

RUNNER = Path(__file__).with_name("cookbook.py")
MODEL = "Qwen/Qwen3-8B-Base"


def run(cluster: Cluster, recipe: str, folder: Path) -> list[dict[str, float]]:
    """Runs a recipe in a process and a folder of its own; returns the metrics that it wrote."""
    tokenizer = folder / MODEL
    tokenizer.parent.mkdir(parents=True)
    key = cluster.new_tenant()
    with ServiceClient(cluster.gateway_address, key) as service:
        tokenizer.symlink_to(service.get_server_capabilities().supported_models[0].tokenizer)
    told = {
        "TINKER_BASE_URL": f"http://{cluster.http_address}",
        "TINKER_API_KEY": f"tml-{key}",
        "HF_HUB_OFFLINE": "1",
        "TINKER_TELEMETRY": "0",
        "PYTHONPATH": "",
    }
    done = subprocess.run(
        [sys.executable, str(RUNNER), recipe, str(folder / "log")],
        cwd=folder,
        env={**os.environ, **told},
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = (folder / "log/metrics.jsonl").read_text().splitlines()
    saved = [json.loads(line) for line in (folder / "log/checkpoints.jsonl").read_text().splitlines()]
    assert saved[-1]["name"] == "final"
    assert saved[-1]["state_path"].startswith("tinker://")
    return [json.loads(line) for line in lines]


@pytest.mark.timeout(900)
def test_sl_loop(tinker_cluster: Cluster, tmp_path: Path) -> None:
    """The flat supervised loop: its loss per token is one of this base, and falls."""
    losses = [row["train_mean_nll"] for row in run(tinker_cluster, "sl_loop", tmp_path)]
    assert len(losses) == 4
    assert 0 < losses[-1] < losses[0] < 12


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sl_basic(tinker_cluster: Cluster, tmp_path: Path) -> None:
    """The supervised trainer with its pipeline of steps."""
    rows = run(tinker_cluster, "sl_basic", tmp_path)
    losses = [row["train_mean_nll"] for row in rows if "train_mean_nll" in row]
    assert losses[-1] < losses[0] < 12


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_rl_loop_with_its_default_loss(tinker_cluster: Cluster, tmp_path: Path) -> None:
    """Groups of samples, stable_reinforce with provenance, a checkpoint of both kinds."""
    rows = run(tinker_cluster, "rl_loop", tmp_path)
    assert all(0 <= row["reward/total"] <= 1 for row in rows)
    assert any(row.get("grad_norm:mean", 0) > 0 for row in rows)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_dpo_begins_at_ln_2(tinker_cluster: Cluster, tmp_path: Path) -> None:
    """With its reference being the weights that it starts from."""
    rows = run(tinker_cluster, "dpo", tmp_path)
    assert rows[0]["dpo_loss"] == pytest.approx(math.log(2), abs=1e-4)
