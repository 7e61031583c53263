"""`treadle bench`: how fast a deployment is from here: round trip, training and sampling, with one tenant alone.

Knows the SDK. What the project's own documents quote comes from the repository's `bench`, not from this.
"""

from typing import TYPE_CHECKING

import click

from treadle.cli.connect import Place, place_options

if TYPE_CHECKING:
    from treadle.client import ServiceClient


@click.command()
@click.option("--base", default="", help="Base to measure.  [default: the only one that is served]")
@click.option("--steps", type=click.IntRange(1), default=10, show_default=True, help="Training steps to take.")
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True, help="Sequences of a step.")
@click.option("--length", type=click.IntRange(2), default=128, show_default=True, help="Tokens of a sequence.")
@click.option("--rank", type=click.IntRange(1), default=16, show_default=True)
@click.option("--num-samples", type=click.IntRange(1), default=16, show_default=True, help="Samples drawn at once.")
@place_options
def bench(place: Place, **sizes: int | str) -> None:
    """Train a throw-away adapter for some steps, sample from it, and say how long that took."""
    from treadle.cli.connect import open_service
    from treadle.cli.output import print_row

    with open_service(place) as service:
        print_row(place, _measure(service, **sizes))  # type: ignore[arg-type]  # As click converted them.


def _measure(
    service: "ServiceClient", *, base: str, steps: int, batch_size: int, length: int, rank: int, num_samples: int
) -> dict[str, object]:
    import time

    import numpy as np

    from treadle.recipes.job import choose_base
    from treadle.types import AdamParams, Datum, ModelInput, SamplingParams

    model = choose_base(service, base)
    generator = np.random.default_rng(0)
    length = min(length, model.max_context_length // 2)

    def timed(call: object) -> float:
        began = time.perf_counter()
        call()  # type: ignore[operator]
        return time.perf_counter() - began

    round_trips = sorted(timed(service.get_server_capabilities) for _ in range(10))
    training = service.create_lora_training_client(model.model_name, rank=rank, seed=0, train_unembed=False)
    rows = generator.integers(0, model.vocab_size, (batch_size, length + 1))
    data = [Datum(ModelInput.from_ints(r[:-1]), {"target_tokens": r[1:], "weights": np.ones(length)}) for r in rows]

    def train(count: int) -> None:
        handles = []
        for _ in range(count):
            training.forward_backward(data, "cross_entropy")
            handles.append(training.optim_step(AdamParams(learning_rate=1e-4)))
        for handle in handles:
            handle.result()

    train(1)
    alone, queued = timed(lambda: train(1)), timed(lambda: train(steps))
    sampler = training.save_weights_and_get_sampling_client().result()
    prompt = ModelInput.from_ints(rows[0][: length // 2])
    stream = sampler.sample_stream(prompt, 1, SamplingParams(max_tokens=2, temperature=1.0, seed=0))
    first_token = timed(lambda: next(stream))
    stream.close()
    params = SamplingParams(max_tokens=length // 2, temperature=1.0, seed=0, stop=[])
    drawing = timed(lambda: sampler.sample(prompt, num_samples, params).result())
    service.delete_run(training.run)
    return {
        "base": model.model_name,
        "round_trip_ms": round(1e3 * round_trips[len(round_trips) // 2], 2),
        "step_ms_waited_for": round(1e3 * alone, 1),
        "step_ms_queued": round(1e3 * queued / steps, 1),
        "trained_tokens_per_s": round(steps * batch_size * length / queued),
        "first_token_ms": round(1e3 * first_token, 1),
        "sampled_tokens_per_s": round(num_samples * (length // 2) / drawing),
    }
