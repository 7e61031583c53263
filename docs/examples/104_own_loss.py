"""A loss that the service does not know: computed here, by torch, from log-probabilities.

Prints:
    the likelier answer is now further ahead: True
"""

import torch

import treadle
from treadle.recipes.chat import completion_datum


def margin(data: list[treadle.Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    """Pushes the first answer's log-probability above the second's, up to a margin of 20."""
    gap = logprobs[0].sum() - logprobs[1].sum()
    return torch.relu(20 - gap), {"gap": float(gap)}


with treadle.ServiceClient() as service:
    training = service.create_lora_training_client("treadle/pip", rank=8, seed=0)
    pair = [completion_datum([1, 5, 9, 7], [40, 2]), completion_datum([1, 5, 9, 7], [41, 2])]
    gaps = []
    for _ in range(6):
        output = training.forward_backward_custom(pair, margin)
        training.optim_step(treadle.AdamParams(learning_rate=5e-3))
        gaps.append(output.result().metrics["gap"])
    print("the likelier answer is now further ahead:", gaps[-1] > gaps[0])
