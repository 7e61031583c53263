"""One program, two environment variables, and the oldest and the newest SDK that are supported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.cluster import Cluster

PROGRAM = Path(__file__).with_name("program.py")
OLDEST = "0.25.0"


def run(cluster: Cluster, **environment: str) -> dict[str, list]:
    """Runs the program in a process of its own and returns what it printed."""
    told = {
        "TINKER_BASE_URL": f"http://{cluster.http_address}",
        "TINKER_API_KEY": f"tml-{cluster.new_tenant()}",
        "HF_HUB_OFFLINE": "1",
        "TINKER_TELEMETRY": "1",
    }
    done = subprocess.run(
        [sys.executable, str(PROGRAM)],
        env={**os.environ, **told, **environment},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.timeout(420)
def test_a_program_is_pointed_here_by_two_variables(tinker_cluster: Cluster) -> None:
    """It learns, and its numbers are the same whenever it is run: seeds are kept."""
    first = run(tinker_cluster)
    assert first["losses"][-1] < first["losses"][0]
    assert first["samples"][0] != first["samples"][1]
    assert run(tinker_cluster) == first


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_oldest_sdk_gets_the_numbers_of_the_newest(tinker_cluster: Cluster, tmp_path: Path) -> None:
    """From the package index, beside the one that is installed."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "old")]
    subprocess.run([*command, f"tinker=={OLDEST}"], check=True, timeout=300)
    assert run(tinker_cluster, PYTHONPATH=str(tmp_path / "old")) == run(tinker_cluster)
