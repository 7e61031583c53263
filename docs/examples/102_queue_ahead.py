"""Queue steps ahead: calls return at once, so that the worker never waits for you.

Prints:
    queued 10 steps before the first was done: True
    loss fell: True
"""

import treadle
from treadle.recipes.chat import completion_datum

with treadle.ServiceClient() as service:
    training = service.create_lora_training_client("treadle/pip", rank=8, seed=0)
    batch = [completion_datum([1, 5, 9, 7], [40 + i, 50, 2]) for i in range(64)]
    handles = []
    for _ in range(10):
        handles.append(training.forward_backward(batch, "cross_entropy"))
        training.optim_step(treadle.AdamParams(learning_rate=3e-3))
    print("queued 10 steps before the first was done:", not handles[-1].done())
    losses = [handle.result().metrics["loss:sum"] for handle in handles]  # now it waits, for results alone
    print("loss fell:", losses[-1] < losses[0] / 2)
