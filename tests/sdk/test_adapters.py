"""Saved adapters over the SDK: saving, listing, loading, moving as folders; and administration."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.support.cluster import Cluster
from tests.support.proxy import TroubleProxy
from treadle import AdamParams, Datum, ModelInput, ServiceClient, TrainingClient
from treadle.errors import AccessError, BadNameError, ConflictError, NotFoundError, TreadleError, UnavailableError
from treadle.settings import client_settings

BASE = "treadle/pip"


@pytest.fixture
def service(cluster: Cluster) -> Iterator[ServiceClient]:
    with ServiceClient(cluster.gateway_address, cluster.new_tenant()) as client:
        yield client


def data() -> list[Datum]:
    """One short sequence."""
    tokens = np.array([1, 5, 9, 5, 9, 5, 9])
    return [Datum(ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:], "weights": np.ones(6)})]


def step(client: TrainingClient) -> float:
    """One step; returns the loss before it."""
    output = client.forward_backward(data(), "cross_entropy")
    client.optim_step(AdamParams(learning_rate=1e-2)).result(60)
    return output.result().metrics["loss:sum"]


def test_a_checkpoint_goes_on_as_if_nothing_had_happened(service: ServiceClient) -> None:
    """Weights and moments are restored exactly; without the optimizer the moments start afresh."""
    first = service.create_lora_training_client(BASE, rank=4, seed=2)
    step(first)
    step(first)
    path = first.save_state("two").result(60).path
    assert path == f"{first.run}/checkpoints/two"
    expected = [step(first) for _ in range(3)]
    exact = service.create_training_client_from_state_with_optimizer(path)
    assert [step(exact) for _ in range(3)] == expected
    fresh = service.create_training_client_from_state(path)
    losses = [step(fresh) for _ in range(3)]
    assert losses[0] == expected[0]
    assert losses[1:] != expected[1:]
    first.load_state_with_optimizer(path)
    assert [step(first) for _ in range(3)] == expected
    assert service.get_run(exact.run).lora == service.get_run(first.run).lora


def test_a_revision_travels_as_a_peft_folder(service: ServiceClient, tmp_path: Path) -> None:
    """Pulled whole, pushed back, and trained on from the pushed one with equal numbers."""
    client = service.create_lora_training_client(BASE, rank=4, seed=2)
    step(client)
    saved = client.save_weights_for_sampler("one").result(60).path
    folder = service.pull_adapter(saved, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]
    pushed = service.push_adapter(client.run, folder, "copy")
    assert pushed.name == f"{client.run}/revisions/copy"
    assert pushed.base == BASE
    left = service.create_training_client_from_state(saved).forward(data()).result(60).metrics
    right = service.create_training_client_from_state(pushed.name).forward(data()).result(60).metrics
    assert left == right
    with pytest.raises(ConflictError):
        service.pull_adapter(saved, folder)
    with pytest.raises(BadNameError):
        service.create_training_client_from_state_with_optimizer(saved)


def test_saved_adapters_are_listed_read_and_deleted(service: ServiceClient) -> None:
    """The catalog follows what is saved and deleted."""
    client = service.create_lora_training_client(BASE, rank=4)
    step(client)
    revision = client.save_weights_for_sampler("a").result(60).path
    checkpoint = client.save_state().result(60).path
    assert [saved.name for saved in service.list_revisions(client.run)] == [revision]
    assert [saved.name for saved in service.list_checkpoints()] == [checkpoint]
    info = service.get_adapter(checkpoint)
    assert (info.base, info.lora.rank, info.step) == (BASE, 4, 1)
    assert {file.path for file in info.files} >= {"adapter_config.json", "adapter_model.safetensors"}
    for name in (revision, checkpoint):
        service.delete_adapter(name)
        with pytest.raises(NotFoundError):
            service.get_adapter(name)


def test_an_interrupted_download_leaves_nothing_behind(service: ServiceClient, tmp_path: Path) -> None:
    """What is not whole does not appear."""
    client = service.create_lora_training_client(BASE, rank=4)
    with pytest.raises(NotFoundError):
        service.pull_adapter(f"{client.run}/revisions/none", tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


def test_a_broken_download_goes_on_where_it_broke(cluster: Cluster, tmp_path: Path) -> None:
    """Over a connection that is cut in the middle, and again by a later call after that one gave up."""
    key = cluster.new_tenant()
    with ServiceClient(cluster.gateway_address, key) as service:
        client = service.create_lora_training_client(BASE, rank=512)
        saved = client.save_weights_for_sampler("big").result(60).path
        size = sum(file.size for file in service.get_adapter(saved).files)
        whole = service.pull_adapter(saved, tmp_path / "whole")
    assert size > 8 * 2**20
    with TroubleProxy(cluster.gateway_address) as proxy:
        patient = client_settings(proxy.address, key)
        hasty = replace(patient, retry_seconds=0.0)
        target = tmp_path / "adapter"
        seen: list[int] = []
        cut = 0

        def cut_twice(done: int, total: int) -> None:
            nonlocal cut
            assert total == size
            seen.append(done)
            if cut < 2 and done > (cut + 1) * size / 4:
                cut += 1
                proxy.cut()

        with ServiceClient(settings=hasty) as other, pytest.raises(UnavailableError):
            other.pull_adapter(saved, target, cut_twice)
        assert not target.exists()
        before = seen[-1]
        assert 0 < before < size
        seen.clear()
        with ServiceClient(settings=patient) as other:
            other.pull_adapter(saved, target, cut_twice)
    assert cut == 2
    assert seen[0] == before
    assert seen == sorted(seen)
    assert seen[-1] == size
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "whole"}
    for path in whole.iterdir():
        assert (target / path.name).read_bytes() == path.read_bytes()


def test_an_administrator_makes_tenants_and_keys(cluster: Cluster) -> None:
    """A key works until it is revoked; others may not administer."""
    with ServiceClient(cluster.gateway_address, cluster.admin_key) as admin:
        tenant = admin.create_tenant("sdk-admin-test")
        with pytest.raises(ConflictError):
            admin.create_tenant(tenant)
        assert tenant in admin.list_tenants()
        key, secret = admin.create_key(tenant, ["train"])
        assert key.scopes == ("train",)
        assert [entry.key_id for entry in admin.list_keys(tenant)] == [key.key_id]
        assert {worker.kind for worker in admin.list_workers()} >= {"trainer"}
        with ServiceClient(cluster.gateway_address, secret) as user:
            capabilities = user.get_server_capabilities()
            assert capabilities.tenant == tenant
            assert BASE in [model.model_name for model in capabilities.supported_models]
            with pytest.raises(AccessError):
                user.list_tenants()
        admin.revoke_key(key.key_id)
        assert admin.list_keys(tenant)[0].revoked
        with pytest.raises(TreadleError):
            admin.revoke_key("no-such-key")
