"""A program for Tinker, as its users write them: it knows nothing of Treadle and is told of it by two variables.

Prints its numbers as JSON. Written for every SDK from 0.25 on, so it uses what they all have.
"""

import json
import warnings

import tinker
from tinker import types

warnings.simplefilter("ignore")


def main() -> None:
    """Trains, saves, samples and resumes."""
    service = tinker.ServiceClient()
    training = service.create_lora_training_client(base_model="Qwen/Qwen3-8B-Base", rank=4, seed=3)
    if not hasattr(training, "forward_backward"):
        training = training.result()
    tokens = training.get_tokenizer().encode("The capital of Italy is Rome.")
    datum = types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)},
    )
    losses = []
    for _ in range(4):
        result = training.forward_backward([datum, datum], "cross_entropy")
        step = training.optim_step(types.AdamParams(learning_rate=5e-3, eps=1e-8))
        losses.append(result.result().metrics["loss:sum"])
        step.result()
    path = training.save_state("done").result().path
    sampler = training.save_weights_and_get_sampling_client()
    sampler = sampler if hasattr(sampler, "sample") else sampler.result()
    params = types.SamplingParams(max_tokens=8, temperature=1.0, seed=1)
    sampled = sampler.sample(types.ModelInput.from_ints(tokens[:4]), 2, params).result()
    resumed = service.create_training_client_from_state_with_optimizer(path)
    resumed = resumed if hasattr(resumed, "forward_backward") else resumed.result()
    last = resumed.forward_backward([datum, datum], "cross_entropy").result().metrics["loss:sum"]
    print(json.dumps({"losses": [*losses, last], "samples": [list(map(int, s.tokens)) for s in sampled.sequences]}))


if __name__ == "__main__":
    main()
