"""Checkpoints through the real SDK: a resumed run is the run that was not interrupted, and what names may be used."""

import numpy as np
import pytest
import tinker

from tests.interop.conftest import ALIAS, rest, sdk
from tests.interop.test_tinker_loops import adam, batch, logprobs
from tests.support.cluster import Cluster


def step(training: tinker.TrainingClient, data: list[tinker.Datum]) -> np.ndarray:
    """Takes a step and returns the log-probs before it."""
    result = training.forward_backward(data, "cross_entropy")
    training.optim_step(adam()).result()
    return logprobs(result.result())


def test_resume_with_the_optimizer_is_no_interruption_and_without_it_is_not(tinker_cluster: Cluster) -> None:
    """To the bit; and the new run has the shape of the checkpoint, not the defaults."""
    key = tinker_cluster.new_tenant()
    with sdk(tinker_cluster, key) as service:
        metadata = {"renderer_name": "role_colon"}
        training = service.create_lora_training_client(
            ALIAS, rank=4, seed=11, train_unembed=False, user_metadata=metadata
        ).result()
        data = batch(training)
        for _ in range(3):
            step(training, data)
        saved = training.save_state("halfway", ttl_seconds=7200, user_metadata={"why": "test"}).result().path
        assert saved == f"tinker://{training.model_id}/weights/halfway"
        uninterrupted = [step(training, data) for _ in range(3)]
    with sdk(tinker_cluster, key) as service:
        whole = service.create_training_client_from_state_with_optimizer(saved).result()
        weights = service.create_training_client_from_state(saved).result()
        assert whole.model_id.endswith(":train:0")
        assert whole.get_info().lora_rank == 4
        resumed = [step(whole, data) for _ in range(3)]
        assert all(np.array_equal(a, b) for a, b in zip(resumed, uninterrupted, strict=True))
        fresh = [step(weights, data) for _ in range(3)]
        # The same weights, so the same first result; another optimizer, so another one behind the first step.
        assert np.array_equal(fresh[0], uninterrupted[0])
        assert not np.array_equal(fresh[2], uninterrupted[2])
    catalog = rest(tinker_cluster, key)
    info = catalog.get_weights_info_by_tinker_path(saved).result()
    assert (info.base_model, info.lora_rank, info.train_unembed) == (ALIAS, 4, False)
    run = catalog.get_training_run(training.model_id).result()
    assert run.user_metadata == metadata
    assert run.last_checkpoint.checkpoint_id == "weights/halfway"
    assert run.last_checkpoint.user_metadata == {"why": "test"}
    assert 7000 < (run.last_checkpoint.expires_at - run.last_checkpoint.time).total_seconds() < 7300


def test_loading_into_a_live_model_goes_back_to_the_checkpoint(tinker_cluster: Cluster) -> None:
    """The calls that the SDK calls deprecated and still has."""
    with sdk(tinker_cluster) as service:
        training = service.create_lora_training_client(ALIAS, rank=4, seed=12).result()
        data = batch(training)
        step(training, data)
        saved = training.save_state("here").result().path
        ahead = [step(training, data) for _ in range(2)]
        with pytest.warns(FutureWarning):
            training.load_state_with_optimizer(saved).result()
        assert all(np.array_equal(a, b) for a, b in zip([step(training, data) for _ in range(2)], ahead, strict=True))


def test_a_name_is_taken_once_unless_it_is_overwritten(tinker_cluster: Cluster) -> None:
    """A duplicate fails through its future, as the user's mistake, and at once."""
    key = tinker_cluster.new_tenant()
    with sdk(tinker_cluster, key) as service:
        training = service.create_lora_training_client(ALIAS, rank=4, seed=13).result()
        data = batch(training)
        first = training.save_state("name").result().path
        step(training, data)
        with pytest.raises(tinker.RequestFailedError, match="is taken by other content") as caught:
            training.save_state("name").result()
        assert caught.value.category.value == "user"
        assert training.save_state("name", overwrite=True).result().path == first
        after = logprobs(training.forward(data, "cross_entropy").result())
        again = service.create_training_client_from_state(first).result()
        assert np.array_equal(logprobs(again.forward(data, "cross_entropy").result()), after)
        with pytest.raises(tinker.RequestFailedError, match="valid id"):
            training.save_state("no spaces please").result()
    listed = rest(tinker_cluster, key).list_checkpoints(training.model_id).result().checkpoints
    assert [checkpoint.checkpoint_id for checkpoint in listed] == ["weights/name"]
