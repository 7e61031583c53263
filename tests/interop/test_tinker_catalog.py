"""The real SDK's catalog: lists, times to live, copies, files; and what is refused there."""

import io

import httpx
import numpy as np
import pytest
import tinker
from safetensors.numpy import load
from tinker import types

from tests.interop.conftest import ALIAS, BASE, rest, sdk
from tests.interop.test_tinker_loops import adam, batch, logprobs
from tests.support.cluster import Cluster


@pytest.fixture(scope="module")
def saved(tinker_cluster: Cluster) -> tuple[str, str, dict[str, str]]:
    """A tenant's key, a run of it, and the paths of what was saved from that run, by kind."""
    return save_all(tinker_cluster)


def save_all(cluster: Cluster) -> tuple[str, str, dict[str, str]]:
    """Saves weights of each kind as a new tenant."""
    key = cluster.new_tenant()
    with sdk(cluster, key) as service:
        training = service.create_lora_training_client(ALIAS, rank=4, seed=21).result()
        training.forward_backward(batch(training), "cross_entropy")
        training.optim_step(adam()).result()
        paths = {
            "weights": training.save_state("a").result().path,
            "sampler_weights": training.save_weights_for_sampler("b", ttl_seconds=3600).result().path,
            "external_weights": training.save_weights_external("c").result().path,
        }
        training.save_weights_and_get_sampling_client().result()
    return key, training.model_id, paths


def test_lists_show_what_was_saved_and_only_that(tinker_cluster: Cluster, saved: tuple[str, str, dict[str, str]]):
    """Ephemeral weights are in none; pages follow limit and offset; another tenant sees nothing."""
    key, run, paths = saved
    catalog = rest(tinker_cluster, key)
    listed = catalog.list_checkpoints(run).result().checkpoints
    assert {c.checkpoint_type: c.tinker_path for c in listed} == {
        "training": paths["weights"],
        "sampler": paths["sampler_weights"],
        "external": paths["external_weights"],
    }
    assert all(c.size_bytes > 1000 and not c.public for c in listed)
    mine = catalog.list_user_checkpoints(limit=2, offset=1).result()
    assert (len(mine.checkpoints), mine.cursor.total_count) == (2, 3)
    runs = catalog.list_training_runs().result()
    assert [r.training_run_id for r in runs.training_runs] == [run]
    assert runs.training_runs[0].last_sampler_checkpoint.tinker_path == paths["sampler_weights"]
    session = run.partition(":")[0]
    assert catalog.list_sessions().result().sessions == [session]
    assert catalog.get_session(session).result().training_run_ids == [run]
    stranger = rest(tinker_cluster)
    assert stranger.list_training_runs().result().training_runs == []
    for refused in (
        lambda: stranger.get_training_run(run),
        lambda: stranger.get_weights_info_by_tinker_path(paths["weights"]),
        lambda: stranger.delete_checkpoint_from_tinker_path(paths["weights"]),
    ):
        with pytest.raises(tinker.NotFoundError):
            refused().result()


def test_a_time_to_live_is_set_and_taken_away(tinker_cluster: Cluster, saved: tuple[str, str, dict[str, str]]) -> None:
    """By the calls of the SDK, in the bounds that it states."""
    key, run, paths = saved
    catalog = rest(tinker_cluster, key)

    def expiry():
        found = catalog.list_checkpoints(run).result().checkpoints
        return next(c.expires_at for c in found if c.tinker_path == paths["weights"])

    assert expiry() is None
    catalog.set_checkpoint_ttl_from_tinker_path(paths["weights"], 3600).result()
    assert expiry() is not None
    catalog.set_checkpoint_ttl_from_tinker_path(paths["weights"], None).result()
    assert expiry() is None
    with pytest.raises(tinker.BadRequestError, match="ttl_seconds"):
        catalog.set_checkpoint_ttl_from_tinker_path(paths["weights"], 5).result()


def test_a_copy_outlives_what_it_was_copied_from(tinker_cluster: Cluster) -> None:
    """With the same weights, in a run of its own."""
    key = tinker_cluster.new_tenant()
    with sdk(tinker_cluster, key) as service:
        training = service.create_lora_training_client(ALIAS, rank=4, seed=22).result()
        data = batch(training)
        training.forward_backward(data, "cross_entropy")
        training.optim_step(adam()).result()
        there = training.save_state("kept").result().path
        expected = logprobs(training.forward(data, "cross_entropy").result())
        copy = rest(tinker_cluster, key).copy_weights(there, destination_project_id="any").result()
        assert copy != there
        rest(tinker_cluster, key).delete_checkpoint_from_tinker_path(there).result()
        with pytest.raises(tinker.NotFoundError):
            service.create_training_client_from_state(there).result()
        loaded = service.create_training_client_from_state_with_optimizer(copy).result()
        assert np.array_equal(logprobs(loaded.forward(data, "cross_entropy").result()), expected)


def test_external_weights_are_peft_files_over_links_with_ranges(
    tinker_cluster: Cluster, saved: tuple[str, str, dict[str, str]]
) -> None:
    """A link needs no key, gives whole files and parts, and says no to a changed one."""
    key, _, paths = saved
    links = rest(tinker_cluster, key).get_external_weights_urls(paths["external_weights"]).result()
    assert set(links.urls) == {"adapter_config.json", "adapter_model.safetensors"}
    whole = httpx.get(links.urls["adapter_model.safetensors"])
    assert (whole.status_code, whole.headers["accept-ranges"]) == (200, "bytes")
    tensors = load(whole.content)
    assert any(name.endswith("lora_A.weight") for name in tensors)
    config = httpx.get(links.urls["adapter_config.json"]).json()
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 32, BASE)
    joined = io.BytesIO()
    size = len(whole.content)
    for first, last in ((0, 99), (100, 1_000), (1_001, size - 1)):
        part = httpx.get(links.urls["adapter_model.safetensors"], headers={"range": f"bytes={first}-{last}"})
        assert (part.status_code, part.headers["content-range"]) == (206, f"bytes {first}-{last}/{size}")
        joined.write(part.content)
    assert joined.getvalue() == whole.content
    tail = httpx.get(links.urls["adapter_model.safetensors"], headers={"range": "bytes=-10"})
    assert tail.content == whole.content[-10:]
    beyond = httpx.get(links.urls["adapter_model.safetensors"], headers={"range": f"bytes={size}-"})
    assert beyond.status_code == 416
    assert httpx.get(links.urls["adapter_config.json"][:-4] + "AAAA").status_code == 403
    refused = httpx.get(
        f"http://{tinker_cluster.http_address}/api/v1/training_runs/r/checkpoints/weights/a/external_weights_urls",
        headers={"x-api-key": key},
    )
    assert (refused.status_code, "external_weights only" in refused.text) == (400, True)


def test_samplers_and_capabilities_name_bases_as_programs_do(
    tinker_cluster: Cluster, saved: tuple[str, str, dict[str, str]]
) -> None:
    """By the alias; the base's own name is served as well, and so is a name with a context length behind it."""
    key, _, paths = saved
    catalog = rest(tinker_cluster, key)
    models = {m.model_name: m for m in catalog.get_server_capabilities().result().supported_models}
    assert set(models) == {ALIAS, BASE}
    assert models[ALIAS].trainable
    assert models[ALIAS].max_context_length > 100
    with sdk(tinker_cluster, key) as service:
        sampler = service.create_sampling_client(model_path=paths["sampler_weights"]).result()
        shown = catalog.get_sampler(sampler._sampling_session_id).result()
        assert (shown.base_model, shown.model_path) == (ALIAS, paths["sampler_weights"])
        for name in (BASE, f"{ALIAS}:peft:32768"):
            base = service.create_sampling_client(base_model=name).result()
            sampled = base.sample(types.ModelInput.from_ints([1, 5]), 1, types.SamplingParams(max_tokens=1)).result()
            assert len(sampled.sequences[0].tokens) == 1


def test_usage_is_told_by_run(tinker_cluster: Cluster, saved: tuple[str, str, dict[str, str]]) -> None:
    """Tokens of training, in the SDK's own type; storage of now."""
    key, run, _ = saved
    admin = tinker.AdminClient(base_url=f"http://{tinker_cluster.http_address}", api_key=f"tml-{key}")
    usage = admin.get_billing_usage("2026-01-01T00:00:00Z", "2100-01-01T00:00:00Z").result()
    trained = [e for e in usage.data if e.event_info.type == "training"]
    assert sum(e.event_info.token_count for e in trained) > 10
    assert {e.session_id for e in trained} == {run.partition(":")[0]}
    stored = admin.get_current_checkpoint_storage_usage().result()
    assert (stored.data[0].checkpoint_count, stored.data[0].size_bytes > 1000) == (3, True)


def test_published_weights_are_read_by_others_until_they_are_unpublished(
    tinker_cluster: Cluster,
) -> None:
    """Sampled from, trained on, looked at and copied by their path, as by their owner; changed by their owner alone."""
    key, run, paths = save_all(tinker_cluster)
    catalog, stranger_key = rest(tinker_cluster, key), tinker_cluster.new_tenant()
    stranger = rest(tinker_cluster, stranger_key)
    for path in (paths["weights"], paths["sampler_weights"]):
        catalog.publish_checkpoint_from_tinker_path(path).result()
    assert {c.tinker_path: c.public for c in catalog.list_checkpoints(run).result().checkpoints} == {
        paths["weights"]: True,
        paths["sampler_weights"]: True,
        paths["external_weights"]: False,
    }
    prompt = types.ModelInput.from_ints([1, 5, 9, 5])
    params = types.SamplingParams(max_tokens=6, temperature=0.0)
    with sdk(tinker_cluster, key) as mine, sdk(tinker_cluster, stranger_key) as theirs:
        drawn = [
            service.create_sampling_client(model_path=paths["sampler_weights"])
            .result()
            .sample(prompt, 1, params)
            .result()
            for service in (mine, theirs)
        ]
        assert drawn[0].sequences[0].tokens == drawn[1].sequences[0].tokens
        url = f"http://{tinker_cluster.http_address}/v1/completions"
        asked = {"model": paths["sampler_weights"], "prompt": [1, 5, 9, 5], "max_tokens": 6, "temperature": 0}
        told = [httpx.post(url, json=asked, headers={"authorization": f"Bearer {k}"}) for k in (key, stranger_key)]
        assert told[0].json()["choices"] == told[1].json()["choices"]
        resumed = [
            service.create_training_client_from_state_with_optimizer(paths["weights"]).result()
            for service in (mine, theirs)
        ]
        losses = []
        for client in resumed:
            client.forward_backward(batch(client), "cross_entropy").result()
            client.optim_step(adam()).result()
            losses.append(client.forward_backward(batch(client), "cross_entropy").result().metrics["loss:sum"])
        assert losses[0] == losses[1]
        assert stranger.get_weights_info_by_tinker_path(paths["weights"]).result().lora_rank == 4
        with pytest.raises(tinker.NotFoundError):
            stranger.delete_checkpoint_from_tinker_path(paths["weights"]).result()
        with pytest.raises(tinker.NotFoundError):
            stranger.unpublish_checkpoint_from_tinker_path(paths["weights"]).result()
        for path in (paths["weights"], paths["sampler_weights"]):
            catalog.unpublish_checkpoint_from_tinker_path(path).result()
        with pytest.raises(tinker.NotFoundError):
            stranger.get_weights_info_by_tinker_path(paths["weights"]).result()
        with pytest.raises(tinker.NotFoundError):
            theirs.create_sampling_client(model_path=paths["sampler_weights"]).result()
        # What was begun from it goes on.
        assert resumed[1].forward(batch(resumed[1]), "cross_entropy").result().metrics["loss:sum"] == losses[1]
