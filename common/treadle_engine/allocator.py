"""Have the C library keep freed memory for the next pass, instead of giving it back to the system each time.

To get a page back costs several microseconds, more than to fill it. glibc trims its heap whenever a little is free at
its end, and maps large blocks anew; a pass allocates the same hundreds of megabytes again and again. Elsewhere this
does nothing.
"""

from __future__ import annotations

import ctypes
from typing import Final

KEPT_BYTES: Final = 64 * 2**20
"""What may stay free at the end of the heap."""

# The largest that glibc takes: blocks from this size on are mapped and given back one by one.
_MAPPED_BYTES: Final = 32 * 2**20
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> bool:
    """Tell the allocator; call once, at the start of a process. False where there is nothing to tell."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _MAPPED_BYTES)) and bool(mallopt(_TRIM_THRESHOLD, KEPT_BYTES))
