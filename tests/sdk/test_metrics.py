"""Metrics over the SDK: recorded by the service, logged by the user, read from a cursor on."""

import logging
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from tests.support.cluster import Cluster
from treadle import AdamParams, Datum, ModelInput, ServiceClient
from treadle.errors import BadInputError, NotFoundError
from treadle.metrics import MAX_TEXT_BYTES
from treadle.records import TextSample

BASE = "treadle/pip"


@pytest.fixture
def service(cluster: Cluster) -> Iterator[ServiceClient]:
    with ServiceClient(cluster.gateway_address, cluster.new_tenant()) as client:
        yield client


def test_a_loop_is_recorded_without_a_word_and_what_it_logs_is_there(service: ServiceClient) -> None:
    """Loss, gradient norm and learning rate come with the steps; reward and texts with log_metrics."""
    client = service.create_lora_training_client(BASE, rank=4)
    tokens = np.array([1, 5, 9, 5, 9, 5, 9])
    data = [Datum(ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:], "weights": np.ones(6)})]
    losses = []
    for step in (1, 2):
        losses.append(client.forward_backward(data, "cross_entropy"))
        client.optim_step(AdamParams(learning_rate=1e-2)).result(60)
        sample = TextSample("ask", "a" * 3 * MAX_TEXT_BYTES, 0.5)
        client.log_metrics(step, {"reward": step / 2, "kl": np.float32(0.25)}, samples=["plain", sample])
    # A failure is answered when it is durable, with all before it.
    client.barrier().result(60)
    client.log_metrics(2, {"reward": 9}).result(60)
    series = service.list_metrics(client.run)
    mine = {point.step: point.values for point in series.points if point.source == "user"}
    assert mine == {1: {"reward": 0.5, "kl": 0.25}, 2: {"reward": 9.0, "kl": 0.25}}
    made = {point.step: point.values for point in series.points if point.source == "service"}
    assert made[1]["loss:sum"] == losses[0].result().metrics["loss:sum"]
    assert (made[1]["num_tokens:sum"], made[1]["learning_rate:mean"]) == (6, 1e-2)
    assert service.list_metrics(client.run, after_cursor=series.cursor).points == []
    assert {point.step for point in service.list_metrics(client.run, from_step=2).points} == {2}
    texts = service.list_samples(client.run)
    assert [found.step for found in texts] == [1, 2]
    plain, long = texts[0].samples
    assert plain == TextSample("", "plain")
    assert (long.prompt, long.reward, "[…]" in long.response) == ("ask", 0.5, True)
    assert len(long.response.encode()) <= MAX_TEXT_BYTES
    latest = service.get_run(client.run).latest
    assert latest is not None
    assert latest.values["loss:sum"] == losses[latest.step - 1].result().metrics["loss:sum"]


def test_many_steps_from_many_threads_share_requests(service: ServiceClient) -> None:
    client = service.create_lora_training_client(BASE, rank=4)

    def log(thread: int) -> None:
        for step in range(100):
            client.log_metrics(step, {f"thread-{thread}": step})

    threads = [threading.Thread(target=log, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    client.close()
    points = {point.step: point.values for point in service.list_metrics(client.run).points}
    assert points == {step: {f"thread-{thread}": float(step) for thread in range(4)} for step in range(100)}


def test_a_refused_step_takes_no_other_along(service: ServiceClient, caplog: pytest.LogCaptureFixture) -> None:
    """Its handle raises, and a warning says so to those who never look at it."""
    client = service.create_lora_training_client(BASE, rank=4)
    with caplog.at_level(logging.WARNING):
        handles = [client.log_metrics(step, {"a" if step != 3 else "a" * 99: 1.0}) for step in range(6)]
        errors = [handle.exception(60) for handle in handles]
    assert [type(error) for error in errors if error] == [BadInputError]
    assert errors.index(next(filter(None, errors))) == 3
    assert "were not kept" in caplog.text
    assert sorted(point.step for point in service.list_metrics(client.run).points) == [0, 1, 2, 4, 5]
    with pytest.raises(TypeError, match="prompt, response and reward"):
        client.log_metrics(1, {}, samples=[{"text": "?"}])
    with pytest.raises(NotFoundError):
        service.list_metrics("tenants/admin/runs/r-0000000000")
