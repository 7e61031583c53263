"""Operations as frames of the operation stream, framed by hand so that a batch's bytes are copied once.

The bytes are those that protobuf itself would write. Knows nothing of when a frame is sent.
"""

from collections.abc import Iterator
from typing import Final

import xxhash
from google.protobuf.message import Message

from treadle.errors import LimitError
from treadle.ledger import KeptOperation, PreparedOperation
from treadle.v1 import training_pb2

MAX_FRAME_BYTES: Final = 2**20
MAX_OPERATION_BYTES: Final = 32 * 2**20
# What a frame adds to an operation's body: seq, digest, group, tags and lengths.
FRAME_OVERHEAD_BYTES: Final = 64

_LENGTH_DELIMITED: Final = 2
_OPERATION_FIELD: Final = training_pb2.StreamOperationsRequest.OPERATION_FIELD_NUMBER
_KIND_FIELDS: Final = {
    field.message_type.full_name: field.number
    for field in training_pb2.Operation.DESCRIPTOR.oneofs_by_name["kind"].fields
    if field.message_type is not None
}


def prepare(kind: Message) -> PreparedOperation:
    """Returns an operation of this kind (Forward, OptimStep, ...), ready for a seq; raises LimitError if too long."""
    body = kind.SerializeToString(deterministic=True)
    if len(body) + FRAME_OVERHEAD_BYTES > MAX_OPERATION_BYTES:
        raise LimitError(
            f"an operation of {len(body)} bytes is too long; at most {MAX_OPERATION_BYTES} are possible",
            "OPERATION_TOO_LARGE",
        )
    return PreparedOperation(_KIND_FIELDS[kind.DESCRIPTOR.full_name], body, xxhash.xxh3_64_intdigest(body))


def frames_of(kept: KeptOperation, max_frame_bytes: int = MAX_FRAME_BYTES) -> Iterator[bytes]:
    """Yields the serialized StreamOperationsRequest frames of an operation: one, or parts if it is too long."""
    operation = kept.operation
    head = training_pb2.Operation(seq=kept.seq, digest=operation.digest, group_seq=kept.group_seq).SerializeToString()
    kind_head = _varint(operation.kind_field << 3 | _LENGTH_DELIMITED) + _varint(len(operation.body))
    total = len(head) + len(kind_head) + len(operation.body)
    if total + FRAME_OVERHEAD_BYTES <= max_frame_bytes:
        frame_head = _varint(_OPERATION_FIELD << 3 | _LENGTH_DELIMITED) + _varint(total)
        yield b"".join((frame_head, head, kind_head, operation.body))
        return
    whole = memoryview(b"".join((head, kind_head, operation.body)))
    part_bytes = max_frame_bytes - FRAME_OVERHEAD_BYTES
    for offset in range(0, total, part_bytes):
        part = bytes(whole[offset : offset + part_bytes])
        fragment = training_pb2.OperationFragment(total_bytes=total, offset=offset, data=part)
        yield training_pb2.StreamOperationsRequest(fragment=fragment).SerializeToString()


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
