"""Many adapters on one base at the same time: their operations share passes, their numbers do not change.

Prints:
    4 adapters, each as if it were alone: True
"""

import treadle
from treadle.recipes.chat import completion_datum


def start(service: treadle.ServiceClient, answer: int) -> list[treadle.Handle]:
    """Queues three steps that teach one answer; waits for nothing."""
    training = service.create_lora_training_client("treadle/pip", rank=4, seed=answer)
    losses = []
    for _ in range(3):
        losses.append(training.forward_backward([completion_datum([1, 5, 9], [answer, 2])], "cross_entropy"))
        training.optim_step(treadle.AdamParams(learning_rate=1e-2))
    return losses


def values(handles: list[treadle.Handle]) -> list[float]:
    return [handle.result().metrics["loss:sum"] for handle in handles]


with treadle.ServiceClient() as service:
    answers = range(40, 44)
    together = [values(handles) for handles in [start(service, answer) for answer in answers]]
    alone = [values(start(service, answer)) for answer in answers]
    print(f"{len(together)} adapters, each as if it were alone:", together == alone)
