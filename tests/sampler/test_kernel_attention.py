"""Attention of a step as kernels: against the formula in float64, and the same bits however rows come together."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.sampler.conftest import take_kernels_away
from treadle_engine import tiles
from treadle_engine.decode_attention import DecodeAttention, TextPart
from treadle_engine.kernel_attention import serves
from treadle_engine.kv_cache import KvCache, Slot

WHY = "this CPU has no such instructions"
KINDS = [
    pytest.param(torch.bfloat16, marks=pytest.mark.skipif(not tiles.multiplies_halves(), reason=WHY)),
    pytest.param(torch.float32, marks=pytest.mark.skipif(not tiles.multiplies_floats(), reason=WHY)),
]
in_both = pytest.mark.parametrize("dtype", KINDS)

CPU, LAYERS, WIDTH, SCALE = torch.device("cpu"), 2, 64, 0.1


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Run the test with two threads."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def texts(lengths: list[int], heads: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """Return queries, keys and values [3, L, heads, d] of some texts; all heads have keys of their own."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, length, heads, WIDTH, generator=generator).to(dtype) for length in lengths]


def cache_of(groups: int, dtype: torch.dtype) -> KvCache:
    """Return an empty cache."""
    return KvCache(LAYERS, groups, WIDTH, dtype, CPU, 65_536)


def read_all(qkv_3LHd: Tensor, groups: int, cuts: list[int], window: int | None = None) -> tuple[Tensor, KvCache, Slot]:
    """Return o_LHd of a text that is read in parts of these sizes and then decoded, token by token, from layer 1."""
    cache, (q_LHd, k_LHd, v_LHd) = cache_of(groups, qkv_3LHd.dtype), qkv_3LHd
    text = cache.new_text(q_LHd.shape[0])
    outputs, start = [], 0

    def run(plan: DecodeAttention, rows: slice) -> None:
        outputs.append(plan.attend(1, q_LHd[rows], k_LHd[rows, :groups], v_LHd[rows, :groups], SCALE, window))

    for count in cuts:
        run(
            DecodeAttention([TextPart(text, count)], [], [], (q_LHd.shape[1], groups), 16, CPU),
            slice(start, start + count),
        )
        start += count
        text.length = start
    slot = cache.fork(text)
    while start < q_LHd.shape[0]:
        if slot.length == slot.slab.capacity:
            slot = cache.grow(slot)
        plan = DecodeAttention([], [slot], cache.slabs, (q_LHd.shape[1], groups), 16, CPU)
        run(plan, slice(start, start + 1))
        start += 1
        slot.length = start
    return torch.cat(outputs), cache, slot


@in_both
@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (4, 4), (8, 1), (10, 1)])
@pytest.mark.parametrize("window", [None, 5, 6])
def test_rows_attend_to_what_is_before_them(heads: int, groups: int, window: int | None, dtype: torch.dtype) -> None:
    """One to ten queries share a key; with a window they see its last positions only."""
    (qkv_3LHd,) = texts([75], heads, dtype)
    found, _, _ = read_all(qkv_3LHd, groups, [1, 40, 9], window)
    q, k, v = qkv_3LHd.double()
    order = torch.arange(heads) // (heads // groups)
    scores = torch.einsum("lhd,mhd->hlm", q, k[:, order]) * SCALE
    places = torch.arange(75)
    hidden = places[None, :] > places[:, None]
    if window is not None:
        hidden |= places[None, :] <= places[:, None] - window
    exact = torch.einsum("hlm,mhd->lhd", scores.masked_fill(hidden, -math.inf).softmax(-1), v[:, order])
    assert (found.double() - exact).abs().amax() < (2**-7 if dtype == torch.bfloat16 else 1e-6) * exact.abs().amax()


@in_both
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_bits_do_not_tell_how_a_text_was_cut(dtype: torch.dtype, data: st.DataObject) -> None:
    """Read at once, in parts, or decoded token by token: the same output, on one thread or two."""
    length = data.draw(st.integers(2, 150))
    window = data.draw(st.sampled_from((None, 1, 7, 64)))
    (qkv_3LHd,) = texts([length], 6, dtype)
    whole, _, _ = read_all(qkv_3LHd, 2, [length], window)
    cuts, left = [], data.draw(st.integers(1, length))
    while left:
        cuts.append(data.draw(st.integers(1, left)))
        left -= cuts[-1]
    torch.set_num_threads(data.draw(st.sampled_from((1, 2))))
    try:
        found, _, _ = read_all(qkv_3LHd, 2, cuts, window)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(whole, found)


@in_both
@pytest.mark.usefixtures("two_threads")
def test_texts_and_samples_of_all_lengths_share_a_step(dtype: torch.dtype) -> None:
    """Each row's output is that of its text alone; memory that others left, numbers or none, does not matter."""
    lengths = [1, 3, 64, 65, 130, 500, 40]
    made = texts(lengths, 6, dtype)
    alone = [read_all(qkv_3LHd, 2, [qkv_3LHd.shape[1] - 1 or 1])[0] for qkv_3LHd in made]
    cache = cache_of(2, dtype)
    slots = []
    for qkv_3LHd in made:
        # Everything behind the text is none: nobody may look there.
        text = cache.new_text(qkv_3LHd.shape[1])
        text.kv_Y2GCd.fill_(torch.nan)
        text.length = max(1, qkv_3LHd.shape[1] - 1)
        text.kv_Y2GCd[1, :, :, : text.length] = qkv_3LHd[1:, : text.length, :2].transpose(1, 2)
        slots.append(cache.fork(text))
    part = cache.new_text(200)
    part.kv_Y2GCd.fill_(torch.nan)
    (read,) = texts([200], 6, dtype, seed=9)
    several = [index for index, length in enumerate(lengths) if length > 1]
    q, k, v = (torch.cat((read[which], *(made[index][which, -1:] for index in several))) for which in range(3))
    plan = DecodeAttention([TextPart(part, 200)], [slots[index] for index in several], cache.slabs, (6, 2), 16, CPU)
    found = plan.attend(1, q, k[:, :2], v[:, :2], SCALE, None)
    assert torch.equal(found[:200], read_all(read, 2, [200])[0])
    for row, index in enumerate(several, start=200):
        assert torch.equal(found[row], alone[index][-1])


@in_both
def test_numbers_that_are_none_are_not_hidden(dtype: torch.dtype) -> None:
    """A query or key that is no number gives an output that is none, so that the sample is found to have diverged."""
    (qkv_3LHd,) = texts([40], 6, dtype)
    for which, value in ((0, torch.nan), (1, torch.nan), (1, torch.inf), (2, torch.nan)):
        broken = qkv_3LHd.clone()
        broken[which, 7] = value
        found, _, _ = read_all(broken, 2, [39])
        assert not found[7].isfinite().any()


@in_both
def test_products_of_torch_give_the_same_up_to_rounding(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without the instructions."""
    (qkv_3LHd,) = texts([90], 6, dtype)
    found, _, _ = read_all(qkv_3LHd, 2, [50, 33])
    take_kernels_away(monkeypatch)
    other, _, _ = read_all(qkv_3LHd, 2, [50, 33])
    assert not torch.equal(found, other)
    assert (found - other).abs().amax() < (2**-7 if dtype == torch.bfloat16 else 1e-6) * found.abs().amax()


@pytest.mark.skipif(not tiles.multiplies_halves(), reason=WHY)
def test_only_what_fits_is_served() -> None:
    """Other dtypes and odd widths keep to torch's products."""
    assert serves(torch.empty(2, 64, dtype=torch.bfloat16))
    assert serves(torch.empty(2, 64))
    assert not serves(torch.empty(2, 64, dtype=torch.float16))
    assert not serves(torch.empty(2, 40, dtype=torch.bfloat16))
