"""The real `tinker` SDK, unmodified: supervised and reinforcement loops, custom losses, tenants side by side."""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tinker
import torch
from tinker import types

from tests.interop.conftest import ALIAS, rest, sdk
from tests.support.cluster import Cluster

TEXTS = ("The capital of Italy is Rome.", "Two and two are four, matey.", "A ship sails on the sea.")


def datum(tokens: list[int], weight: float = 1.0) -> types.Datum:
    """Returns a sequence that is learnt whole."""
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": [weight] * (len(tokens) - 1)},
    )


def batch(training: tinker.TrainingClient) -> list[types.Datum]:
    """Returns the texts as data."""
    tokenizer = training.get_tokenizer()
    return [datum(tokenizer.encode(text)) for text in TEXTS]


def adam(learning_rate: float = 5e-3) -> types.AdamParams:
    """Returns settings as the cookbook's."""
    return types.AdamParams(learning_rate=learning_rate, eps=1e-8)


def logprobs(result: types.ForwardBackwardOutput) -> np.ndarray:
    """Returns all log-probs of a result, one after the other."""
    return np.concatenate([output["logprobs"].to_numpy() for output in result.loss_fn_outputs])


def test_supervised_loop_learns_and_its_sampler_agrees_with_its_trainer(tinker_cluster: Cluster) -> None:
    """Queued ahead, saved, sampled; the log-probs of the sampler are those of the trainer up to rounding."""
    with sdk(tinker_cluster) as service:
        training = service.create_lora_training_client(ALIAS, rank=8, seed=3).result()
        info = training.get_info()
        assert (info.model_data.model_name, info.is_lora, info.lora_rank) == (ALIAS, True, 8)
        data = batch(training)
        queued = [(training.forward_backward(data, "cross_entropy"), training.optim_step(adam())) for _ in range(6)]
        losses = [result.result().metrics["loss:sum"] for result, _ in queued]
        assert losses[-1] < 0.7 * losses[0]
        assert all(step.result().metrics["grad_norm:mean"] > 0 for _, step in queued)
        result = training.forward(data, "cross_entropy").result()
        total = -sum(float(output["logprobs"].to_numpy().sum()) for output in result.loss_fn_outputs)
        assert total == pytest.approx(result.metrics["loss:sum"], rel=1e-5)
        saved = training.save_weights_for_sampler("sampled").result().path
        assert saved == f"tinker://{training.model_id}/sampler_weights/sampled"
        sampler = service.create_sampling_client(model_path=saved).result()
        assert sampler.get_base_model() == ALIAS
        for item, output in zip(data, result.loss_fn_outputs, strict=True):
            tokens = [*item.model_input.to_ints(), int(item.loss_fn_inputs["target_tokens"].to_numpy()[-1])]
            scored = sampler.compute_logprobs(types.ModelInput.from_ints(tokens)).result()
            assert scored[0] is None
            # KL at rounding level: the mean difference of log-probs of the same tokens.
            assert np.abs(np.array(scored[1:]) - output["logprobs"].to_numpy()).max() < 1e-4


def test_reinforcement_loop_raises_its_reward(tinker_cluster: Cluster) -> None:
    """save_weights_and_get_sampling_client at every step, groups of samples, importance sampling."""
    with sdk(tinker_cluster) as service:
        training = service.create_lora_training_client(ALIAS, rank=8, seed=1).result()
        tokenizer = training.get_tokenizer()
        prompt = tokenizer.encode("The capital of Italy is")
        rewards = []
        for _ in range(5):
            sampler = training.save_weights_and_get_sampling_client().result()
            params = types.SamplingParams(max_tokens=8, temperature=1.0, seed=7)
            sampled = sampler.sample(types.ModelInput.from_ints(prompt), 12, params).result()
            assert len({tuple(sequence.tokens) for sequence in sampled.sequences}) > 1
            # Easily found and easily checked: tokens with an odd id, which the end has not.
            scores = [float(np.mean([token % 2 == 1 for token in s.tokens])) for s in sampled.sequences]
            rewards.append(float(np.mean(scores)))
            data = []
            for sequence, score in zip(sampled.sequences, scores, strict=True):
                tokens = [*prompt, *sequence.tokens]
                padding = [0.0] * (len(prompt) - 1)
                advantage = score - rewards[-1]
                data.append(
                    types.Datum(
                        model_input=types.ModelInput.from_ints(tokens[:-1]),
                        loss_fn_inputs={
                            "target_tokens": tokens[1:],
                            "logprobs": [*padding, *sequence.logprobs],
                            "advantages": [*padding, *([advantage] * len(sequence.tokens))],
                        },
                    )
                )
            training.forward_backward(data, "importance_sampling")
            training.optim_step(adam(1e-2)).result()
        assert max(rewards[1:]) > rewards[0] + 0.1


def test_custom_loss_and_the_first_loss_of_dpo(tinker_cluster: Cluster) -> None:
    """A loss of the caller's own gives the gradient of the same loss here; DPO begins at ln 2, its reference equal."""
    with sdk(tinker_cluster) as service:
        own, built_in = (service.create_lora_training_client(ALIAS, rank=4, seed=5).result() for _ in range(2))
        data = batch(own)

        def cross_entropy(items: list[types.Datum], found: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
            return -sum(values.sum() for values in found), {"num": float(len(items))}

        mine = own.forward_backward_custom(data, cross_entropy).result()
        theirs = built_in.forward_backward(data, "cross_entropy").result()
        assert mine.metrics["loss:sum"] == pytest.approx(theirs.metrics["loss:sum"], rel=1e-6)
        steps = [client.optim_step(adam()).result().metrics["grad_norm:mean"] for client in (own, built_in)]
        assert steps[0] == pytest.approx(steps[1], rel=1e-5)
        after = [logprobs(client.forward(data, "cross_entropy").result()) for client in (own, built_in)]
        assert np.allclose(after[0], after[1], atol=1e-5)

        policy = service.create_lora_training_client(ALIAS, rank=4, seed=9).result()
        reference = service.create_sampling_client(base_model=ALIAS).result()
        pairs = [data[0], data[1]]
        anchors = []
        for item in pairs:
            tokens = [*item.model_input.to_ints(), int(item.loss_fn_inputs["target_tokens"].to_numpy()[-1])]
            anchors.append(sum(reference.compute_logprobs(types.ModelInput.from_ints(tokens)).result()[1:]))

        def dpo(_: list[types.Datum], found: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
            chosen, rejected = (values.sum() - anchor for values, anchor in zip(found, anchors, strict=True))
            return -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)), {}

        first = policy.forward_backward_custom(pairs, dpo).result()
        assert first.metrics["loss:sum"] == pytest.approx(math.log(2), abs=1e-5)


def test_tenants_train_side_by_side_and_see_nothing_of_each_other(tinker_cluster: Cluster) -> None:
    """Their numbers are those of each alone, to the bit."""

    def run(seed: int) -> tuple[str, list[float]]:
        with sdk(tinker_cluster) as service:
            training = service.create_lora_training_client(ALIAS, rank=4, seed=seed).result()
            data = batch(training)
            results = []
            for _ in range(3):
                results.append(training.forward_backward(data, "cross_entropy"))
                training.optim_step(adam())
            return training.model_id, [float(r.result().metrics["loss:sum"]) for r in results]

    _, alone = run(1)
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(run, (1, 2, 1)))
    assert together[0][1] == together[2][1] == alone
    assert together[1][1] != alone
    with pytest.raises(tinker.NotFoundError):
        rest(tinker_cluster).get_training_run(together[0][0]).result()


def test_chunks_that_come_out_of_order_are_put_in_order(tinker_cluster: Cluster) -> None:
    """A client that posts its chunks at once, the first one last, gets what one that posts them in turn gets."""

    def losses(parallel: bool) -> np.ndarray:
        with sdk(tinker_cluster) as service:
            training = service.create_lora_training_client(ALIAS, rank=4, seed=2).result()
            wanted = {"parallel_fwdbwd_chunks": parallel, "fwdbwd_max_chunk_len": 1}
            training.holder._client_config = training.holder._client_config.model_copy(update=wanted)
            data = batch(training)
            first = training.forward_backward(data, "cross_entropy")
            training.optim_step(adam())
            second = training.forward_backward(data, "cross_entropy")
            assert len(first.result().loss_fn_outputs) == len(data)
            return np.concatenate([logprobs(first.result()), logprobs(second.result())])

    assert np.array_equal(losses(parallel=True), losses(parallel=False))
