"""The gateway's part in the trace of each operation: from its frame to the frame of its result.

Frames are parsed only where traces are kept; otherwise they pass as bytes. Knows nothing of what operations do.
"""

import time

from google.protobuf.message import DecodeError

from treadle.v1 import training_pb2
from treadle_service.tracing import TRACING


class StreamSpans:
    """One operation stream of a run."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._began: dict[int, float] = {}

    def request(self, frame: bytes) -> None:
        """Looks at a frame on its way to the trainer; an operation in parts is timed from its result back alone."""
        if not TRACING.on:
            return
        try:
            message = training_pb2.StreamOperationsRequest.FromString(frame)
        except DecodeError:
            # The trainer says what is wrong with it.
            return
        if message.HasField("operation") and TRACING.keeps(self._run, message.operation.seq):
            self._began.setdefault(message.operation.seq, time.time())

    def response(self, frame: bytes) -> None:
        """Looks at a frame on its way to the client."""
        if not self._began:
            return
        message = training_pb2.StreamOperationsResponse.FromString(frame)
        began = self._began.pop(message.result.seq, None)
        if began is not None:
            TRACING.op_span("gateway", self._run, message.result.seq, began, time.time(), {"num_bytes": len(frame)})
