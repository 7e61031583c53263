"""The journal against a model of it, driven by hypothesis: repeats, gaps, stale workers, acks and snapshots."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from sqlalchemy import Connection, create_engine, event

from treadle.errors import TreadleError
from treadle.internal.v1 import journal_pb2
from treadle.names import RunName, parse_run
from treadle.v1 import training_pb2
from treadle_store import catalog, journal
from treadle_store.database import Batched
from treadle_store.journal_entries import RunEntry, write_entries
from treadle_store.tables import metadata

SEQS = st.integers(0, 12)


class JournalMachine(RuleBasedStateMachine):
    """One run, two workers; the model is three dictionaries and four numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.engine = create_engine("sqlite://")
        event.listen(self.engine, "connect", lambda connection, _: connection.execute("PRAGMA foreign_keys=ON"))
        self.connection: Connection = self.engine.connect()
        metadata.create_all(self.connection)
        run, _ = catalog.register_run(self.connection, "acme", training_pb2.CreateRunRequest(base="b"), 0)
        self.run: RunName = parse_run(run.name)
        self.now_us, self.expires_us = 0, 0
        self.epoch, self.holder, self.acked, self.covered = 0, "", 0, 0
        self.digests: dict[int, int] = {}
        self.results: dict[int, bytes] = {}

    def teardown(self) -> None:
        self.connection.close()
        self.engine.dispose()

    @property
    def done(self) -> int:
        return next(seq for seq in range(len(self.digests) + 1) if seq + 1 not in self.results)

    def attempt(self, body) -> str:
        savepoint = self.connection.begin_nested()
        try:
            body()
        except TreadleError as error:
            savepoint.rollback()
            return error.reason
        savepoint.commit()
        return ""

    @rule(holder=st.sampled_from(["w0", "w1"]), wait_us=st.sampled_from([0, 5, 50]))
    def claim(self, holder: str, wait_us: int) -> None:
        """A lease is granted when it is free, expired or one's own."""
        self.now_us += wait_us
        wanted = journal.Claim(self.run, holder, "h:1", 10)
        reason = self.attempt(lambda: journal.claim_run(self.connection, wanted, self.now_us))
        granted = self.epoch == 0 or self.holder in ("", holder) or self.expires_us <= self.now_us
        assert reason == ("" if granted else "LEASE_HELD")
        if granted:
            self.epoch, self.holder, self.expires_us = self.epoch + 1, holder, self.now_us + 10

    @rule(back=st.integers(0, 1))
    def release(self, back: int) -> None:
        """Only the newest epoch can be given back."""
        journal.release_run(self.connection, self.run, self.epoch - back)
        if back == 0:
            self.holder, self.expires_us = "", 0

    @precondition(lambda self: self.epoch > 0)
    @rule(
        back=st.sampled_from([0, 0, 0, 0, 1]),
        first=st.sampled_from([1, 1, 1, 0, -1, 2]),
        new_digests=st.lists(st.sampled_from([0, 0, 0, 1]), max_size=4),
        finished=st.lists(st.integers(0, 3), max_size=3),
        acked=st.sampled_from([0, 1, 2, 3, 5, 100]),
    )
    def write(self, back: int, first: int, new_digests: list[int], finished: list[int], acked: int) -> None:
        """An entry takes effect whole, or names the first thing that is wrong."""
        # Close to where the run stands, so that most entries are nearly right.
        appends = [(max(0, len(self.digests) + first + i), digest) for i, digest in enumerate(new_digests)]
        commits = [self.done + ahead for ahead in finished]
        entry = journal_pb2.JournalEntry(
            epoch=self.epoch - back,
            appends=[journal_pb2.JournalAppend(seq=s, digest=2**64 - 1 - d, payload=b"p%d" % s) for s, d in appends],
            commits=[journal_pb2.JournalCommit(seq=s, result=b"r%d" % len(self.results)) for s in commits],
            acked_seq=acked,
        )
        expected, digests, results = self.expect(back, appends, commits)
        assert self.attempt(lambda: Batched(write_entries, RunEntry(self.run, entry, 0))(self.connection)) == expected
        if expected == "":
            self.digests, self.results = digests, results
            self.acked = max(self.acked, min(acked, self.done))

    def expect(self, back: int, appends: list[tuple[int, int]], commits: list[int]):
        """Returns the reason, and the operations and results that follow when there is none."""
        digests, results = dict(self.digests), dict(self.results)
        last, dropped = len(digests), min(self.acked, self.covered)
        if back or not self.holder:
            return "STALE_LEASE", digests, results
        if any(s <= last and (s <= dropped or digests.get(s) != d) for s, d in appends):
            return "SEQ_REUSED", digests, results
        for s, d in appends:
            if s > last:
                if s != len(digests) + 1:
                    return "SEQ_GAP", digests, results
                digests[s] = d
        if any(not 1 <= s <= len(digests) for s in commits):
            return "SEQ_GAP", digests, results
        for s in commits:
            results.setdefault(s, b"r%d" % len(self.results))
        return "", digests, results

    @precondition(lambda self: self.epoch > 0)
    @rule(seq=SEQS)
    def snapshot(self, seq: int) -> None:
        """A snapshot covers only what is done."""
        saved = journal_pb2.Snapshot(seq=seq, sha256="0" * 64, size=1)
        reason = self.attempt(lambda: journal.write_snapshot(self.connection, self.run, self.epoch, saved))
        if not self.holder:
            assert reason == "STALE_LEASE"
        else:
            assert reason == ("" if seq <= self.done else "SEQ_GAP")
            self.covered = max(self.covered, seq) if reason == "" else self.covered

    @invariant()
    def a_recovery_gives_what_the_model_has(self) -> None:
        """Nothing acknowledged is missing, nothing that may be dropped is asked for."""
        if not self.holder:
            return
        header = journal.recovery_header(self.connection, self.run, self.epoch)
        assert (header.acked_seq, header.last_seq) == (self.acked, len(self.digests))
        assert header.snapshot.seq == self.covered
        page = journal.recovery_page(self.connection, self.run, self.epoch, 0, 100)
        kept = range(min(self.acked, self.covered) + 1, len(self.digests) + 1)
        assert [o.seq for o in page] == list(kept)
        for o in page:
            assert o.digest == 2**64 - 1 - self.digests[o.seq]
            assert o.payload == (b"" if o.seq <= self.covered else b"p%d" % o.seq)
            assert o.result == self.results.get(o.seq, b"")
        row = catalog.fetch_run(self.connection, self.run)
        assert row.last_done_seq == self.done


TestJournalModel = JournalMachine.TestCase
TestJournalModel.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
