"""Several bases and several samplers in one deployment of real processes: everything goes where it belongs."""

from collections.abc import Iterator

import grpc
import pytest

from tests.support.cluster import Cluster
from tests.support.users import batch
from treadle import AdamParams, ModelInput, SamplingParams, ServiceClient
from treadle.errors import NotFoundError
from treadle.internal.v1 import sampler_pb2, sampler_pb2_grpc, trainer_pb2, trainer_pb2_grpc
from treadle.names import parse_adapter
from treadle_service.channels import internal_metadata
from treadle_service.rendezvous import rank

PIP, PACKED = "treadle/pip", "treadle/pip@int8"
# Besides one trainer and two samplers of Pip.
OTHERS = ("trainer-1", "sampler-2")
PROMPT = ModelInput.from_ints([1, 5, 9])


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two bases: three workers of one, two of the other."""
    settings = {"TREADLE_SAMPLER_HEARTBEAT_SECONDS": "0.5"}
    cluster = Cluster(tmp_path_factory.mktemp("cluster"), settings=settings, trainers=2, samplers=3, forked=True)
    try:
        for name in cluster.names:
            cluster.launch(name, **({"quantize": "int8"} if name in OTHERS else {}))
        cluster.wait_ready()
        yield cluster
    finally:
        cluster.close()


def runs_on(cluster: Cluster, trainer: str) -> set[str]:
    with grpc.insecure_channel(cluster.addresses[trainer]) as channel:
        status = trainer_pb2_grpc.TrainerServiceStub(channel).GetTrainerStatus(
            trainer_pb2.GetTrainerStatusRequest(), metadata=internal_metadata(cluster.token), timeout=10
        )
    return set(status.resident_runs)


def sampler_status(cluster: Cluster, name: str) -> sampler_pb2.GetSamplerStatusResponse:
    with grpc.insecure_channel(cluster.addresses[name]) as channel:
        return sampler_pb2_grpc.SamplerServiceStub(channel).GetSamplerStatus(
            sampler_pb2.GetSamplerStatusRequest(), metadata=internal_metadata(cluster.token), timeout=10
        )


def cached(cluster: Cluster, name: str) -> set[str]:
    return set(sampler_status(cluster, name).cached_revisions)


def test_each_base_has_its_own_workers(cluster: Cluster) -> None:
    """Runs are trained on and sampled from the base that they name; the bases' numbers differ."""
    losses, drawn, runs, paths = {}, {}, {}, {}
    with ServiceClient(cluster.gateway_address, cluster.new_tenant()) as service:
        served = {model.model_name for model in service.get_server_capabilities().supported_models}
        assert served == {PIP, PACKED}
        for base in (PIP, PACKED):
            training = service.create_lora_training_client(base, rank=4, seed=1)
            loss = training.forward_backward(batch(1, 0), "cross_entropy")
            training.optim_step(AdamParams(learning_rate=1e-3))
            paths[base] = training.save_weights_for_sampler("one").result(60).path
            runs[base], losses[base] = training.run, loss.result(60).metrics["loss:sum"]
            sampler = service.create_sampling_client(model_path=paths[base])
            drawn[base] = sampler.sample(PROMPT, 1, SamplingParams(max_tokens=4, seed=1)).result(60).sequences[0]
            before = sampler_status(cluster, "sampler-2").num_tokens
            plain = service.create_sampling_client(base_model=base)
            plain.sample(PROMPT, 1, SamplingParams(max_tokens=4, seed=1)).result(60)
            assert (sampler_status(cluster, "sampler-2").num_tokens > before) == (base == PACKED)
        ours = set(runs.values())
        assert runs_on(cluster, "trainer") & ours == {runs[PIP]}
        assert runs_on(cluster, "trainer-1") == {runs[PACKED]}
        assert cached(cluster, "sampler-2") == {paths[PACKED]}
        assert paths[PIP] in cached(cluster, "sampler") | cached(cluster, "sampler-1")
        assert losses[PIP] == pytest.approx(losses[PACKED], rel=0.05)
        assert losses[PIP] != losses[PACKED]
        assert drawn[PIP].logprobs != drawn[PACKED].logprobs


def test_a_base_that_nobody_has_is_refused_with_those_that_there_are(cluster: Cluster) -> None:
    """In the words of the gateway."""
    with (
        ServiceClient(cluster.gateway_address, cluster.new_tenant()) as service,
        pytest.raises(NotFoundError, match=f"there is {PIP}, {PACKED}"),
    ):
        service.create_lora_training_client("treadle/pip@nf4", rank=4)


def test_adapters_keep_their_samplers_while_others_come_and_go(cluster: Cluster) -> None:
    """A dozen on two samplers, by the hash of their runs; one is killed: the other serves all, and loads only its."""
    with ServiceClient(cluster.gateway_address, cluster.new_tenant()) as service:
        trainings = [service.create_lora_training_client(PIP, rank=2, seed=seed) for seed in range(12)]
        saved = [training.save_weights_for_sampler("one") for training in trainings]
        paths = [handle.result(60).path for handle in saved]
        samplings = [service.create_sampling_client(model_path=path) for path in paths]

        def draw_all() -> list[tuple[int, ...]]:
            # One after the other: what is too much for a sampler goes on to the next.
            params = SamplingParams(max_tokens=3, seed=1)
            return [tuple(s.sample(PROMPT, 1, params).result(90).sequences[0].tokens) for s in samplings]

        # As gateways and the store rank them.
        home = {path: rank(str(parse_adapter(path).run_name), ["sampler-0", "sampler-1"])[0] for path in paths}
        assert set(home.values()) == {"sampler-0", "sampler-1"}
        drawn = draw_all()
        own = {path for path in paths if home[path] == "sampler-1"}
        assert cached(cluster, "sampler-1") & set(paths) == own
        assert cached(cluster, "sampler") & set(paths) == set(paths) - own
        cluster.kill("sampler-1")
        assert draw_all() == drawn
        assert cached(cluster, "sampler") & set(paths) == set(paths)
        cluster.launch("sampler-1")
        cluster.wait_ready(["sampler-1"])
        # The gateway hears of it within a second or two; nobody else's requests come here meanwhile.
        while cached(cluster, "sampler-1") & set(paths) != own:
            assert cached(cluster, "sampler-1") & set(paths) <= own
            assert draw_all() == drawn
