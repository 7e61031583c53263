"""The whole stack computes what the engine computes in-process, bit for bit."""

import numpy as np
import pytest
import torch

from tests.support.cluster import Cluster
from treadle import AdamParams, Datum, ModelInput, ServiceClient, TensorData
from treadle_engine.base_model import BaseModel
from treadle_engine.bases import pip_folder
from treadle_engine.batch import TokenBatch
from treadle_engine.lora import AdapterWeights, LoraConfig
from treadle_engine.losses import LossSpec
from treadle_engine.optim import AdamParams as EngineAdam
from treadle_engine.optim import TrainState, optim_step
from treadle_engine.passes import Chunk, TrainingEngine

RANK, STEPS, LEARNING_RATE = 8, 4, 5e-3
LENGTHS = (40, 7, 23)


def columns(step: int, loss: str) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Random tokens, targets and loss inputs of all rows, one after the other."""
    generator = np.random.default_rng(step)
    total = sum(LENGTHS)
    tokens = generator.integers(3, 1000, total).astype(np.int32)
    targets = generator.integers(3, 1000, total).astype(np.int32)
    if loss == "cross_entropy":
        return tokens, targets, {"weights": generator.random(total).astype(np.float32)}
    advantages = generator.normal(size=total).astype(np.float32)
    return tokens, targets, {"advantages": advantages, "logprobs": -generator.random(total).astype(np.float32)}


def rows(step: int, loss: str) -> list[Datum]:
    """The same as the SDK takes it."""
    tokens, targets, inputs = columns(step, loss)
    bounds = np.cumsum(LENGTHS)[:-1]
    parts = {name: np.split(value, bounds) for name, value in {**inputs, "target_tokens": targets}.items()}
    return [
        Datum(
            model_input=ModelInput.from_ints(part.tolist()),
            loss_fn_inputs={name: TensorData.from_numpy(split[row]) for name, split in parts.items()},
        )
        for row, part in enumerate(np.split(tokens, bounds))
    ]


@pytest.mark.parametrize("loss", ["cross_entropy", "ppo"])
def test_losses_logprobs_and_norms_are_the_engines_own_bits(cluster: Cluster, loss: str) -> None:
    """Client, gateway, trainer and store add and lose nothing."""
    torch.set_num_threads(1)
    base = BaseModel.load(str(pip_folder()), dtype="float32")
    engine = TrainingEngine(base)
    state = TrainState.fresh(AdapterWeights.init(base, LoraConfig(rank=RANK, seed=3)))
    with ServiceClient(cluster.gateway_address, cluster.new_tenant()) as service:
        training = service.create_lora_training_client("treadle/pip", rank=RANK, seed=3)
        handles = [
            (
                training.forward_backward(rows(step, loss), loss),
                training.optim_step(AdamParams(learning_rate=LEARNING_RATE, eps=1e-8)),
            )
            for step in range(STEPS)
        ]
        for step, (ran, stepped) in enumerate(handles):
            tokens, targets, inputs = columns(step, loss)
            batch = TokenBatch(np.array(LENGTHS, dtype=np.int64), tokens, targets, inputs)
            (expected,) = engine.run_pass([Chunk(state, piece, LossSpec(loss)) for piece in engine.split(batch)])
            metrics = optim_step(state, EngineAdam(learning_rate=LEARNING_RATE, eps=1e-8))
            output = ran.result(60)
            logprobs = np.concatenate([row["logprobs"].to_numpy() for row in output.loss_fn_outputs])
            assert np.array_equal(logprobs, expected.logprobs_TK)
            assert output.metrics["loss:sum"] == expected.loss_sum
            assert stepped.result(60).metrics["grad_norm:mean"] == metrics["grad_norm:mean"]
