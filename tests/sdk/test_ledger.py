"""The books of an operation stream: in order, exactly once, within the credit, over any sequence of disconnects."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treadle.errors import SeqReusedError, SequenceError, ServerError
from treadle.frames import MAX_FRAME_BYTES, frames_of, prepare
from treadle.ledger import KeptOperation, OperationLedger
from treadle.v1 import training_pb2, types_pb2


def welcome(next_seq: int, max_seq: int = 100, max_bytes: int = 0) -> training_pb2.Welcome:
    """A Welcome with this much credit."""
    return training_pb2.Welcome(
        next_seq=next_seq, credit=training_pb2.Credit(max_seq=max_seq, max_unfinished_bytes=max_bytes)
    )


def barrier() -> object:
    """A small operation."""
    return prepare(training_pb2.Barrier())


def sent(ledger: OperationLedger) -> list[int]:
    """All that may be sent now."""
    seqs = []
    while (kept := ledger.take_sendable()) is not None:
        seqs.append(kept.seq)
    return seqs


def test_operations_are_sent_again_from_where_the_server_says() -> None:
    """After a disconnect the server's next_seq decides, and finished operations are not sent again."""
    ledger = OperationLedger(1)
    ledger.add([barrier()] * 3)
    ledger.connect(welcome(1))
    assert sent(ledger) == [1, 2, 3]
    assert ledger.receive(1) is not None
    ledger.connect(welcome(3))
    assert sent(ledger) == [3]
    assert ledger.received_seq == 1


def test_credit_bounds_seqs_and_bytes_but_never_stops_a_single_operation() -> None:
    """What is in flight stays within the credit; one operation always gets through."""
    ledger = OperationLedger(1)
    ledger.add([barrier()] * 5)
    ledger.connect(welcome(1, max_seq=2))
    assert sent(ledger) == [1, 2]
    ledger.set_credit(training_pb2.Credit(max_seq=100, max_unfinished_bytes=1))
    assert sent(ledger) == []
    ledger.receive(1)
    ledger.receive(2)
    assert sent(ledger) == [3]


def test_a_group_carries_its_first_seq_and_single_operations_carry_none() -> None:
    """Parts of one batch can be told from operations of their own."""
    ledger = OperationLedger(7)
    assert ledger.add([barrier()]) == [7]
    assert ledger.add([barrier()] * 2) == [8, 9]
    ledger.connect(welcome(7))
    groups = [ledger.take_sendable().group_seq for _ in range(3)]
    assert groups == [0, 8, 8]


def test_repeated_results_are_ignored_and_missing_ones_are_noticed() -> None:
    """A replayed result changes nothing; a result out of order is a fault of the connection."""
    ledger = OperationLedger(1)
    ledger.add([barrier()] * 3)
    ledger.connect(welcome(1))
    sent(ledger)
    assert ledger.receive(1) is not None
    assert ledger.receive(1) is None
    with pytest.raises(SequenceError):
        ledger.receive(3)
    assert ledger.receive(2) is not None
    assert ledger.num_unacked == 2
    assert ledger.acknowledge() == 2
    assert ledger.num_unacked == 0


def test_a_second_sender_and_lost_operations_are_told_apart() -> None:
    """The server may not have more than was sent, nor less than was answered."""
    ledger = OperationLedger(1)
    with pytest.raises(SeqReusedError, match="somebody else"):
        ledger.connect(welcome(5))
    ledger.add([barrier()])
    ledger.connect(welcome(1))
    sent(ledger)
    ledger.receive(1)
    with pytest.raises(ServerError, match="lost operations"):
        ledger.connect(welcome(1))


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_every_operation_is_accepted_once_and_answered_once(data: st.DataObject) -> None:
    """Against a model server that loses connections at any moment, order and counts hold."""
    ledger = OperationLedger(1)
    total = data.draw(st.integers(1, 12))
    accepted: list[int] = []
    answered: list[int] = []
    window = data.draw(st.integers(1, 5))
    added = 0
    ledger.connect(welcome(1, window))
    for _ in range(500):
        if len(answered) == total:
            break
        action = data.draw(st.sampled_from(["add", "send", "lose", "answer", "reconnect"]))
        if action == "add" and added < total:
            ledger.add([barrier()])
            added += 1
        elif action in ("send", "lose"):
            kept = ledger.take_sendable()
            if kept is not None and action == "send":
                assert kept.seq == len(accepted) + 1
                assert kept.seq <= len(answered) + window
                accepted.append(kept.seq)
            elif kept is not None:
                ledger.connect(welcome(len(accepted) + 1, len(answered) + window))
        elif action == "answer" and len(answered) < len(accepted):
            seq = len(answered) + 1
            assert ledger.receive(seq) is not None
            answered.append(seq)
            ledger.set_credit(training_pb2.Credit(max_seq=len(answered) + window))
        elif action == "reconnect":
            ledger.connect(welcome(len(accepted) + 1, len(answered) + window))
    assert accepted == list(range(1, len(accepted) + 1))
    assert ledger.num_kept == added - len(answered)


@given(st.integers(1, 2**60), st.integers(0, 2**60), st.integers(0, 300))
@settings(max_examples=50, deadline=None)
def test_hand_made_frames_are_what_protobuf_reads(seq: int, group_seq: int, size: int) -> None:
    """A frame parses to the operation that it was made of."""
    adam = types_pb2.AdamParams(learning_rate=0.5)
    loss = training_pb2.LossFn(name="x" * size, config={"b": 2, "a": 1})
    for kind in (training_pb2.OptimStep(adam=adam), training_pb2.Forward(loss_fn=loss), training_pb2.Barrier()):
        frames = list(frames_of(KeptOperation(seq, group_seq, prepare(kind))))
        operation = training_pb2.StreamOperationsRequest.FromString(frames[0]).operation
        assert len(frames) == 1
        assert (operation.seq, operation.group_seq) == (seq, group_seq)
        assert getattr(operation, operation.WhichOneof("kind")) == kind
        assert operation.digest == prepare(kind).digest != 0


def test_a_long_operation_travels_in_parts_that_fit() -> None:
    """Parts follow each other, fit into a frame each, and join to the operation."""
    tokens = types_pb2.Tensor(dtype=types_pb2.DTYPE_INT32, data=bytes(3 * MAX_FRAME_BYTES))
    kind = training_pb2.Forward(batch=types_pb2.Batch(packed=types_pb2.PackedBatch(tokens=tokens)))
    whole = b""
    for frame in frames_of(KeptOperation(4, 0, prepare(kind))):
        assert len(frame) <= MAX_FRAME_BYTES
        fragment = training_pb2.StreamOperationsRequest.FromString(frame).fragment
        assert fragment.offset == len(whole)
        whole += fragment.data
    assert fragment.total_bytes == len(whole)
    assert training_pb2.Operation.FromString(whole).forward == kind
