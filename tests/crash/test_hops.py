"""Every hop between processes slow, silent or cut, one after the other, under load: late at worst, never different."""

import time
from collections.abc import Callable, Iterator

import pytest

from tests.crash.storm import SETTINGS
from tests.support.cluster import Cluster
from tests.support.proxy import TroubleProxy
from tests.support.users import User, reinforce, supervise, wait_for_steps


def slow(proxy: TroubleProxy) -> None:
    """A long way: 50 ms in each direction."""
    proxy.delay_seconds = 0.05
    time.sleep(1.0)
    proxy.delay_seconds = 0.0


def silent(proxy: TroubleProxy) -> None:
    """Nothing comes through for longer than a lease lasts, and nobody is told."""
    proxy.silent = True
    time.sleep(3.0)
    proxy.silent = False


def cut(proxy: TroubleProxy) -> None:
    """Connections are reset in mid-byte, and refused for a moment."""
    proxy.refusing = True
    proxy.cut()
    time.sleep(0.5)
    proxy.refusing = False


TROUBLES: tuple[Callable[[TroubleProxy], None], ...] = (slow, silent, cut)


@pytest.fixture
def proxied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two trainers and one of each other service, each behind a proxy of its own."""
    cluster = Cluster(
        tmp_path_factory.mktemp("hops") / "cluster", settings=SETTINGS, trainers=2, forked=True, proxied=True
    )
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()


@pytest.mark.timeout(600)
def test_trouble_on_any_hop_changes_nothing(proxied: Cluster) -> None:
    """Two tenants work on through each trouble on the way to each service, and see what an undisturbed life sees."""
    users = [
        User(loop, seed, proxied.gateway_address, proxied.new_tenant()).start()
        for seed, loop in enumerate((supervise, reinforce), 1)
    ]
    wait_for_steps(users, 2)
    for name in proxied.names:
        for trouble in TROUBLES:
            trouble(proxied.proxies[name])
        wait_for_steps(users, 1)
    stormy = [user.finish() for user in users]
    assert stormy == [user.undisturbed() for user in users]
