"""What the README shows is what happens: its program prints its output, its commands work."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cluster import Cluster, free_port

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
BIN = Path(sys.executable).parent
READY_SECONDS = 100.0
PATH = f"{BIN}{os.pathsep}{os.environ['PATH']}"
# What the Tinker block's reader would run next.
TINKER_PROGRAM = """
import tinker
with tinker.ServiceClient() as service:
    sampler = service.create_sampling_client(base_model="Qwen/Qwen3-8B-Base").result()
    drawn = sampler.sample(tinker.ModelInput.from_ints([1, 5, 9]), 1, tinker.SamplingParams(max_tokens=4)).result()
    print(len(drawn.sequences[0].tokens))
"""
_SHOW_SETTINGS = """
from treadle_store.settings import StoreSettings
settings = StoreSettings()
print(settings.database_url, settings.blobs_url)
"""


def blocks(language: str) -> list[str]:
    """Returns the README's code blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def run(command: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_program_on_the_first_screen_prints_the_output_below_it(cluster: Cluster) -> None:
    """The first Python block, run as it stands, prints the first text block."""
    environment = {"TREADLE_ADDRESS": cluster.gateway_address, "TREADLE_API_KEY": cluster.new_tenant()}
    assert run([sys.executable, "-c", blocks("python")[0]], environment) == blocks("text")[0]


def test_the_two_newcomer_commands_are_targets_of_the_makefile() -> None:
    """`make demo` and `make test` are there, and CI calls the second."""
    commands = [line.split("#")[0].strip() for line in blocks("sh")[0].splitlines()]
    assert commands == ["make demo", "make test"]
    for command in commands:
        subprocess.run([*command.split(), "--dry-run"], cwd=ROOT, check=True, capture_output=True)
    assert "make test" in (ROOT / ".ci/run").read_text()


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Runs the README's `treadle up` in a home folder of its own; gives its port and environment."""
    # HTTP is 80 above it.
    port, environment = free_port(), {"HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "PATH": PATH}
    aliases = re.search(r"TREADLE_GATEWAY_MODEL_ALIASES='(.*)'", blocks("sh")[3])
    assert aliases is not None
    environment["TREADLE_GATEWAY_MODEL_ALIASES"] = aliases[1]
    command = blocks("sh")[1].split("#")[0].strip().replace(".venv/bin", str(BIN))
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command.split(), "--port", str(port)], env={**os.environ, **environment}, stdout=output, stderr=output
        )
    deadline = time.monotonic() + READY_SECONDS
    while not (tmp_path / ".treadle/up.json").exists():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    yield port, environment
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0


def test_a_key_a_foreign_client_and_our_own_work_as_written(deployment: tuple[int, dict[str, str]]) -> None:
    """The second terminal's commands, run by a shell as they stand but for the port."""
    port, environment = deployment
    script = blocks("sh")[2].replace(".venv/bin", str(BIN)).replace(":7600", f":{port}")
    output = run(["bash", "-euc", script], environment)
    answer = json.loads(output[: output.rindex("}") + 1])
    assert answer["model"] == "treadle/pip"
    assert len(answer["sequences"][0]["tokens"]["list"]["ids"]) == 4
    assert "Rome" in output[output.rindex("}") :]
    # The other clients' blocks, against the same services.
    environment["TREADLE_API_KEY"] = run(["treadle", "key", "create", "others"], environment).strip()
    asked = blocks("python")[1].replace(":7680", f":{port + 80}")
    program = f"import os, openai\n{asked.replace('client.chat', 'made = client.chat')}\nprint(made.choices[0].message)"
    assert "Rome" in run([sys.executable, "-c", program], environment)
    script = f"{blocks('sh')[3].replace(':7680', f':{port + 80}')}\n{sys.executable} -c '{TINKER_PROGRAM}'"
    assert 1 <= int(run(["bash", "-euc", script], environment)) <= 4
    # An operator's.
    del environment["TREADLE_API_KEY"]
    told = run(["bash", "-euc", blocks("sh")[5]], environment)
    assert "acme" in told


def test_the_settings_that_move_the_store_are_settings() -> None:
    """Of the names and the form that the block shows."""
    lines = [line.split("#")[0].strip() for line in blocks("sh")[4].splitlines()]
    names = dict(line.split("=", 1) for line in lines)
    settings = run([sys.executable, "-c", _SHOW_SETTINGS], names).split()
    assert settings == list(names.values())
