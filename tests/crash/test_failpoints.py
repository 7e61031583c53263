"""kill -9 at every named place of store, gateway and trainer, while tenants work: nobody sees a difference."""

import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import grpc
import pytest

from tests.support.cluster import Cluster
from tests.support.users import BASE, User, reinforce, supervise
from treadle.errors import TreadleError
from treadle.internal.v1 import trainer_pb2, trainer_pb2_grpc
from treadle.v1 import training_pb2, training_pb2_grpc, types_pb2
from treadle_service import failpoints
from treadle_service.channels import internal_metadata

REACH_SECONDS = 60.0
ROOT = Path(__file__).resolve().parents[2]


class Newcomer:
    """A tenant that does nothing but make runs, one after the other, each until it is told that it is there."""

    def __init__(self, address: str, key: str) -> None:
        self._address, self._metadata = address, (("authorization", f"Bearer {key}"),)
        self.made: set[str] = set()

    def work(self, finish: threading.Event) -> None:
        with grpc.insecure_channel(self._address) as channel:
            training = training_pb2_grpc.TrainingServiceStub(channel)
            while not finish.wait(0.05):
                request = training_pb2.CreateRunRequest(
                    base=BASE, lora=types_pb2.LoraConfig(rank=1), request_id=uuid.uuid4().hex
                )
                answers = {self._create(training, request) for _ in range(2)}
                assert len(answers) == 1
                self.made |= answers

    def listed(self) -> set[str]:
        with grpc.insecure_channel(self._address) as channel:
            training = training_pb2_grpc.TrainingServiceStub(channel)
            names, token = set(), ""
            while True:
                request = training_pb2.ListRunsRequest(page_size=100, page_token=token)
                answer = training.ListRuns(request, metadata=self._metadata, timeout=5)
                names |= {run.name for run in answer.runs}
                token = answer.next_page_token
                if not token:
                    return names

    def _create(self, training: training_pb2_grpc.TrainingServiceStub, request: training_pb2.CreateRunRequest) -> str:
        while True:
            try:
                return str(training.CreateRun(request, metadata=self._metadata, timeout=5).run.name)
            except grpc.RpcError:
                time.sleep(0.05)


def move_runs(cluster: Cluster, finish: threading.Event) -> None:
    """Has the trainer hand runs back all the time, so that leases change hands."""
    metadata = internal_metadata(cluster.token)
    with grpc.insecure_channel(cluster.addresses["trainer"]) as channel:
        control = trainer_pb2_grpc.TrainerServiceStub(channel)
        while not finish.wait(1.0):
            with suppress(grpc.RpcError):
                status = control.GetTrainerStatus(trainer_pb2.GetTrainerStatusRequest(), metadata=metadata, timeout=1)
                for run in status.resident_runs:
                    control.EvictRun(trainer_pb2.EvictRunRequest(run=run), metadata=metadata, timeout=5)


def die_at_each(cluster: Cluster, name: str, points: list[str], missed: list[str]) -> None:
    """Starts a service again and again, each time to die at the next place; notes where it did not."""
    cluster.kill(name)
    for number, point in enumerate(points):
        cluster.launch(name, allow_failpoints="true", failpoints=f"{point}=kill@{1 + number % 3}")
        with suppress(TimeoutError):
            if cluster.processes[name].wait(REACH_SECONDS) == -signal.SIGKILL:
                continue
        missed.append(point)
        cluster.kill(name)
    cluster.launch(name)
    cluster.wait_ready([name])


@contextmanager
def beside(*works: Callable[[threading.Event], None]) -> Iterator[None]:
    """Runs works in threads until the body has ended; raises what any of them raised."""
    finish = threading.Event()
    with ThreadPoolExecutor(len(works)) as pool:
        running = [pool.submit(work, finish) for work in works]
        try:
            yield
        finally:
            finish.set()
    for work in running:
        work.result()


def points_of(role: str) -> list[str]:
    """Returns the places of a service; those between trainers have a test of their own."""
    places = set(failpoints.FAILPOINTS) - set(failpoints.LENDING)
    return [point for point in failpoints.FAILPOINTS if point in places and point.startswith(role + ".")]


@pytest.mark.timeout(400)
def test_a_kill_at_any_named_place_changes_nothing_that_a_user_sees(tmp_path: Path) -> None:
    """Each place is reached and dies there; numbers, step counts, weights and runs are those of a life without."""
    settings = {"TREADLE_TRAINER_LEASE_SECONDS": "2", "TREADLE_TRAINER_SNAPSHOT_EVERY_STEPS": "3"}
    cluster = Cluster(tmp_path / "cluster", settings=settings, forked=True)
    missed: list[str] = []
    try:
        cluster.start()
        users = [
            User(loop, seed, cluster.gateway_address, cluster.new_tenant()).start()
            for seed, loop in enumerate((supervise, reinforce), 1)
        ]
        newcomer = Newcomer(cluster.gateway_address, cluster.new_tenant())
        with beside(newcomer.work, lambda finish: move_runs(cluster, finish)):
            with ThreadPoolExecutor(3) as pool:
                dying = [
                    pool.submit(die_at_each, cluster, role, points_of(role), missed)
                    for role in ("trainer", "store", "gateway")
                ]
            for role in dying:
                role.result()
        assert missed == []
        stormy = [user.finish() for user in users]
        assert stormy == [user.undisturbed() for user in users]
        assert newcomer.listed() == newcomer.made
    finally:
        cluster.close()


def test_every_named_place_is_in_the_code_and_none_other() -> None:
    """The catalogue and the code name the same places."""
    source = "".join(
        path.read_text() for role in ("adapter_store", "trainer_svc", "gateway") for path in (ROOT / role).rglob("*.py")
    )
    for name in failpoints.WRITES:
        once = source.count(f'failpoints.around("{name}")')
        both = [source.count(f'failpoints.reach("{name}.{side}")') for side in ("before", "after")]
        assert (once, both) in ((1, [0, 0]), (0, [1, 1])), name
    for name in {**failpoints.HAND_OVERS, **failpoints.LENDING}:
        assert source.count(f'failpoints.reach("{name}")') == 1, name
    used = source.count("failpoints.around(") + source.count("failpoints.reach(")
    places = len(failpoints.WRITES) + len(failpoints.HAND_OVERS) + len(failpoints.LENDING)
    assert used == places + 1  # The commit is written as two places.


def test_a_failpoint_needs_a_deployment_that_allows_it() -> None:
    """Neither a setting alone nor a wrong name arms anything."""
    with pytest.raises(ValueError, match="allow_failpoints"):
        failpoints.arm("store.commit.before=kill", allowed=False)
    for wrong in ("store.commit=kill", "store.commit.before=explode", "store.commit.before=raise:NOPE", "nonsense"):
        with pytest.raises(ValueError, match=r"is no failpoint|needs seconds"):
            failpoints.arm(wrong, allowed=True)


def test_a_failpoint_fires_once_at_its_visit() -> None:
    """`@2` lets the first visit pass, and the third."""
    failpoints.arm("trainer.hello=raise:WORKER_LOST@2", allowed=True)
    failpoints.reach("trainer.hello")
    with pytest.raises(TreadleError, match=r"trainer\.hello"):
        failpoints.reach("trainer.hello")
    failpoints.reach("trainer.hello")
