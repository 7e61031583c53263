"""Differences between two contents of one length, for links on which bytes are dearer than computing.

XOR with what the receiver has, then all first bytes of the four-byte words, all second bytes and so on, then zstd:
what did not change vanishes, and of weights that moved a little sign, exponent and high bits do. Exact for any content.
Knows nothing of blobs, tensors and the wire.
"""

from typing import Final

import numpy as np
import zstandard

WORD_BYTES: Final = 4
_LEVEL: Final = 1


def encode(base: bytes, content: bytes) -> bytes:
    """Returns what turns `base` into `content`; both have the same length in bytes."""
    changed = np.bitwise_xor(np.frombuffer(base, np.uint8), np.frombuffer(content, np.uint8))
    whole = len(changed) // WORD_BYTES * WORD_BYTES
    planes = changed[:whole].reshape(-1, WORD_BYTES).T.tobytes() + changed[whole:].tobytes()
    return zstandard.ZstdCompressor(level=_LEVEL).compress(planes)


def decode(base: bytes, delta: bytes) -> bytes:
    """Returns the content; raises ValueError when `delta` is none for a base of this length."""
    try:
        # Looked at before anything is unpacked: no sender makes a receiver take more memory than the base has.
        size = zstandard.frame_content_size(delta)
        if size != len(base):
            raise ValueError(f"a difference for {size} bytes does not fit {len(base)}")
        planes = zstandard.ZstdDecompressor().decompress(delta, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(f"not a difference: {error}") from error
    found = np.frombuffer(planes, np.uint8)
    whole = len(found) // WORD_BYTES * WORD_BYTES
    changed = np.concatenate([found[:whole].reshape(WORD_BYTES, -1).T.reshape(-1), found[whole:]])
    return bytes(np.bitwise_xor(np.frombuffer(base, np.uint8), changed).data)
