"""The grouped product: right, the same bits in any company and place, and done without where it is missing."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.engine.builders import make_batch, make_state
from treadle_engine import grouped_gemm, tiles
from treadle_engine.base_model import BaseModel
from treadle_engine.grouped_gemm import ALIGNED_VALUES, Products
from treadle_engine.losses import LossSpec
from treadle_engine.passes import Chunk, TrainingEngine

needs_library = pytest.mark.skipif(not grouped_gemm.available(), reason="torch brings no grouped product here")


@dataclass(frozen=True)
class _Product:
    """Operands of C += alpha op(A) op(B), drawn from a seed."""

    m: int
    n: int
    k: int
    transpose_a: bool
    transpose_b: bool
    alpha: float
    seed: int

    def operands(self) -> list[Tensor]:
        """Return A, B and C."""
        generator = torch.Generator().manual_seed(self.seed)
        a = (self.k, self.m) if self.transpose_a else (self.m, self.k)
        b = (self.n, self.k) if self.transpose_b else (self.k, self.n)
        return [torch.randn(shape, generator=generator) for shape in (a, b, (self.m, self.n))]


def draw_products() -> st.SearchStrategy[_Product]:
    """Any product of the sizes of LoRA, but for the one kind that the promise leaves out."""
    side = st.one_of(st.integers(1, 40), st.sampled_from([64, 96, 100, 256]))
    anything = st.builds(_Product, side, side, side, st.booleans(), st.just(False), st.just(0.7), st.integers(0, 99))
    shape = st.tuples(st.integers(2, 95), side, side)
    transposed = st.builds(
        lambda sizes, seed: _Product(*sizes, False, True, 1.0, seed), shape, st.integers(0, 99)
    )  # fmt: skip
    return st.one_of(anything, transposed)


def compute(products: list[_Product], shifts: list[int]) -> list[Tensor]:
    """Compute products in one call; operand i begins `shifts[i]` times 16 bytes behind a cache line."""
    operands: list[list[Tensor]] = [[], [], []]
    for number, product in enumerate(products):
        for which, tensor in enumerate(product.operands()):
            shift = ALIGNED_VALUES * shifts[(3 * number + which) % len(shifts)]
            room = torch.empty(tensor.numel() + shift)[shift:].view(tensor.shape)
            operands[which].append(room.copy_(tensor))
    sizes = {name: np.array([getattr(product, name) for product in products], np.int32) for name in "mnk"}
    flags = {
        name: np.array([getattr(product, name) for product in products]) for name in ("transpose_a", "transpose_b")
    }
    call = Products(
        len(products),
        **sizes,
        lda=np.where(flags["transpose_a"], sizes["m"], sizes["k"]),
        ldb=np.where(flags["transpose_b"], sizes["k"], sizes["n"]),
        ldc=sizes["n"],
        **flags,
        alpha=np.array([product.alpha for product in products], np.float32),
        beta=1.0,
    )
    call.multiply(*(np.array([tensor.data_ptr() for tensor in tensors], np.int64) for tensors in operands))
    return operands[2]


@needs_library
@settings(max_examples=150, deadline=None)
@given(
    mine=draw_products(),
    company=st.lists(draw_products(), max_size=6),
    place=st.integers(0, 6),
    shifts=st.lists(st.integers(0, 4), min_size=1, max_size=9),
)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_product_has_the_same_bits_in_any_company_and_at_any_place(
    threads: int, mine: _Product, company: list[_Product], place: int, shifts: list[int]
) -> None:
    """Alone or among others, at another place of the call or of memory, and it is right."""
    torch.set_num_threads(threads)
    try:
        (alone,) = compute([mine], [0])
        place = min(place, len(company))
        shared = compute([*company[:place], mine, *company[place:]], shifts)[place]
    finally:
        torch.set_num_threads(1)
    assert torch.equal(alone, shared)
    a, b, c = mine.operands()
    expected = torch.addmm(
        c.double(),
        (a.t() if mine.transpose_a else a).double(),
        (b.t() if mine.transpose_b else b).double(),
        alpha=mine.alpha,
    )
    assert torch.allclose(alone.double(), expected, rtol=1e-4, atol=1e-3)


@needs_library
def test_threads_share_a_call_and_change_no_bit() -> None:
    """Enough work for three threads, one product among it that is larger than the others."""
    products = [_Product(95, 256, 96, False, True, 1.0, 0)]
    products += [_Product(20 + number % 7, 96, 256, False, True, 1.0, number) for number in range(30)]
    one = compute(products, [0])
    torch.set_num_threads(3)
    try:
        three = compute(products, [0])
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


@pytest.fixture
def forget() -> Iterator[None]:
    """Have the library looked up and tried again, within the test and after it."""
    caches: tuple[Callable[[], Any], ...] = (grouped_gemm._library, grouped_gemm._keeps_promise)
    for cached in caches:
        cached.cache_clear()  # type: ignore[attr-defined]
    yield
    for cached in caches:
        cached.cache_clear()  # type: ignore[attr-defined]


def refuse(path: str) -> ctypes.CDLL:
    """Load nothing."""
    raise OSError(f"{path}: cannot open shared object file")


class _Empty:
    """A library without the symbols."""

    def __init__(self, path: str) -> None:
        self.path = path


@pytest.mark.usefixtures("forget")
@pytest.mark.parametrize("load", [refuse, _Empty])
def test_passes_do_without_a_library_that_is_missing(
    monkeypatch: pytest.MonkeyPatch, pip: BaseModel, load: Callable[[str], Any]
) -> None:
    """Without the file or its symbols products go one by one, with the same results up to rounding."""
    with_library = run_short(pip)
    grouped_gemm._library.cache_clear()
    grouped_gemm._keeps_promise.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", load)
    assert not grouped_gemm.available()
    for one, two in zip(with_library, run_short(pip), strict=True):
        assert torch.allclose(one, two, rtol=1e-3, atol=1e-4)


@needs_library
@pytest.mark.usefixtures("forget")
@pytest.mark.parametrize("fault", ["nothing", "company"])
def test_a_library_that_breaks_the_promise_is_not_used(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """One that computes nothing, and one whose bits depend on how many products there are."""
    real = grouped_gemm._library()
    assert real is not None

    def multiply(*arguments: Any) -> None:
        if fault == "nothing":
            return
        real.multiply(*arguments)
        count, first_c = arguments[-2], ctypes.c_void_p.from_address(arguments[12]).value
        assert first_c is not None
        value = ctypes.c_float.from_address(first_c)
        value.value += 1e-5 * count

    broken = grouped_gemm._Library(multiply, real.set_threads)
    monkeypatch.setattr(grouped_gemm, "_library", lambda: broken)
    assert not grouped_gemm.available()


@pytest.mark.parametrize("way", ["in halves", "grouped", "one by one"])
@pytest.mark.parametrize("name", ["pip", "llama-bfloat16"])
def test_bits_are_those_alone_either_way(
    monkeypatch: pytest.MonkeyPatch,
    pip: BaseModel,
    random_folder: Callable[[str], Any],
    name: str,
    way: str,
) -> None:
    """Runs of short and long chunks, two each so that gradients are added up, in any order: the bits of each alone."""
    if way == "grouped" and not grouped_gemm.available():
        pytest.skip("torch brings no grouped product here")
    if way == "in halves" and not (tiles.multiplies_halves() and name.endswith("bfloat16")):
        pytest.skip("nothing is multiplied in halves here")
    if way != "in halves":
        monkeypatch.setattr(tiles, "multiplies_halves", lambda: False)
    if way == "one by one":
        monkeypatch.setattr("treadle_engine.short_segments.available", lambda: False)
    base = pip if name == "pip" else BaseModel.load(str(random_folder("llama")), dtype="bfloat16")
    sizes = [([1], 1), ([150], 4), ([2, 20], 3), ([12, 40, 43], 16), ([30], 8), ([95], 2), ([96], 6)]
    alone = [make_state(base, rank, seed) for seed, (_, rank) in enumerate(sizes)]
    company = [make_state(base, rank, seed) for seed, (_, rank) in enumerate(sizes)]
    spec = LossSpec("cross_entropy")
    engine = TrainingEngine(base)
    batches = [
        [make_batch(list(reversed(lengths)) * more, 3 * seed + more, base.info.vocab_size) for more in (1, 2)]
        for seed, (lengths, _) in enumerate(sizes)
    ]
    for state, own in zip(alone, batches, strict=True):
        for batch in own:
            engine.run_pass([Chunk(state, batch, spec)])
    mixed = [Chunk(state, own[0], spec) for state, own in zip(company, batches, strict=True)]
    mixed += [Chunk(state, own[1], spec) for state, own in reversed(list(zip(company, batches, strict=True)))]
    engine.run_pass(mixed)
    for one, two in zip(alone, company, strict=True):
        assert bool(one.grads.any())
        assert torch.equal(one.grads, two.grads)


def run_short(base: BaseModel) -> list[Tensor]:
    """Return the gradients of a pass of short chunks."""
    states = [make_state(base, rank, seed) for seed, rank in enumerate((1, 4, 8))]
    chunks = [
        Chunk(state, make_batch([20 + index, 1 + index], index, base.info.vocab_size), LossSpec("cross_entropy"))
        for index, state in enumerate(states)
    ]
    assert all(result.error is None for result in TrainingEngine(base).run_pass(chunks))
    return [state.grads for state in states]
