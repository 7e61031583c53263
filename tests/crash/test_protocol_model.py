"""The SDK's books, the trainer's order and the store's journal together, against a model, over a network that lies.

Requests are lost, doubled and reordered, answers of the store are lost, trainers die and come back as zombies. The
model: every operation takes effect once, in order, so that the n-th result is the hash of the first n operations.
"""

from collections import deque
from dataclasses import dataclass, field
from hashlib import blake2b

import xxhash
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from sqlalchemy import Connection, create_engine, event

from treadle.errors import TreadleError
from treadle.internal.v1 import journal_pb2
from treadle.ledger import OperationLedger, PreparedOperation
from treadle.names import RunName, parse_run
from treadle.v1 import training_pb2
from treadle_store import catalog, journal
from treadle_store.database import Batched
from treadle_store.journal_entries import RunEntry, write_entries
from treadle_store.tables import metadata
from treadle_trainer.results import ResultLog, StoredResult
from treadle_trainer.runs import OPTIM_STEP, WINDOW_BYTES, WINDOW_OPS, Offer, RunOrder, Verdict

LEASE_US = 10


def chained(state: bytes, digest: int) -> bytes:
    """Returns the state behind an operation: any other order or number of operations gives another one."""
    return blake2b(state + digest.to_bytes(8, "little"), digest_size=8).digest()


def expect(error: TreadleError, reason: str) -> None:
    """Raises an error that has another reason."""
    if error.reason != reason:
        raise error


@dataclass
class Store:
    """A journal in memory, its clock, and the snapshots' contents by seq."""

    connection: Connection
    run: RunName
    now_us: int = 0
    states: dict[int, bytes] = field(default_factory=lambda: {0: b""})


class Trainer:
    """One life of a trainer: what it holds is gone with it."""

    def __init__(self, store: Store, holder: str) -> None:
        store.now_us += LEASE_US
        self.store = store
        claim = journal.Claim(store.run, holder, "h:1", LEASE_US)
        self.epoch = journal.claim_run(store.connection, claim, store.now_us).lease.epoch
        header = journal.recovery_header(store.connection, store.run, self.epoch)
        rows = journal.recovery_page(store.connection, store.run, self.epoch, 0, 1000)
        done = max((row.seq for row in rows if row.result), default=max(header.snapshot.seq, header.acked_seq))
        self.state = store.states[header.snapshot.seq]
        self.order: RunOrder[bytes] = RunOrder(header.snapshot.seq)
        self.results = ResultLog(header.acked_seq, done, header.last_seq)
        self.appends: deque[journal_pb2.JournalAppend] = deque()
        self.commits: deque[journal_pb2.JournalCommit] = deque()
        self.stale = False
        for row in rows:
            if row.result and row.seq > header.acked_seq:
                self.results.put(row.seq, StoredResult(row.result, False, stored=True))
            if row.seq <= header.snapshot.seq:
                self.order.remember(row.seq, row.digest)
            else:
                self.order.restore(Offer(row.seq, row.digest, OPTIM_STEP, 40, row.result), 0.0)

    def offer(self, seq: int, digest: int, *, hold: bool = False) -> Verdict:
        first = self.order.next_seq
        offer = Offer(seq, digest, OPTIM_STEP, 40, b"")
        verdict = self.order.offer(offer, 0.0, done_seq=self.results.shown_seq, hold=hold)
        if verdict is Verdict.NEW:
            for op in [op for op in self.order if op.seq >= first]:
                self.appends.append(journal_pb2.JournalAppend(seq=op.seq, digest=op.digest, payload=b"p"))
        return verdict

    def execute(self) -> None:
        op = self.order.head()
        if op is None:
            return
        self.state = chained(self.state, op.digest)
        self.order.finish(op.seq, failed=False)
        if op.work:
            assert op.work == self.state, "the replay differs from what was answered"
            return
        self.commits.append(journal_pb2.JournalCommit(seq=op.seq, result=self.state))
        self.results.put(op.seq, StoredResult(self.state, False))

    def write(self, *, answered: bool) -> None:
        """Sends what waits to the store; without an answer it will be sent again."""
        last = self.appends[-1].seq if self.appends else self.results.appended_seq
        commits = [commit for commit in self.commits if commit.seq <= last]
        entry = journal_pb2.JournalEntry(
            run=str(self.store.run), epoch=self.epoch, appends=self.appends, commits=commits
        )
        entry.acked_seq = self.results.acked_seq
        savepoint = self.store.connection.begin_nested()
        try:
            Batched(write_entries, RunEntry(self.store.run, entry, self.store.now_us))(self.store.connection)
        except TreadleError as error:
            savepoint.rollback()
            expect(error, "STALE_LEASE")
            self.stale = True
            return
        savepoint.commit()
        if answered:
            self.appends.clear()
            self.results.mark_appended(last)
            for commit in commits:
                self.commits.popleft()
                self.results.mark_committed(commit.seq)

    def snapshot(self) -> None:
        seq = self.order.done_seq
        if self.stale or self.results.committed_seq < seq:
            return
        saved = journal_pb2.Snapshot(seq=seq, sha256="0" * 64, size=1)
        try:
            journal.write_snapshot(self.store.connection, self.store.run, self.epoch, saved)
        except TreadleError as error:
            expect(error, "STALE_LEASE")
            self.stale = True
        else:
            self.store.states[seq] = self.state

    def welcome(self) -> training_pb2.Welcome:
        credit = training_pb2.Credit(max_seq=self.results.shown_seq + WINDOW_OPS, max_unfinished_bytes=WINDOW_BYTES)
        return training_pb2.Welcome(
            next_seq=self.order.next_seq, last_done_seq=self.results.shown_seq, credit=credit, epoch=self.epoch
        )


class ProtocolMachine(RuleBasedStateMachine):
    """One client, one run, one store, and trainers that come and go."""

    def __init__(self) -> None:
        super().__init__()
        engine = create_engine("sqlite://")
        event.listen(engine, "connect", lambda connection, _: connection.execute("PRAGMA foreign_keys=ON"))
        connection = engine.connect()
        metadata.create_all(connection)
        run, _ = catalog.register_run(connection, "acme", training_pb2.CreateRunRequest(base="b"), 0)
        self.store = Store(connection, parse_run(run.name))
        self.trainers = [Trainer(self.store, "w0")]
        self.ledger = OperationLedger(1)
        self.digests: list[int] = []
        self.received: list[bytes] = []
        self.attached: Trainer | None = None
        self.on_the_way: deque[tuple[int, int]] = deque()
        self.cursor = 0

    @rule(count=st.integers(1, 3))
    def submit(self, count: int) -> None:
        """The user's loop calls."""
        digests = [xxhash.xxh3_64_intdigest(b"%d" % (len(self.digests) + i)) for i in range(count)]
        self.ledger.add([PreparedOperation(1, b"body", digest) for digest in digests])
        self.digests += digests

    @rule(newest=st.sampled_from([True, True, False]), data=st.data())
    def connect(self, newest: bool, data: st.DataObject) -> None:
        """The client attaches to whatever trainer it is sent to; what was on the way is lost."""
        trainer = self.trainers[-1] if newest else data.draw(st.sampled_from(self.trainers))
        self.on_the_way.clear()
        self.attached = None
        try:
            self.ledger.connect(trainer.welcome())
        except TreadleError as error:
            expect(error, "STALE_LEASE")
            assert trainer is not self.trainers[-1]
            return
        trainer.results.ack(self.ledger.received_seq)
        self.attached, self.cursor = trainer, max(self.ledger.received_seq, trainer.results.acked_seq)

    @precondition(lambda self: self.attached is not None)
    @rule(deliver=st.integers(0, 3))
    def send(self, deliver: int) -> None:
        """Frames go out as the credit allows, and some arrive."""
        while (kept := self.ledger.take_sendable()) is not None:
            self.on_the_way.append((kept.seq, kept.operation.digest))
        for _ in range(min(deliver, len(self.on_the_way))):
            self.attached.offer(*self.on_the_way.popleft())

    @precondition(lambda self: self.digests)
    @rule(data=st.data())
    def repeat(self, data: st.DataObject) -> None:
        """An old request, of this client or of a retry beside it, arrives again somewhere, at any time."""
        seq = data.draw(st.integers(1, max(1, self.ledger.received_seq + 2)))
        trainer = data.draw(st.sampled_from(self.trainers))
        if seq > len(self.digests) or seq > self.ledger.received_seq + self.ledger.num_in_flight:
            return
        try:
            trainer.offer(seq, self.digests[seq - 1], hold=True)
        except TreadleError as error:
            expect(error, "CREDIT_EXCEEDED")

    @precondition(lambda self: self.trainers[-1].order.next_seq > 1)
    @rule(data=st.data())
    def reuse(self, data: st.DataObject) -> None:
        """Other content under an accepted seq never enters the order."""
        trainer = self.trainers[-1]
        seq = data.draw(st.integers(1, trainer.order.next_seq - 1))
        before = len(trainer.order)
        try:
            verdict = trainer.offer(seq, 12345)
        except TreadleError as error:
            expect(error, "SEQ_REUSED")
        else:
            # Of an operation that was delivered and dropped not even the digest is left.
            assert verdict is Verdict.DUPLICATE
            assert seq <= max(trainer.results.acked_seq, 0)
        assert len(trainer.order) == before

    @rule(data=st.data(), count=st.integers(1, 4))
    def execute(self, data: st.DataObject, count: int) -> None:
        """A trainer, perhaps one that has lost the run, computes."""
        trainer = data.draw(st.sampled_from(self.trainers))
        for _ in range(count):
            trainer.execute()

    @rule(data=st.data(), answered=st.booleans(), snapshot=st.booleans())
    def write(self, data: st.DataObject, answered: bool, snapshot: bool) -> None:
        """A trainer writes; the store's answer may be lost on its way back."""
        trainer = data.draw(st.sampled_from(self.trainers))
        trainer.write(answered=answered)
        if snapshot:
            trainer.snapshot()

    @precondition(lambda self: self.attached is not None)
    @rule(count=st.integers(1, 5), ack=st.booleans())
    def receive(self, count: int, ack: bool) -> None:
        """Results that may be shown arrive."""
        results = self.attached.results
        for _ in range(count):
            if self.cursor >= results.shown_seq:
                break
            self.cursor += 1
            stored = results.get(self.cursor)
            assert stored is not None
            if self.ledger.receive(self.cursor) is not None:
                self.received.append(stored.data)
        if ack:
            results.ack(self.ledger.acknowledge())

    @rule(gone=st.booleans())
    def fail_over(self, gone: bool) -> None:
        """Another trainer claims the run; the old one is dead, or only thinks that it still has it."""
        if gone:
            old = self.trainers.pop()
            if self.attached is old:
                self.attached = None
        self.trainers = [*self.trainers[-2:], Trainer(self.store, f"w{len(self.received)}")]

    @invariant()
    def results_are_those_of_one_undisturbed_order(self) -> None:
        """The n-th result is that of the first n operations, each once."""
        state = b""
        for digest, result in zip(self.digests, self.received, strict=False):
            state = chained(state, digest)
            assert result == state

    def teardown(self) -> None:
        """When the trouble is over everything is answered."""
        self.trainers = [Trainer(self.store, "last")]
        for _ in range(10 * len(self.digests) + 10):
            if len(self.received) == len(self.digests):
                break
            self.attach_newest()
            self.settle()
        assert len(self.received) == len(self.digests)
        self.results_are_those_of_one_undisturbed_order()
        row = catalog.fetch_run(self.store.connection, self.store.run)
        assert (row.last_seq, row.last_done_seq) == (len(self.digests), len(self.digests))
        self.store.connection.close()

    def attach_newest(self) -> None:
        trainer = self.trainers[-1]
        self.on_the_way.clear()
        self.ledger.connect(trainer.welcome())
        self.attached, self.cursor = trainer, max(self.ledger.received_seq, trainer.results.acked_seq)

    def settle(self) -> None:
        trainer = self.trainers[-1]
        while (kept := self.ledger.take_sendable()) is not None:
            trainer.offer(kept.seq, kept.operation.digest)
        while len(trainer.order):
            trainer.execute()
        trainer.write(answered=True)
        self.drain(trainer)

    def drain(self, trainer: Trainer) -> None:
        while self.cursor < trainer.results.shown_seq:
            self.cursor += 1
            stored = trainer.results.get(self.cursor)
            assert stored is not None
            if self.ledger.receive(self.cursor) is not None:
                self.received.append(stored.data)


TestProtocol = ProtocolMachine.TestCase
TestProtocol.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
