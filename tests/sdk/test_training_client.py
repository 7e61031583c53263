"""The training client against real services: pipelined calls, resumed streams, errors that reach the right handle."""

import asyncio
import dataclasses
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from tests.support.cluster import Cluster
from tests.support.proxy import TroubleProxy
from treadle import AdamParams, Datum, ModelInput, ServiceClient, TrainingClient
from treadle.errors import (
    AccessError,
    BadBatchError,
    BadInputError,
    CancelledOperationError,
    DependencyFailedError,
    NotFoundError,
    UnavailableError,
)
from treadle.settings import client_settings

BASE = "treadle/pip"


@pytest.fixture(scope="module")
def key(cluster: Cluster) -> str:
    return cluster.new_tenant()


@pytest.fixture
def service(cluster: Cluster, key: str) -> Iterator[ServiceClient]:
    with ServiceClient(cluster.gateway_address, key) as client:
        yield client


def batch(seed: int, rows: int = 3, length: int = 12) -> list[Datum]:
    """Sequences that repeat a short pattern, different for each seed."""
    rng = np.random.default_rng(seed)
    data = []
    for _ in range(rows):
        tokens = np.tile(rng.integers(5, 300, 4), length)[: length + 1]
        data.append(Datum(ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:], "weights": np.ones(length)}))
    return data


def train(client: TrainingClient, steps: int) -> list[float]:
    """Sends all steps without waiting and returns their losses."""
    handles = []
    for step in range(steps):
        handles.append(client.forward_backward(batch(step % 3), "cross_entropy"))
        client.optim_step(AdamParams(learning_rate=1e-2))
    return [handle.result(60).metrics["loss:sum"] for handle in handles]


def test_pipelined_steps_learn_and_give_the_same_bits_as_waiting_for_each(service: ServiceClient) -> None:
    """Calls that do not wait take effect in order, as if each had been waited for."""
    pipelined = train(service.create_lora_training_client(BASE, rank=4, seed=1), 6)
    waiting = service.create_lora_training_client(BASE, rank=4, seed=1)
    one_by_one = []
    for step in range(6):
        output = waiting.forward_backward(batch(step % 3), "cross_entropy").result(60)
        one_by_one.append(output.metrics["loss:sum"])
        response = waiting.optim_step(AdamParams(learning_rate=1e-2)).result(60)
        assert response.step == step + 1
    assert pipelined == one_by_one
    assert pipelined[3] < pipelined[0]


def test_outputs_have_the_shape_of_each_datum(service: ServiceClient) -> None:
    """One entry per datum, one log-probability per target; `forward` gives the same numbers without a gradient."""
    client = service.create_lora_training_client(BASE, rank=4)
    data = [*batch(0, rows=1, length=5), *batch(1, rows=1, length=9)]
    output = client.forward(data).result(60)
    assert [entry["logprobs"].shape for entry in output.loss_fn_outputs] == [(5,), (9,)]
    again = client.forward_backward(data, "cross_entropy").result(60)
    for left, right in zip(output.loss_fn_outputs, again.loss_fn_outputs, strict=True):
        assert np.array_equal(left["logprobs"].to_numpy(), right["logprobs"].to_numpy())


def test_a_stream_that_is_cut_again_and_again_loses_and_repeats_nothing(cluster: Cluster, key: str) -> None:
    """The losses are those of a run that was never disturbed, bit for bit."""
    with ServiceClient(cluster.gateway_address, key) as client:
        expected = train(client.create_lora_training_client(BASE, rank=4, seed=7), 24)
    with (
        TroubleProxy(cluster.gateway_address, delay_seconds=0.01) as proxy,
        ServiceClient(proxy.address, key) as client,
    ):
        training = client.create_lora_training_client(BASE, rank=4, seed=7)
        handles = []
        for step in range(24):
            handles.append(training.forward_backward(batch(step % 3), "cross_entropy"))
            training.optim_step(AdamParams(learning_rate=1e-2))
        for handle in handles[::4]:
            handle.result(60)
            proxy.cut()
        assert [handle.result(60).metrics["loss:sum"] for handle in handles] == expected
        assert training.optim_step().exception(60) is None
        assert proxy.num_cuts >= 5
        assert client.get_run(training.run).next_seq == 50


def test_a_stream_without_a_welcome_is_opened_again(
    cluster: Cluster, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection over which nothing comes holds a run up for a bounded time, and is no progress."""
    settings = dataclasses.replace(client_settings("x", key), give_up_after_seconds=6.0)
    monkeypatch.setattr("treadle.stream.WELCOME_SECONDS", 0.5)
    with (
        TroubleProxy(cluster.gateway_address) as proxy,
        ServiceClient(settings=dataclasses.replace(settings, address=proxy.address)) as client,
    ):
        training = client.create_lora_training_client(BASE, rank=4)
        assert training.barrier().result(60).num_failed == 0
        proxy.delay_seconds = 3600.0
        proxy.cut()
        handle = training.barrier()
        with pytest.raises(TimeoutError):
            handle.result(2)
        proxy.delay_seconds = 0.0
        proxy.cut()
        assert handle.result(60).num_failed == 0
        proxy.delay_seconds = 3600.0
        proxy.cut()
        with pytest.raises(UnavailableError, match="gave up"):
            training.barrier().result(60)


def test_a_connection_that_cannot_be_made_is_given_up_in_the_end(cluster: Cluster, key: str) -> None:
    """After the set time without progress the handles raise instead of waiting for ever."""
    settings = dataclasses.replace(client_settings("x", key), give_up_after_seconds=0.3, first_contact_seconds=0.3)
    with TroubleProxy(cluster.gateway_address) as proxy:
        settings = dataclasses.replace(settings, address=proxy.address)
        with ServiceClient(settings=settings) as client:
            training = client.create_lora_training_client(BASE, rank=4)
            assert training.barrier().result(60).num_failed == 0
            proxy.refusing = True
            proxy.cut()
            with pytest.raises(UnavailableError, match="gave up"):
                training.barrier().result(60)
            with pytest.raises(UnavailableError):
                training.barrier()
    with ServiceClient(settings=settings) as client, pytest.raises(UnavailableError, match="is the gateway running"):
        client.list_runs()


def test_a_failed_batch_fails_its_step_and_the_run_goes_on(service: ServiceClient) -> None:
    """Each handle raises its own operation's error."""
    client = service.create_lora_training_client(BASE, rank=4)
    bad = client.forward_backward(batch(0), "hinge")
    step = client.optim_step()
    good = client.forward_backward(batch(0), "cross_entropy")
    good_step = client.optim_step()
    with pytest.raises(BadBatchError) as caught:
        bad.result(60)
    assert caught.value.reason == "UNKNOWN_LOSS"
    with pytest.raises(DependencyFailedError):
        step.result(60)
    assert good.result(60).metrics["loss:sum"] > 0
    assert good_step.result(60).step == 1


@pytest.mark.parametrize(("rows", "length"), [(8, 6), (1, 60)])
def test_a_batch_longer_than_a_frame_gives_what_its_rows_give(service: ServiceClient, rows: int, length: int) -> None:
    """Cut by rows, or a single row into parts: the joined result is that of the rows one by one."""
    client = service.create_lora_training_client(BASE, rank=4, seed=3)
    rng = np.random.default_rng(0)
    data = []
    for _ in range(rows):
        # Many targets per position make a short row long on the wire.
        targets = np.tile(np.arange(4000) % 1000, (length, 1))
        inputs = {"target_tokens": targets, "weights": rng.normal(size=targets.shape)}
        data.append(Datum(ModelInput.from_ints(rng.integers(5, 300, length)), inputs))
    whole = client.forward(data).result(60)
    assert whole.loss_fn_outputs[-1]["logprobs"].shape == (length, 4000)
    expected = 0.0
    for datum, entry in zip(data, whole.loss_fn_outputs, strict=True):
        part = client.forward([datum]).result(60)
        assert np.array_equal(part.loss_fn_outputs[0]["logprobs"].to_numpy(), entry["logprobs"].to_numpy())
        expected += part.metrics["loss:sum"]
    assert whole.metrics["loss:sum"] == pytest.approx(expected, rel=1e-9)


def test_many_threads_and_a_loop_may_use_one_client(service: ServiceClient) -> None:
    """Handles work from everywhere; operations of threads interleave but none is lost."""
    client = service.create_lora_training_client(BASE, rank=4)
    results: list[int] = []

    def work() -> None:
        for _ in range(5):
            results.append(client.barrier().result(60).num_failed)

    async def work_in_loop() -> None:
        handles = [client.barrier() for _ in range(5)]
        results.extend([(await handle).num_failed for handle in handles])

    threads = [threading.Thread(target=work) for _ in range(3)]
    threads.append(threading.Thread(target=lambda: asyncio.run(work_in_loop())))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == [0] * 20


def test_a_custom_loss_steps_in_its_place(service: ServiceClient) -> None:
    """Minus the sum of log-probabilities, written by hand, trains exactly as cross entropy does."""
    pytest.importorskip("torch")
    ours = service.create_lora_training_client(BASE, rank=4, seed=5)
    theirs = service.create_lora_training_client(BASE, rank=4, seed=5)

    def negative_log_likelihood(_: list[Datum], logprobs: list) -> tuple:
        return -sum(row.sum() for row in logprobs), {"rows:sum": len(logprobs)}

    for step in range(3):
        custom = ours.forward_backward_custom(batch(step), negative_log_likelihood)
        ours.optim_step(AdamParams(learning_rate=1e-2))
        plain = theirs.forward_backward(batch(step), "cross_entropy")
        theirs.optim_step(AdamParams(learning_rate=1e-2))
        metrics = custom.result(60).metrics
        assert metrics["loss:sum"] == pytest.approx(plain.result(60).metrics["loss:sum"], rel=1e-5)
        assert metrics["rows:sum"] == 3
        assert "surrogate_loss:sum" in metrics


def test_a_custom_loss_that_raises_fails_the_step_behind_it(service: ServiceClient) -> None:
    """The user's exception comes out of its handle, and nobody steps without that gradient."""
    pytest.importorskip("torch")
    client = service.create_lora_training_client(BASE, rank=4)

    def broken(_: list[Datum], __: list) -> tuple:
        raise ZeroDivisionError("mine")

    custom = client.forward_backward_custom(batch(0), broken)
    step = client.optim_step()
    with pytest.raises(ZeroDivisionError, match="mine"):
        custom.result(60)
    with pytest.raises(DependencyFailedError):
        step.result(60)
    assert client.barrier().result(60) is not None


def test_cancelled_operations_raise_and_the_run_goes_on(service: ServiceClient) -> None:
    """Exactly the operations that were reported as cancelled raise; a later step is as if they had never been."""
    client = service.create_lora_training_client(BASE, rank=4, seed=1)
    handles = [client.forward_backward(batch(step, rows=8, length=100), "cross_entropy") for step in range(10)]
    cancelled = client.cancel().result(60)
    errors = [handle.exception(60) for handle in handles]
    raised = [seq for seq, error in enumerate(errors, 1) if isinstance(error, CancelledOperationError)]
    assert raised == cancelled
    client.barrier().result(60)
    assert train(client, 1) == train(service.create_lora_training_client(BASE, rank=4, seed=1), 1)


def test_a_second_client_goes_on_where_the_first_stopped(service: ServiceClient) -> None:
    """Attaching to a run continues its order."""
    first = service.create_lora_training_client(BASE, rank=4)
    first.barrier().result(60)
    first.close()
    second = service.attach_training_client(first.run)
    assert second.barrier().result(60).num_failed == 0
    with pytest.raises(CancelledOperationError):
        first.barrier()


def test_local_checks_come_before_anything_is_sent(service: ServiceClient) -> None:
    """Impossible calls raise where they are made and use no seq."""
    with pytest.raises(BadInputError, match="rank"):
        service.create_lora_training_client(BASE, rank=0)
    client = service.create_lora_training_client(BASE, rank=4)
    with pytest.raises(BadBatchError):
        client.forward_backward([], "cross_entropy")
    assert client.barrier().result(60).num_failed == 0
    assert service.get_run(client.run).next_seq == 2


def test_wrong_keys_and_foreign_runs_are_refused(cluster: Cluster, service: ServiceClient) -> None:
    """A bad key is an access error; somebody else's run is simply not there."""
    mine = service.create_lora_training_client(BASE, rank=4)
    with ServiceClient(cluster.gateway_address, "not-a-key") as stranger, pytest.raises(AccessError):
        stranger.list_runs()
    with ServiceClient(cluster.gateway_address, cluster.new_tenant()) as other, pytest.raises(NotFoundError):
        other.attach_training_client(mine.run)


def test_runs_can_be_listed_read_and_deleted(service: ServiceClient) -> None:
    """The catalog shows what was asked for."""
    client = service.create_lora_training_client(BASE, rank=6, seed=9, train_mlp=False, user_metadata={"for": "test"})
    info = service.get_run(client.run)
    assert (info.base, info.lora.rank, info.lora.seed, info.lora.train_mlp) == (BASE, 6, 9, False)
    assert info.metadata == {"for": "test"}
    assert client.get_info().lora_rank == 6
    assert client.run in [run.name for run in service.list_runs()]
    client.close()
    service.delete_run(client.run)
    with pytest.raises(NotFoundError):
        service.get_run(client.run)


def test_the_backlog_bounds_what_a_caller_may_pile_up(cluster: Cluster, key: str) -> None:
    """Above the bound the call waits for room; nothing is lost."""
    settings = dataclasses.replace(client_settings(cluster.gateway_address, key), max_backlog_bytes=600)
    with ServiceClient(settings=settings) as client:
        training = client.create_lora_training_client(BASE, rank=4)
        handles = [training.forward(batch(index)) for index in range(6)]
        assert sum(handle.done() for handle in handles) >= 3
        assert all(handle.result(60).loss_fn_outputs for handle in handles)


@pytest.mark.slow  # Four process starts.
def test_killed_services_cost_the_user_nothing_but_time(own_cluster: Cluster) -> None:
    """Gateway and trainer are killed in mid-run and come back; the losses are those of an undisturbed run."""
    for role in ("store", "trainer", "gateway"):
        own_cluster.launch(role)
    own_cluster.wait_ready(("store", "trainer", "gateway"))
    with ServiceClient(own_cluster.gateway_address, own_cluster.new_tenant()) as client:
        expected = train(client.create_lora_training_client(BASE, rank=4, seed=7), 16)
        training = client.create_lora_training_client(BASE, rank=4, seed=7)
        handles = []
        for step in range(16):
            handles.append(training.forward_backward(batch(step % 3), "cross_entropy"))
            training.optim_step(AdamParams(learning_rate=1e-2))
        for role, step in (("gateway", 2), ("trainer", 5)):
            handles[step].result(60)
            own_cluster.kill(role)
            own_cluster.launch(role)
        assert [handle.result(90).metrics["loss:sum"] for handle in handles] == expected
