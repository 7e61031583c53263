"""Wall-clock time as the store keeps it: whole microseconds since 1970, passed in wherever it is needed.

Leases survive a restart of the store, so their ends are wall-clock times. A clock that jumps costs liveness only:
safety rests on the epoch.
"""

import time
from collections.abc import Callable

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

Clock = Callable[[], int]


def system_clock() -> int:
    """Returns the time in microseconds since 1970."""
    return time.time_ns() // 1000


def to_timestamp(time_us: int) -> Timestamp:
    """Returns microseconds since 1970 as a Timestamp."""
    stamp = Timestamp()
    stamp.FromMicroseconds(time_us)
    return stamp


def to_duration(length_us: int) -> Duration:
    """Returns microseconds as a Duration."""
    length = Duration()
    length.FromMicroseconds(length_us)
    return length
