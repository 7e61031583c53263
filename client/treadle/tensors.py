"""numpy arrays as Tensor messages and back.

Reads messages of anybody: whatever is in one, it yields an array of the stated shape or BadBatchError, and never
allocates more than 32 times the bytes that came. Knows nothing of batches.
"""

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from treadle.errors import BadBatchError
from treadle.v1 import types_pb2

AnyArray = NDArray[Any]  # Element types differ by message; each caller checks what it needs.

_MAX_DIMENSIONS: Final = 8
_MAX_DIMENSION: Final = 2**31 - 1

# Little endian by definition of the wire; equal to the native types on every machine that we run on.
_NUMPY_OF: Final[dict[int, np.dtype[Any]]] = {
    types_pb2.DTYPE_INT32: np.dtype("<i4"),
    types_pb2.DTYPE_INT64: np.dtype("<i8"),
    types_pb2.DTYPE_FLOAT32: np.dtype("<f4"),
    types_pb2.DTYPE_FLOAT16: np.dtype("<f2"),
    types_pb2.DTYPE_UINT8: np.dtype("u1"),
    types_pb2.DTYPE_BFLOAT16: np.dtype("<u2"),
}
_DTYPE_OF: Final[dict[np.dtype[Any], types_pb2.Dtype]] = {
    np.dtype("<i4"): types_pb2.DTYPE_INT32,
    np.dtype("<i8"): types_pb2.DTYPE_INT64,
    np.dtype("<f4"): types_pb2.DTYPE_FLOAT32,
    np.dtype("<f2"): types_pb2.DTYPE_FLOAT16,
    np.dtype("u1"): types_pb2.DTYPE_UINT8,
}


def tensor_from_numpy(array: AnyArray) -> types_pb2.Tensor:
    """Returns the array (int32, int64, float32, float16, uint8, or bool as a bit mask) as a message."""
    if array.dtype == np.bool_:
        data = np.packbits(array, axis=None, bitorder="little").tobytes()
        return types_pb2.Tensor(dtype=types_pb2.DTYPE_BITMASK, shape=array.shape, data=data)
    dtype = _DTYPE_OF.get(array.dtype.newbyteorder("<"))
    if dtype is None:
        raise BadBatchError(f"arrays of {array.dtype} cannot be sent; use int32, int64, float32, float16 or bool")
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return types_pb2.Tensor(dtype=dtype, shape=array.shape, data=little.tobytes())


def numpy_from_tensor(tensor: types_pb2.Tensor, field: str = "tensor") -> AnyArray:
    """Returns the elements, read-only where that saves a copy; bit masks and bfloat16 come as float32.

    Raises BadBatchError (BAD_SHAPE) naming `field` when type, shape and bytes do not agree.
    """
    count = _count(tensor.shape, field)
    if tensor.codec != types_pb2.CODEC_UNSPECIFIED:
        raise BadBatchError(f"{field}: compressed tensors are not supported by this build; send raw bytes")
    data = tensor.data  # Reading the field copies it; so it is read once.
    if tensor.raw_size not in (0, len(data)):
        raise BadBatchError(f"{field}: raw_size is {tensor.raw_size} but there are {len(data)} bytes")
    if tensor.dtype == types_pb2.DTYPE_BITMASK:
        return _bits(data, count, field).reshape(tensor.shape)
    dtype = _NUMPY_OF.get(tensor.dtype)
    if dtype is None:
        raise BadBatchError(f"{field}: element type {tensor.dtype} is not known")
    if len(data) != count * dtype.itemsize:
        raise BadBatchError(
            f"{field}: the shape {list(tensor.shape)} needs {count * dtype.itemsize} bytes, there are {len(data)}"
        )
    array = np.frombuffer(data, dtype)
    if tensor.dtype == types_pb2.DTYPE_BFLOAT16:
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array.reshape(tensor.shape)


def _count(shape: Sequence[int], field: str) -> int:
    if len(shape) > _MAX_DIMENSIONS or any(not 0 <= size <= _MAX_DIMENSION for size in shape):
        raise BadBatchError(f"{field}: the shape {list(shape)[:10]} is not one of an array")
    return math.prod(shape)


def _bits(data: bytes, count: int, field: str) -> NDArray[np.float32]:
    if len(data) != (count + 7) // 8:
        raise BadBatchError(f"{field}: a mask of {count} bits needs {(count + 7) // 8} bytes, there are {len(data)}")
    return np.unpackbits(np.frombuffer(data, np.uint8), count=count, bitorder="little").astype(np.float32)
