"""What release 0.1.0 left behind, with this release: its SDK, its store, its protos.

`tests/releases/0.1.0` holds its SDK as a zip, its protos as a buf image, and two of its stores with the same run of
seven steps: `drained`, where the trainer was stopped in peace, and `killed`, where it died with three steps behind the
newest snapshot; beside each, the key, the run and what its user saw.
"""

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.deploy.rendering import run, tool
from tests.support.cluster import Cluster
from treadle import AdamParams, Datum, ModelInput, SamplingParams, ServiceClient
from treadle.errors import ConflictError

RELEASE = Path(__file__).resolve().parents[1] / "releases/0.1.0"

# A loop in the words of 0.1.0, run with its own SDK.
_OLD_PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
import treadle
assert "sdk.zip" in treadle.__file__, treadle.__file__
from treadle import types
service = treadle.ServiceClient(sys.argv[2], sys.argv[3])
training = service.create_lora_training_client("treadle/pip", rank=4, seed=0)
datum = types.Datum(types.ModelInput.from_ints([5, 6, 7, 8]), {"target_tokens": [6, 7, 8, 9], "weights": [1.0] * 4})
losses = []
for _ in range(3):
    loss = training.forward_backward([datum], "cross_entropy")
    training.optim_step(treadle.AdamParams(learning_rate=1e-2)).result()
    losses.append(loss.result().metrics["loss:sum"])
saved = training.save_state("here").result()
training.load_state(saved.path).result()
sampler = training.save_weights_and_get_sampling_client()
sample = sampler.sample(types.ModelInput.from_ints([5, 6]), 1, treadle.SamplingParams(max_tokens=3, seed=1)).result()
print(losses[0] > losses[2], len(sample.sequences[0].tokens))
service.close()
"""


def unpacked(name: str, folder: Path) -> tuple[Cluster, dict]:
    """Returns a deployment of this release over a store of the last, not started, and what is known of it."""
    with tarfile.open(RELEASE / f"{name}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    cluster = Cluster(folder, settings={"TREADLE_TRAINER_SNAPSHOT_EVERY_STEPS": "4"}, forked=True)
    return cluster, json.loads((RELEASE / f"{name}.json").read_text())


def test_its_messages_are_understood() -> None:
    """On the wire and as JSON, nothing was renumbered, retyped or taken away."""
    run(tool("buf"), "breaking", "protos", "--against", str(RELEASE / "protos.binpb"))


@pytest.mark.timeout(300)
def test_its_sdk_works(cluster: Cluster) -> None:
    """Programs that were not upgraded go on: train, save, load, publish, sample."""
    arguments = [str(RELEASE / "sdk.zip"), cluster.gateway_address, cluster.new_tenant()]
    command = [sys.executable, "-c", _OLD_PROGRAM, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "3"]


@pytest.mark.timeout(300)
def test_its_run_goes_on_after_a_drain(tmp_path: Path) -> None:
    """The store is migrated, the snapshot loaded, the next step taken; the saved revision is sampled from."""
    cluster, facts = unpacked("drained", tmp_path / "store")
    try:
        cluster.start()
        sample_kept(cluster, facts)
        go_on(cluster, facts)
    finally:
        cluster.close()


@pytest.mark.timeout(300)
def test_its_journal_is_replayed_after_a_crash(tmp_path: Path) -> None:
    """To the same bits where kernels are the same; else the run says that it diverged, and is not touched."""
    cluster, facts = unpacked("killed", tmp_path / "store")
    try:
        cluster.start()
        try:
            go_on(cluster, facts)
        except ConflictError as error:
            diverged = error
        else:
            diverged = None
        assert diverged is None or (diverged.reason == "DIVERGED" and "last checkpoint" in diverged.message)
        sample_kept(cluster, facts)
    finally:
        cluster.close()


def go_on(cluster: Cluster, facts: dict) -> None:
    """Takes the run's next step; raises what it fails with."""
    data = Datum(ModelInput.from_ints([5, 6, 7]), {"target_tokens": [6, 7, 8], "weights": [1.0] * 3})
    with ServiceClient(cluster.gateway_address, facts["key"]) as service:
        training = service.attach_training_client(facts["run"])
        loss = training.forward_backward([data], "cross_entropy")
        stepped = training.optim_step(AdamParams(learning_rate=1e-4)).result(120)
        assert stepped.step == len(facts["seen"]) + 1
        assert loss.result(120).metrics["loss:sum"] > 0


def sample_kept(cluster: Cluster, facts: dict) -> None:
    """Samples from the revision that the last release saved."""
    with ServiceClient(cluster.gateway_address, facts["key"]) as service:
        sampler = service.create_sampling_client(facts["revision"])
        prompt, params = ModelInput.from_ints([5, 6, 7]), SamplingParams(max_tokens=3, seed=1)
        assert len(sampler.sample(prompt, 1, params).result(120).sequences[0].tokens) == 3
