"""The books of one operation stream: which operations are waiting, sent, answered and acknowledged.

Pure: no clock, no I/O, no threads. The rules of the stream protocol live here, so that what is sent again after a
broken connection, and what is not, can be tested by itself.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from treadle.errors import SeqReusedError, SequenceError, ServerError, UnavailableError
from treadle.v1 import training_pb2


@dataclass(frozen=True, slots=True)
class PreparedOperation:
    """An operation that waits for its seq: its kind's field number and serialized message, and its digest."""

    kind_field: int
    body: bytes
    digest: int

    @property
    def num_bytes(self) -> int:
        """Size on the wire, nearly."""
        return len(self.body) + 32


@dataclass(frozen=True, slots=True)
class KeptOperation:
    """An operation in the run's order, kept until its result is there."""

    seq: int
    group_seq: int
    operation: PreparedOperation


class OperationLedger:
    """State of one stream across connections; `first_seq` is the run's next seq when the client attached."""

    def __init__(self, first_seq: int) -> None:
        self._next_new = first_seq
        self._kept: dict[int, KeptOperation] = {}  # Ascending: seqs are given and removed in order.
        self._received = first_seq - 1
        self._acked = first_seq - 1
        self._most_sent = first_seq - 1
        self._next_send = first_seq
        self._unfinished_bytes = 0
        self._max_seq = 0
        self._max_bytes = 0
        self._epoch = 0

    @property
    def received_seq(self) -> int:
        """The last seq whose result has been received; what Hello and Ack report."""
        return self._received

    @property
    def num_unacked(self) -> int:
        """Results received since the last acknowledgement."""
        return self._received - self._acked

    @property
    def num_kept(self) -> int:
        """Operations whose result is missing."""
        return len(self._kept)

    @property
    def num_in_flight(self) -> int:
        """Operations sent on this connection, or before it, whose result is missing."""
        return sum(1 for seq in self._kept if seq < self._next_send)

    def add(self, operations: list[PreparedOperation]) -> list[int]:
        """Gives the next seqs to operations that belong together and returns these."""
        first = self._next_new
        group_seq = first if len(operations) > 1 else 0
        for operation in operations:
            self._kept[self._next_new] = KeptOperation(self._next_new, group_seq, operation)
            self._next_new += 1
        return list(range(first, self._next_new))

    def connect(self, welcome: training_pb2.Welcome) -> None:
        """Takes over what the server has accepted; raises when its order and ours have nothing in common.

        Raises:
            UnavailableError: the trainer had the run before the one that was there last; ask again for the right one.
            SeqReusedError: somebody else sends operations too.
            ServerError: operations whose results came are missing.
        """
        if welcome.epoch < self._epoch:
            raise UnavailableError(
                f"a trainer of epoch {welcome.epoch} answered, the run is at {self._epoch}", "STALE_LEASE", 0.2
            )
        self._epoch = welcome.epoch
        if welcome.next_seq > self._most_sent + 1 and welcome.next_seq > self._received + 1:
            raise SeqReusedError(
                f"somebody else sends operations to this run: the service has accepted up to {welcome.next_seq - 1}, "
                f"this client has sent up to {self._most_sent}; attach to the run anew"
            )
        first_kept = next(iter(self._kept), self._next_new)
        if welcome.next_seq < first_kept:
            raise ServerError(
                f"the service has lost operations: it wants seq {welcome.next_seq}, and all before {first_kept} "
                "had been answered"
            )
        self._next_send = welcome.next_seq
        self._unfinished_bytes = sum(kept.operation.num_bytes for kept in self._accepted())
        self.set_credit(welcome.credit)

    def set_credit(self, credit: training_pb2.Credit) -> None:
        """Notes what may be in flight; absolute, so a repeated one does no harm."""
        self._max_seq, self._max_bytes = credit.max_seq, credit.max_unfinished_bytes

    def take_sendable(self) -> KeptOperation | None:
        """Returns the next operation that the credit lets through, and counts it as sent."""
        kept = self._kept.get(self._next_send)
        if kept is None or kept.seq > self._max_seq:
            return None
        size = kept.operation.num_bytes
        # One operation is always possible: a long one must not wait for a credit that never comes.
        if self._max_bytes and self._unfinished_bytes and self._unfinished_bytes + size > self._max_bytes:
            return None
        self._next_send += 1
        self._most_sent = max(self._most_sent, kept.seq)
        self._unfinished_bytes += size
        return kept

    def receive(self, seq: int) -> KeptOperation | None:
        """Removes the operation whose result came; None for a repeated or foreign result. Raises on a missing one."""
        if seq <= self._received:
            return None
        oldest = next(iter(self._kept), seq)
        if oldest < seq:
            raise SequenceError(f"the result of seq {seq} came before that of seq {oldest}")
        self._received = seq
        kept = self._kept.pop(seq, None)
        if kept is not None:
            self._unfinished_bytes -= kept.operation.num_bytes
        return kept

    def acknowledge(self) -> int:
        """Returns the seq to acknowledge, and counts it as done."""
        self._acked = self._received
        return self._acked

    def _accepted(self) -> Iterator[KeptOperation]:
        return (kept for seq, kept in self._kept.items() if seq < self._next_send)
