"""A run belongs to the precision of its base: no trainer that holds another replays or goes on with it."""

from pathlib import Path

from tests.trainer.harness import Bench, forward_backward, optim_step, refused, serving_store, serving_trainer, steps
from treadle.errors import from_rpc_error

QUANTIZED = "treadle/pip@nf4"


async def losses(bench: Bench, run: str, first_seq: int) -> list[float]:
    """Trains two steps and returns their losses."""
    for operation in steps(2, first_seq):
        await bench.submit(run, operation)
    seqs = range(first_seq, first_seq + 4, 2)
    return [(await bench.wait(run, seq)).forward_backward.outputs.metrics["loss:sum"] for seq in seqs]


async def test_only_the_same_precision_goes_on_with_a_run(tmp_path: Path) -> None:
    """Trainers of another precision refuse the run and leave it whole; one of its own goes on bit by bit."""
    async with serving_store(tmp_path) as store:
        async with serving_trainer(store.address, quantize="nf4") as bench:
            run, twin = [await bench.new_run(base=QUANTIZED) for _ in range(2)]
            begun = await losses(bench, run, 1)
            expected = await losses(bench, twin, 1) + await losses(bench, twin, 5)
        for quantize in ("none", "int8"):
            async with serving_trainer(store.address, quantize=quantize) as bench:
                error = from_rpc_error(await refused(bench.submit(run, forward_backward(5))))
                assert error.reason == "NO_WORKER"
                assert QUANTIZED in error.message
        async with serving_trainer(store.address, quantize="nf4") as bench:
            assert begun + await losses(bench, run, 5) == expected
            await bench.submit(run, optim_step(9))
            assert not (await bench.wait(run, 9)).HasField("error")
