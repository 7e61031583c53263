"""The journal's rules, through gRPC against a real SQLite file."""

import asyncio

from google.protobuf.duration_pb2 import Duration

from tests.store.conftest import entry, reason_of, serve
from treadle.internal.v1 import journal_pb2
from treadle.v1 import adapters_pb2, training_pb2


async def snapshot(store, run: str, epoch: int, seq: int, content: bytes = b"weights") -> str:
    address = await store.put_blob(content)
    saved = journal_pb2.Snapshot(seq=seq, step=seq, sha256=address, size=len(content), state_digest=b"state")
    return await reason_of(
        store.journal.WriteSnapshot(journal_pb2.WriteSnapshotRequest(run=run, epoch=epoch, snapshot=saved))
    )


def read(store, run: str, seq: int):
    return store.journal.ReadResult(journal_pb2.ReadResultRequest(run=run, seq=seq))


async def test_appends_and_results_come_back_in_order(store):
    """Whatever was acknowledged is what a recovery streams."""
    run = await store.new_run()
    epoch = await store.claim(run)
    assert await store.write(entry(run, epoch, [1, (2, 2**64 - 1), 3], [1, 2])) == [""]
    header, operations = await store.recover(run, epoch)
    assert (header.last_seq, header.acked_seq, header.HasField("snapshot")) == (3, 0, False)
    assert [(o.seq, o.digest, o.payload, o.result) for o in operations] == [
        (1, 1, b"op 1", b"result 1"),
        (2, 2**64 - 1, b"op 2", b"result 2"),
        (3, 3, b"op 3", b""),
    ]
    looked_up = await store.journal.LookupRun(journal_pb2.LookupRunRequest(run=run))
    assert (looked_up.run.next_seq, looked_up.run.last_done_seq, looked_up.run.worker) == (4, 2, "trainer-0")


async def test_the_same_operation_may_be_appended_again(store):
    """A repeated append is no error and changes nothing; other content under the same seq is refused."""
    run = await store.new_run()
    epoch = await store.claim(run)
    await store.write(entry(run, epoch, [1, 2]))
    assert await store.write(entry(run, epoch, [1, 2, 3])) == [""]
    assert await store.write(entry(run, epoch, [(2, 99)])) == ["SEQ_REUSED"]
    _, operations = await store.recover(run, epoch)
    assert [o.digest for o in operations] == [1, 2, 3]


async def test_a_gap_is_refused_with_all_of_its_entry(store):
    """An entry is written whole or not at all."""
    run = await store.new_run()
    epoch = await store.claim(run)
    assert await store.write(entry(run, epoch, [1, 3])) == ["SEQ_GAP"]
    assert await store.write(entry(run, epoch, [1], [2])) == ["SEQ_GAP"]
    header, operations = await store.recover(run, epoch)
    assert (header.last_seq, operations) == (0, [])


async def test_each_entry_of_a_write_fails_alone(store):
    """One run's mistake does not touch the other runs of the same transaction."""
    good, bad = await store.new_run(), await store.new_run("other")
    good_epoch, bad_epoch = await store.claim(good), await store.claim(bad)
    reasons = await store.write(
        entry(good, good_epoch, [1]),
        entry(bad, bad_epoch, [7]),
        entry("tenants/acme/runs/r-none", 1, [1]),
        entry("nonsense", 1, [1]),
        entry(good, good_epoch + 1, [2]),
        entry(good, good_epoch, [2]),
    )
    assert reasons == ["", "SEQ_GAP", "RUN_NOT_FOUND", "BAD_NAME", "STALE_LEASE", ""]
    assert [o.seq for o in (await store.recover(good, good_epoch))[1]] == [1, 2]


async def test_a_stale_worker_cannot_write(store, clock):
    """After another worker's claim every write of the first one is refused."""
    run = await store.new_run()
    first = await store.claim(run, "trainer-0")
    await store.write(entry(run, first, [1], [1]))
    assert await reason_of(store.journal.ClaimRun(journal_pb2.ClaimRunRequest(run=run, holder="b"))) == "LEASE_HELD"
    clock.advance(11)
    second = await store.claim(run, "trainer-1")
    assert second == first + 1
    assert await store.write(entry(run, first, [2])) == ["STALE_LEASE"]
    assert await store.write(entry(run, first, [], [1])) == ["STALE_LEASE"]
    assert await snapshot(store, run, first, 1) == "STALE_LEASE"
    stale = journal_pb2.RecoverRunRequest(run=run, epoch=first)
    assert await reason_of(store.journal.RecoverRun(stale)) == "STALE_LEASE"
    assert await store.write(entry(run, second, [2])) == [""]


async def test_a_lease_is_kept_by_renewal_and_given_back(store, clock):
    """Renewal extends all leases of a holder; a released run is free at once and its old epoch writes no more."""
    runs = [await store.new_run() for _ in range(2)]
    epochs = {run: await store.claim(run) for run in runs}
    clock.advance(8)
    request = journal_pb2.RenewLeasesRequest(holder="trainer-0", ttl=Duration(seconds=10))
    assert dict((await store.journal.RenewLeases(request)).held) == epochs
    clock.advance(8)
    claim = journal_pb2.ClaimRunRequest(run=runs[0], holder="trainer-1")
    assert await reason_of(store.journal.ClaimRun(claim)) == "LEASE_HELD"
    await store.journal.ReleaseRun(journal_pb2.ReleaseRunRequest(run=runs[0], epoch=99))
    assert await reason_of(store.journal.ClaimRun(claim)) == "LEASE_HELD"
    await store.journal.ReleaseRun(journal_pb2.ReleaseRunRequest(run=runs[0], epoch=epochs[runs[0]]))
    assert await store.write(entry(runs[0], epochs[runs[0]], [1])) == ["STALE_LEASE"]
    assert await store.claim(runs[0], "trainer-1") == epochs[runs[0]] + 1


async def test_a_clock_that_jumps_lets_one_worker_write_at_a_time(store, clock):
    """Forward it ends leases early, back it holds them longer; the epoch decides who writes, not the time."""
    run = await store.new_run()
    first = await store.claim(run, "trainer-0")
    clock.advance(3600)
    assert await store.write(entry(run, first, [1], [1])) == [""]
    second = await store.claim(run, "trainer-1")
    assert second == first + 1
    assert await store.write(entry(run, first, [2])) == ["STALE_LEASE"]
    clock.advance(-2 * 3600)
    assert await store.write(entry(run, second, [2], [2])) == [""]
    claim = journal_pb2.ClaimRunRequest(run=run, holder="trainer-0")
    assert await reason_of(store.journal.ClaimRun(claim)) == "LEASE_HELD"
    # A sign of life counts from the clock as it is: the lease is as long as any again.
    await store.journal.RenewLeases(journal_pb2.RenewLeasesRequest(holder="trainer-1", ttl=Duration(seconds=10)))
    clock.advance(11)
    assert await store.claim(run, "trainer-0") == second + 1


async def test_a_restarted_worker_claims_its_runs_at_once(store):
    """The same holder gets a new epoch without waiting."""
    run = await store.new_run()
    assert [await store.claim(run), await store.claim(run)] == [1, 2]


async def test_one_of_many_claimants_wins(store):
    """Twenty workers that claim one run at once leave exactly one holder."""
    run = await store.new_run()
    claims = [store.journal.ClaimRun(journal_pb2.ClaimRunRequest(run=run, holder=f"w{i}")) for i in range(20)]
    reasons = await asyncio.gather(*(reason_of(claim) for claim in claims))
    assert sorted(reasons) == [""] + ["LEASE_HELD"] * 19


async def test_a_result_is_written_once(store):
    """A second result for an operation leaves the first."""
    run = await store.new_run()
    epoch = await store.claim(run)
    await store.write(entry(run, epoch, [1], [1]))
    other = journal_pb2.JournalEntry(
        run=run, epoch=epoch, commits=[journal_pb2.JournalCommit(seq=1, result=b"another")]
    )
    assert await store.write(other) == [""]
    assert (await read(store, run, 1)).result == b"result 1"


async def test_results_may_come_before_earlier_ones(store):
    """A cancelled operation finishes early; last_done_seq waits for the gap to close."""
    run = await store.new_run()
    epoch = await store.claim(run)
    await store.write(entry(run, epoch, [1, 2, 3], [3]))
    seen = await store.journal.LookupRun(journal_pb2.LookupRunRequest(run=run))
    assert seen.run.last_done_seq == 0
    assert (await read(store, run, 1)).result == b""
    await store.write(entry(run, epoch, [], [1, 2]))
    seen = await store.journal.LookupRun(journal_pb2.LookupRunRequest(run=run))
    assert seen.run.last_done_seq == 3


async def test_a_snapshot_drops_payloads_and_an_ack_drops_results(store):
    """Payloads go with the snapshot; a result stays until it was delivered."""
    run = await store.new_run()
    epoch = await store.claim(run)
    await store.write(entry(run, epoch, [1, 2, 3, 4], [1, 2, 3]))
    assert await snapshot(store, run, epoch, 2) == ""
    header, operations = await store.recover(run, epoch)
    assert (header.snapshot.seq, header.snapshot.step, header.snapshot.state_digest) == (2, 2, b"state")
    assert [(o.seq, o.payload, o.result) for o in operations] == [
        (1, b"", b"result 1"),
        (2, b"", b"result 2"),
        (3, b"op 3", b"result 3"),
        (4, b"op 4", b""),
    ]
    assert await store.write(entry(run, epoch, acked=1)) == [""]
    header, operations = await store.recover(run, epoch)
    assert (header.acked_seq, [o.seq for o in operations]) == (1, [2, 3, 4])
    assert await reason_of(read(store, run, 1)) == "RESULT_GONE"
    assert await store.write(entry(run, epoch, [1])) == ["SEQ_REUSED"]
    # An ack beyond the results cannot drop what is still to come.
    await store.write(entry(run, epoch, acked=10**18))
    header, operations = await store.recover(run, epoch)
    assert (header.acked_seq, header.last_seq, [o.seq for o in operations]) == (3, 4, [3, 4])


async def test_a_snapshot_must_be_true(store):
    """It needs its blob, of its size, and results for all that it covers; an older one does not replace a newer."""
    run = await store.new_run()
    epoch = await store.claim(run)
    await store.write(entry(run, epoch, [1, 2], [1]))
    missing = journal_pb2.Snapshot(seq=1, sha256="0" * 64, size=1)
    request = journal_pb2.WriteSnapshotRequest(run=run, epoch=epoch, snapshot=missing)
    assert await reason_of(store.journal.WriteSnapshot(request)) == "BLOB_NOT_FOUND"
    request.snapshot.sha256 = await store.put_blob(b"four")
    assert await reason_of(store.journal.WriteSnapshot(request)) == "BLOB_NOT_FOUND"
    assert await snapshot(store, run, epoch, 2) == "SEQ_GAP"
    await store.write(entry(run, epoch, [], [2]))
    assert await snapshot(store, run, epoch, 2, b"newer") == ""
    assert await snapshot(store, run, epoch, 1, b"older") == ""
    assert (await store.recover(run, epoch))[0].snapshot.size == len(b"newer")


async def test_a_long_payload_is_a_blob(store):
    """It is referenced by its address, which must be there."""
    run = await store.new_run()
    epoch = await store.claim(run)
    request = entry(run, epoch, [1])
    request.appends[0].payload_sha256 = "1" * 64
    assert await store.write(request) == ["BLOB_NOT_FOUND"]
    request.appends[0].payload_sha256 = address = await store.put_blob(b"long" * 10)
    assert await store.write(request) == [""]
    (operation,) = (await store.recover(run, epoch))[1]
    assert (operation.payload_sha256, operation.payload) == (address, b"")


async def test_a_recovery_streams_more_than_a_page(store):
    """Fifty operations of 100 KiB arrive in order."""
    run = await store.new_run()
    epoch = await store.claim(run)
    for first in range(1, 51, 10):
        request = entry(run, epoch, range(first, first + 10))
        for append in request.appends:
            append.payload = bytes([append.seq]) * 100_000
        assert await store.write(request) == [""]
    _, operations = await store.recover(run, epoch)
    assert [(o.seq, o.payload[:1], len(o.payload)) for o in operations] == [
        (s, bytes([s]), 100_000) for s in range(1, 51)
    ]


async def test_unknown_operations_are_named_so(store):
    """A seq that was never appended is OPERATION_NOT_FOUND, however large."""
    run = await store.new_run()
    for seq in (0, 1, 2**64 - 1):
        assert await reason_of(read(store, run, seq)) == "OPERATION_NOT_FOUND"
    assert await store.write(entry(run, await store.claim(run), [2**64 - 1])) == ["SEQ_GAP"]
    assert await store.write(entry(run, 2**64 - 1, [1])) == ["STALE_LEASE"]


async def test_a_removed_run_is_gone_but_its_adapters_stay(store):
    """The journal goes with the run; what was saved does not."""
    run = await store.new_run()
    epoch = await store.claim(run)
    await store.write(entry(run, epoch, [1], [1]))
    await snapshot(store, run, epoch, 1)
    files = [adapters_pb2.AdapterFile(path="adapter_config.json", size=7, sha256=await store.put_blob(b"weights"))]
    adapter = adapters_pb2.Adapter(name=f"{run}/revisions/v1", base="treadle/pip", files=files)
    record = journal_pb2.RecordAdapterRequest(run=run, epoch=epoch, adapter=adapter, seq=1)
    await store.journal.RecordAdapter(record)
    await store.journal.RemoveRun(journal_pb2.RemoveRunRequest(run=run))
    assert await reason_of(store.journal.LookupRun(journal_pb2.LookupRunRequest(run=run))) == "RUN_NOT_FOUND"
    assert await store.write(entry(run, epoch, [2])) == ["RUN_NOT_FOUND"]
    assert await reason_of(store.journal.RemoveRun(journal_pb2.RemoveRunRequest(run=run))) == "RUN_NOT_FOUND"
    found = await store.journal.LookupAdapter(journal_pb2.LookupAdapterRequest(name=adapter.name))
    assert found.adapter.files[0].sha256 == files[0].sha256


async def test_all_is_there_after_a_restart(settings, clock):
    """Runs, leases, operations and results outlive the store's process state."""
    async with serve(settings, clock) as store:
        run = await store.new_run()
        epoch = await store.claim(run)
        await store.write(entry(run, epoch, [1, 2], [1]))
    async with serve(settings, clock) as store:
        assert await store.write(entry(run, epoch, [3])) == [""]
        _, operations = await store.recover(run, epoch)
        assert [(o.seq, o.result) for o in operations] == [(1, b"result 1"), (2, b""), (3, b"")]


async def test_a_run_stays_marked_as_diverged(store):
    """Only the holder of the lease marks it; what was found first is shown from then on."""
    run = await store.new_run()
    epoch = await store.claim(run)
    shown = (await store.journal.LookupRun(journal_pb2.LookupRunRequest(run=run))).run
    assert (shown.state, shown.HasField("divergence")) == (training_pb2.RUN_STATE_ACTIVE, False)

    def mark(epoch: int, seq: int):
        found = training_pb2.Divergence(seq=seq, recorded_digest=b"a", replayed_digest=b"b", message="differs")
        return store.journal.MarkDiverged(journal_pb2.MarkDivergedRequest(run=run, epoch=epoch, divergence=found))

    assert await reason_of(mark(epoch + 1, 3)) == "STALE_LEASE"
    assert [await reason_of(mark(epoch, seq)) for seq in (4, 5)] == ["", ""]
    shown = (await store.journal.LookupRun(journal_pb2.LookupRunRequest(run=run))).run
    assert shown.state == training_pb2.RUN_STATE_DIVERGED
    found = shown.divergence
    assert (found.seq, found.recorded_digest, found.replayed_digest, found.message) == (4, b"a", b"b", "differs")
    assert found.found.seconds > 0


async def test_results_are_answered_byte_for_byte_until_delivered(settings, clock):
    """Over restarts, claims and snapshots that cover them; only delivery, and then a snapshot, lets them go."""
    noise = [bytes([seq]) * (1000 * seq) for seq in range(6)]
    async with serve(settings, clock) as store:
        run = await store.new_run()
        epoch = await store.claim(run)
        done = journal_pb2.JournalEntry(run=run, epoch=epoch, appends=entry(run, epoch, range(1, 6)).appends)
        done.commits.extend(journal_pb2.JournalCommit(seq=seq, result=noise[seq]) for seq in range(1, 6))
        assert await store.write(done) == [""]
        assert await snapshot(store, run, epoch, 4) == ""
    for acked in (0, 2):
        async with serve(settings, clock) as store:
            epoch = await store.claim(run)
            assert await store.write(entry(run, epoch, acked=acked)) == [""]
            for seq in range(acked + 1, 6):
                assert (await read(store, run, seq)).result == noise[seq]
            for seq in range(1, acked + 1):
                assert await reason_of(read(store, run, seq)) == "RESULT_GONE"
            _, operations = await store.recover(run, epoch)
            assert [(op.seq, op.result) for op in operations] == [(seq, noise[seq]) for seq in range(acked + 1, 6)]
