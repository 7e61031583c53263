"""Two trainers of one base: runs move when one dies, drains or freezes, and their owners' loops go on."""

import time
from collections.abc import Iterator

import grpc
import pytest

from tests.support.cluster import Cluster
from tests.support.users import User, supervise, wait_for_steps
from treadle.internal.v1 import journal_pb2, journal_pb2_grpc, trainer_pb2, trainer_pb2_grpc
from treadle.v1 import training_pb2, training_pb2_grpc
from treadle_service.channels import internal_metadata

TRAINERS = ("trainer", "trainer-1")
WAIT_SECONDS = 60.0


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster with two trainers and leases of 1.5 s."""
    settings = {"TREADLE_TRAINER_LEASE_SECONDS": "1.5", "TREADLE_TRAINER_SNAPSHOT_EVERY_STEPS": "3"}
    cluster = Cluster(tmp_path_factory.mktemp("pair") / "cluster", settings=settings, trainers=2, forked=True)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()


def start_users(cluster: Cluster, count: int = 2) -> list[User]:
    """Starts tenants and returns when each has made a few steps."""
    users = [User(supervise, seed, cluster.gateway_address, cluster.new_tenant()).start() for seed in range(count)]
    wait_for_steps(users, 6)
    return users


def resident(cluster: Cluster, name: str) -> set[str]:
    """Returns the runs in a trainer's memory."""
    with grpc.insecure_channel(cluster.addresses[name]) as channel:
        request = trainer_pb2.GetTrainerStatusRequest()
        metadata = internal_metadata(cluster.token)
        status = trainer_pb2_grpc.TrainerServiceStub(channel).GetTrainerStatus(request, metadata=metadata, timeout=10)
        return set(status.resident_runs)


def run_of(user: User) -> str:
    """Returns the name of the one run that a user has made so far."""
    with grpc.insecure_channel(user.address) as channel:
        metadata = (("authorization", f"Bearer {user.key}"),)
        training = training_pb2_grpc.TrainingServiceStub(channel)
        (run,) = training.ListRuns(training_pb2.ListRunsRequest(), metadata=metadata, timeout=10).runs
        return str(run.name)


def victim_of(cluster: Cluster, users: list[User]) -> tuple[str, str, set[str]]:
    """Returns the trainer with the first user's run, the other trainer, and the users' runs that the former has."""
    held = leases(cluster, {run_of(user) for user in users})
    first, second = TRAINERS
    if held[run_of(users[0])].address != cluster.addresses[first]:
        first, second = second, first
    return first, second, {run for run, lease in held.items() if lease.address == cluster.addresses[first]}


def leases(cluster: Cluster, runs: set[str]) -> dict[str, journal_pb2.Lease]:
    """Returns the leases of runs."""
    with grpc.insecure_channel(cluster.addresses["store"]) as channel:
        journal = journal_pb2_grpc.JournalServiceStub(channel)
        metadata = internal_metadata(cluster.token)
        return {
            run: journal.LookupRun(journal_pb2.LookupRunRequest(run=run), metadata=metadata, timeout=10).lease
            for run in runs
        }


def wait_for_holder(cluster: Cluster, runs: set[str], name: str) -> None:
    """Waits until a trainer has the leases of all these runs."""
    deadline = time.monotonic() + WAIT_SECONDS
    while {lease.address for lease in leases(cluster, runs).values()} != {cluster.addresses[name]}:
        assert time.monotonic() < deadline, leases(cluster, runs)
        time.sleep(0.05)


def finish_equal(users: list[User]) -> None:
    """Ends the loops and compares them with undisturbed ones."""
    stormy = [user.finish() for user in users]
    assert stormy == [user.undisturbed() for user in users]


@pytest.mark.timeout(180)
def test_the_other_trainer_takes_the_runs_of_a_killed_one(pair: Cluster) -> None:
    """The lease runs out, the gateway routes anew, the SDK attaches again: the loop hears nothing of it."""
    users = start_users(pair)
    victim, heir, runs = victim_of(pair, users)
    pair.kill(victim)
    try:
        wait_for_holder(pair, runs, heir)
        wait_for_steps(users, 6)
    finally:
        pair.launch(victim)
        pair.wait_ready([victim])
    finish_equal(users)


@pytest.mark.timeout(180)
def test_a_drained_trainer_hands_its_runs_to_the_other(pair: Cluster) -> None:
    """Drain ends with exit code 0 and every run with the other trainer, one epoch on."""
    users = start_users(pair)
    leaver, heir, runs = victim_of(pair, users)
    before = leases(pair, runs)
    assert pair.stop(leaver) == 0
    try:
        wait_for_steps(users, 6)
        after = leases(pair, runs)
        assert {lease.address for lease in after.values()} == {pair.addresses[heir]}
        assert {run: lease.epoch - 1 for run, lease in after.items()} == {run: before[run].epoch for run in runs}
    finally:
        pair.launch(leaver)
        pair.wait_ready([leaver])
    finish_equal(users)


@pytest.mark.timeout(180)
def test_a_trainer_that_slept_past_its_lease_writes_nothing(pair: Cluster) -> None:
    """While it is frozen another claims its runs; thawed, it is refused, drops them, and nobody sees its state."""
    users = start_users(pair)
    zombie, heir, runs = victim_of(pair, users)
    log = pair.folder / f"{zombie}.log"
    log_before = len(log.read_text())
    pair.freeze(zombie)
    try:
        wait_for_holder(pair, runs, heir)
        wait_for_steps(users, 4)
    finally:
        pair.thaw(zombie)
    deadline = time.monotonic() + WAIT_SECONDS
    while resident(pair, zombie) & runs:
        assert time.monotonic() < deadline, "the zombie keeps runs that are not its own"
        time.sleep(0.05)
    wait_for_steps(users, 4)
    assert {lease.address for lease in leases(pair, runs).values()} == {pair.addresses[heir]}
    lost = [
        line
        for line in log.read_text()[log_before:].splitlines()
        if "run_lost" in line and any(run in line for run in runs)
    ]
    assert {run for run in runs for line in lost if run in line} == runs
    assert all("STALE_LEASE" in line for line in lost)
    finish_equal(users)


@pytest.mark.timeout(180)
def test_late_writes_with_an_old_epoch_change_nothing(pair: Cluster) -> None:
    """Every write of the protocol is refused as STALE_LEASE after another claim, whatever it carries."""
    users = start_users(pair, 1)
    owner, _, (run,) = victim_of(pair, users)
    with grpc.insecure_channel(pair.addresses["store"]) as channel:
        journal = journal_pb2_grpc.JournalServiceStub(channel)
        metadata = internal_metadata(pair.token)
        epoch = leases(pair, {run})[run].epoch - 1
        entry = journal_pb2.JournalEntry(run=run, epoch=epoch, acked_seq=1)
        answer = journal.WriteJournal(journal_pb2.WriteJournalRequest(entries=[entry]), metadata=metadata, timeout=10)
        assert [error.reason for error in answer.errors] == ["STALE_LEASE"]
        with pytest.raises(grpc.RpcError, match="epoch"):
            list(journal.RecoverRun(journal_pb2.RecoverRunRequest(run=run, epoch=epoch), metadata=metadata, timeout=10))
        journal.ReleaseRun(journal_pb2.ReleaseRunRequest(run=run, epoch=epoch), metadata=metadata, timeout=10)
    assert leases(pair, {run})[run].address == pair.addresses[owner]
    finish_equal(users)
