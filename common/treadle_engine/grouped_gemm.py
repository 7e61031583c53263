"""Many small float32 products in one call on a CPU: MKL's grouped GEMM, which torch's own library brings.

torch offers no such call, and of a small product its own takes most of the time to get there. The symbols are looked
up and tried when they are first wanted; where they are missing, or do not keep the promise below, `available` says no
and callers multiply one by one. Knows addresses and sizes alone.

The promise: a product has the same bits whatever else is in the call, however many there are, and wherever its
operands lie, as long as each begins at a multiple of 16 bytes (measured: MKL's kernels choose by that) and none is
[1, k] times the transpose of [n, k] (for these MKL chooses by the others of the call). One thread computes a product,
however many torch has.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from treadle_engine.kernel_threads import together

ALIGNED_VALUES: Final = 4
"""Float32 values in 16 bytes."""

Ints = NDArray[np.int32] | NDArray[np.int64]
Addresses = NDArray[np.int64]

_ROW_MAJOR, _AS_IS, _TRANSPOSED = 101, 111, 112
# Multiplications of two numbers below which handing a part of a call to another thread takes longer than computing it.
_WORTH = 4e6
# One value each of A, B and C of the product that keeps another one company.
_COMPANY = np.zeros(3 * ALIGNED_VALUES, np.float32)


class _Library(NamedTuple):
    multiply: Any  # functions of ctypes
    set_threads: Any


class Products:
    """The sizes of some products C = beta C + alpha op(A) op(B), all row-major; `multiply` gives them operands.

    Each argument is one number for all or an array [count] of one for each; op(A) is [m, k], op(B) is [k, n], and lda,
    ldb and ldc are the values from one row to the next as they lie in memory.
    """

    def __init__(
        self,
        count: int,
        *,
        m: Ints | int,
        n: Ints | int,
        k: Ints | int,
        lda: Ints | int,
        ldb: Ints | int,
        ldc: Ints | int,
        transpose_a: NDArray[np.bool_] | bool = False,
        transpose_b: NDArray[np.bool_] | bool = False,
        alpha: NDArray[np.float32] | float = 1.0,
        beta: NDArray[np.float64] | float = 0.0,
    ) -> None:
        """Lay the sizes out as the library reads them."""
        self.count = count
        # A product all by itself goes another way than one in company: so it always has some.
        total = max(count, 2)
        self._sizes, self._factors = np.ones((8, total), np.int32), np.zeros((2, total), np.float32)
        self._sizes[:2] = _AS_IS
        for row, flag in enumerate((transpose_a, transpose_b)):
            if flag is not False:
                self._sizes[row, :count] = _TRANSPOSED if flag is True else np.where(flag, _TRANSPOSED, _AS_IS)
        for row, values in enumerate((m, n, k, lda, ldb, ldc), start=2):
            self._sizes[row, :count] = values
        self._factors[0, :count], self._factors[1, :count] = alpha, beta
        self._operands = np.empty((3, total), np.int64)
        self._operands[:] = _COMPANY.ctypes.data + 4 * ALIGNED_VALUES * np.arange(3)[:, None]
        self._ones = np.ones(total, np.int32)
        flag_a, flag_b, m_at, n_at, k_at, lda_at, ldb_at, ldc_at = _rows_of(self._sizes)
        alpha_at, beta_at = _rows_of(self._factors)
        a_at, b_at, c_at = _rows_of(self._operands)
        # In the order in which the library wants them, with the bytes of an element.
        self._columns = (
            (flag_a, 4), (flag_b, 4), (m_at, 4), (n_at, 4), (k_at, 4), (alpha_at, 4), (a_at, 8), (lda_at, 4),
            (b_at, 8), (ldb_at, 4), (beta_at, 4), (c_at, 8), (ldc_at, 4),
        )  # fmt: skip
        self._calls = [self._call(0, total)]
        self._threads = 1

    def multiply(self, a: Addresses, b: Addresses, c: Addresses) -> None:
        """Compute all products; the tensors at the addresses, one of each kind per product, must outlive the call."""
        library = _library()
        if library is None:
            raise RuntimeError("there is no grouped product here")
        threads = torch.get_num_threads()
        if threads != self._threads:
            self._share_out(threads)
        count = self.count
        self._operands[0, :count] = a
        self._operands[1, :count] = b
        self._operands[2, :count] = c
        together(_multiply, [(library, call) for call in self._calls])

    def _call(self, start: int, stop: int) -> tuple[int, ...]:
        """Return the library's arguments for some of the products."""
        columns = (address + start * size for address, size in self._columns)
        return (_ROW_MAJOR, *columns, stop - start, self._ones.ctypes.data)

    def _share_out(self, threads: int) -> None:
        """Cut the call into one for each thread, of about as much work, where that pays; each of at least two."""
        self._threads = threads
        work = np.cumsum(self._sizes[2:5].astype(np.float64).prod(axis=0))
        parts = min(threads, int(work[-1] // _WORTH) + 1)
        cuts = [0]
        for part in range(1, parts):
            cut = int(np.searchsorted(work, work[-1] * part / parts)) + 1
            if cuts[-1] + 2 <= cut <= len(work) - 2:
                cuts.append(cut)
        self._calls = [self._call(start, stop) for start, stop in pairwise([*cuts, len(work)])]


def _multiply(library: _Library, call: tuple[int, ...]) -> None:
    # More threads of the library's own would share out a call by what is in it, and cut larger products in two.
    before = library.set_threads(1)
    library.multiply(*call)
    library.set_threads(before)


def _rows_of(table: NDArray[Any]) -> list[int]:
    """Return the addresses of the rows of a table."""
    first, step = table.ctypes.data, table.strides[0]
    return [first + row * step for row in range(table.shape[0])]


class TimesTransposed:
    """The sizes of some products C = beta C + alpha A B^T, where A may be a single row."""

    def __init__(
        self,
        count: int,
        *,
        m: Ints,
        n: Ints | int,
        k: Ints | int,
        lda: Ints | int,
        ldb: Ints | int,
        ldc: Ints | int,
        alpha: NDArray[np.float32] | float = 1.0,
        beta: float = 0.0,
    ) -> None:
        """Turn products with a single row round: there B multiplies a column, which leaves no transposed matrix."""
        single = m == 1
        self._single = single if single.any() else None
        if self._single is None:
            self._products = Products(
                count, m=m, n=n, k=k, lda=lda, ldb=ldb, ldc=ldc, transpose_b=True, alpha=alpha, beta=beta
            )
            return
        self._products = Products(
            count,
            m=np.where(single, n, m), n=np.where(single, 1, n), k=k,
            lda=np.where(single, ldb, lda), ldb=np.where(single, 1, ldb), ldc=np.where(single, 1, ldc),
            transpose_b=~single, alpha=alpha, beta=beta,
        )  # fmt: skip

    def multiply(self, a: Addresses, b: Addresses, c: Addresses) -> None:
        """Compute all products, as `Products.multiply`."""
        if self._single is None:
            self._products.multiply(a, b, c)
        else:
            self._products.multiply(np.where(self._single, b, a), np.where(self._single, a, b), c)


def available() -> bool:
    """Tell whether there is a grouped product here that keeps the promise."""
    return _library() is not None and _keeps_promise()


@lru_cache(maxsize=1)
def _library() -> _Library | None:
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        library = ctypes.CDLL(str(path))
        multiply, set_threads = library.cblas_sgemm_batch, library.MKL_Set_Num_Threads_Local
    except (OSError, AttributeError):
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int
    multiply.argtypes, multiply.restype = [number, *[pointer] * 13, number, pointer], None
    set_threads.argtypes, set_threads.restype = [number], number
    return _Library(multiply, set_threads)


@lru_cache(maxsize=1)
def _keeps_promise() -> bool:
    """Compare products in company, shifted in memory, and alone; and all with torch's."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(m, n, k) for m, n, k in zip((2, 17, 40, 95), (4, 16, 96, 33), (256, 48, 100, 576), strict=True)]
    for transpose_a, transpose_b in ((False, False), (False, True), (True, False)):
        a, b = (
            [torch.randn(*shape, generator=generator) for shape in sides]
            for sides in (
                [(k, m) if transpose_a else (m, k) for m, _, k in shapes],
                [(n, k) if transpose_b else (k, n) for _, n, k in shapes],
            )
        )
        flags = (transpose_a, transpose_b)
        together = _try(shapes, flags, a, b, shift=ALIGNED_VALUES)
        alone = [_try([shape], flags, [x], [y], shift=0)[0] for shape, x, y in zip(shapes, a, b, strict=True)]
        for x, y, one, other in zip(a, b, together, alone, strict=True):
            expected = (x.t() if transpose_a else x) @ (y.t() if transpose_b else y)
            if not torch.equal(one, other) or not torch.allclose(one, expected, rtol=1e-4, atol=1e-3):
                return False
    return True


def _try(
    shapes: list[tuple[int, int, int]],
    flags: tuple[bool, bool],
    a: list[torch.Tensor],
    b: list[torch.Tensor],
    shift: int,
) -> list[torch.Tensor]:
    """Return the products of copies of a and b that begin `shift` values behind a cache line."""
    m, n, k = (np.array(sizes, np.int32) for sizes in zip(*shapes, strict=True))
    c = [torch.zeros(shape[0], shape[1]) for shape in shapes]
    operands = [[_shifted(tensor, shift) for tensor in tensors] for tensors in (a, b, c)]
    products = Products(
        len(shapes),
        m=m, n=n, k=k, lda=m if flags[0] else k, ldb=k if flags[1] else n, ldc=n,
        transpose_a=flags[0], transpose_b=flags[1],
    )  # fmt: skip
    products.multiply(*(np.array([tensor.data_ptr() for tensor in tensors], np.int64) for tensors in operands))
    return operands[2]


def _shifted(tensor: torch.Tensor, shift: int) -> torch.Tensor:
    copy = torch.empty(tensor.numel() + shift)[shift:].view(tensor.shape)
    return copy.copy_(tensor)
