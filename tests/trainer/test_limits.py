"""A trainer within its budget: what is too long, what a pass holds, and that a replay does not depend on either."""

from pathlib import Path

import pytest
from google.protobuf.duration_pb2 import Duration
from transformers import LlamaConfig, LlamaForCausalLM

from tests.trainer.harness import (
    VOCABULARY,
    forward_backward,
    optim_step,
    serving,
    serving_store,
    serving_trainer,
)
from treadle.internal.v1 import journal_pb2, trainer_pb2
from treadle.v1 import training_pb2


@pytest.fixture(scope="module")
def long_base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Settings of a trainer on a tiny base with a long context, under Pip's name."""
    folder = tmp_path_factory.mktemp("base") / "long"
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=8192,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return {"base": str(folder), "base_name": "treadle/pip"}


def long_step(first_seq: int, length: int) -> list[training_pb2.Operation]:
    """Returns a step on one sequence of a length between half of `length` and all of it."""
    return [forward_backward(first_seq, seed=first_seq, rows=1, length=length), optim_step(first_seq + 1)]


async def test_what_was_accepted_before_a_crash_is_accepted_again(tmp_path: Path, long_base: dict[str, str]) -> None:
    """A replay on a trainer with less room gives the same bits; what comes after is refused with both numbers."""
    async with serving_store(tmp_path) as store:
        async with serving_trainer(store.address, max_tokens_per_pass=4096, **long_base) as bench:
            run = await bench.new_run()
            async with bench.stream(run) as stream:
                await stream.send(*long_step(1, 4000), *long_step(3, 3000))
                before = await stream.results(4)
                assert stream.welcome.max_context == 4096
                # As after a crash: the journal has everything, and no snapshot covers it.
                claim = journal_pb2.ClaimRunRequest(run=run, holder="trainer-0", address="x", ttl=Duration(seconds=1))
                await bench.journal.ClaimRun(claim, metadata=bench.internal, timeout=5)
                # The next step was accepted, and its trainer died before it had run.
                accepted = [op.SerializeToString() for op in long_step(5, 3500)]
                appends = [
                    journal_pb2.JournalAppend(seq=5 + i, digest=5 + i, payload=p) for i, p in enumerate(accepted)
                ]
                entry = journal_pb2.JournalEntry(run=run, epoch=2, appends=appends)
                write = journal_pb2.WriteJournalRequest(entries=[entry])
                written = await bench.journal.WriteJournal(write, metadata=bench.internal, timeout=5)
                assert [error.reason for error in written.errors] == [""]
        async with serving_trainer(store.address, max_tokens_per_pass=1024, **long_base) as bench:
            async with bench.stream(run) as stream:
                assert stream.welcome.max_context == 1024
                await stream.send(*long_step(7, 4000))
                after = await stream.results(8)
            state = (
                await bench.journal.LookupRun(journal_pb2.LookupRunRequest(run=run), metadata=bench.internal, timeout=5)
            ).run.state
    assert [r.error.reason for r in before] == [""] * 4
    assert [r.error.reason for r in after] == [*[""] * 6, "SEQUENCE_TOO_LONG", "DEPENDENCY_FAILED"]
    message = after[6].error.message
    assert "1024" in message
    assert any(str(length) in message for length in range(2000, 4001))
    assert state == training_pb2.RUN_STATE_ACTIVE


async def test_a_pass_ends_near_its_target_and_small_operations_do_not_wait_for_large_ones(tmp_path: Path) -> None:
    """With a cost measured, one large operation is spread over passes that a small one shares or goes between."""
    async with serving(tmp_path, measure_cost=True, target_pass_seconds=0.001, max_tokens_per_pass=8192) as bench:
        large, small = await bench.new_run(), await bench.new_run("other")
        async with bench.stream(large) as flood, bench.stream(small, "other") as brief:
            # Four chunks of at most two rows; by tokens alone they would be one pass.
            await flood.send(forward_backward(1, rows=8, length=500))
            await brief.send(forward_backward(1, rows=1, length=12))
            await brief.results(1)
            await flood.results(1)
        passes = await bench.passes()
        request = trainer_pb2.GetTrainerStatusRequest()
        status = await bench.control.GetTrainerStatus(request, metadata=bench.internal, timeout=5)
    shares = [{share.run: share.num_tokens for share in item.shares} for item in passes]
    assert max(share.get(large, 0) for share in shares) <= 1024
    assert sum(large in share for share in shares) >= 2
    first_small = next(index for index, share in enumerate(shares) if small in share)
    assert first_small < max(index for index, share in enumerate(shares) if large in share)
    assert all(item.expected.ToNanoseconds() > 0 for item in passes)
    assert status.pass_cost.seconds_per_token > 0
    assert status.pass_cost.bytes_per_token > 0
    assert status.max_tokens_per_pass == 8192
    assert status.pace > 0


async def test_without_a_measured_cost_the_passes_are_filled_by_tokens(tmp_path: Path) -> None:
    """The same operation is one pass."""
    async with serving(tmp_path, max_tokens_per_pass=8192) as bench:
        run = await bench.new_run()
        async with bench.stream(run) as stream:
            await stream.send(forward_backward(1, rows=8, length=500))
            await stream.results(1)
        passes = await bench.passes()
    assert len(passes) == 1
    assert not passes[0].HasField("expected")
