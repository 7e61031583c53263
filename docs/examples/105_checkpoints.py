"""Checkpoints: go on exactly where a run was, in the same run or in another.

Prints:
    the copy does the same to the last bit: True
"""

import treadle
from treadle.recipes.chat import completion_datum

DATA = [completion_datum([1, 5, 9, 7], [40, 41, 2])]


def train(training: treadle.TrainingClient, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        losses.append(training.forward_backward(DATA, "cross_entropy"))
        training.optim_step(treadle.AdamParams(learning_rate=3e-3))
    return [loss.result().metrics["loss:sum"] for loss in losses]


with treadle.ServiceClient() as service:
    first = service.create_lora_training_client("treadle/pip", rank=8, seed=0)
    train(first, 3)
    saved = first.save_state("three").result().path  # weights and the optimizer's moments
    second = service.create_training_client_from_state_with_optimizer(saved)
    print("the copy does the same to the last bit:", train(first, 3) == train(second, 3))
