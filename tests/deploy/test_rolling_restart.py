"""Every service stopped and started again in turn, as an upgrade does it, under load: no call of the SDK fails."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cluster import Cluster
from tests.support.users import User, reinforce, supervise, wait_for_steps

SETTINGS = {
    "TREADLE_TRAINER_SNAPSHOT_EVERY_STEPS": "4",
    "TREADLE_SAMPLER_HEARTBEAT_SECONDS": "0.5",
}


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Cluster]:
    """Two trainers and one of each other service."""
    cluster = Cluster(tmp_path / "cluster", settings=SETTINGS, trainers=2, forked=True)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()


@pytest.mark.timeout(400)
def test_a_rolling_restart_fails_no_call_and_changes_no_number(fleet: Cluster) -> None:
    """Two SFT loops with steps queued ahead and one RL loop go on through it, and see what undisturbed ones see.

    A loop ends at the first call that raises, so that they go on says that none did.
    """
    loops = (supervise, supervise, reinforce)
    users = [User(loop, seed, fleet.gateway_address, fleet.new_tenant()).start() for seed, loop in enumerate(loops, 1)]
    wait_for_steps(users, 3)
    for name in ("store", "trainer", "trainer-1", "sampler", "gateway"):
        assert fleet.stop(name) == 0
        fleet.launch(name)
        fleet.wait_ready([name])
        wait_for_steps(users, 2)
    seen = [user.finish() for user in users]
    assert seen == [user.undisturbed() for user in users]
