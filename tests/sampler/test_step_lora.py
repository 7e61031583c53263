"""LoRA of a decoding step: against the formula in float64, and the same bits whoever else is in the step."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.sampler.conftest import take_kernels_away
from treadle_engine import tiles
from treadle_engine.adapter_slots import AdapterSlots, StepAdapters
from treadle_engine.base_model import ROW_MULTIPLE
from treadle_engine.cpu_kernels import TILE, add_lora
from treadle_engine.decode_base import DecodeBase
from treadle_engine.lora import AdapterWeights, Segment
from treadle_engine.step_lora import Scratch, StepLora

GROUPS = ((0, 1, 2), (3,), (4, 5), (6,))
"""Sites of Pip's first layer: q k v, o, gate up, down."""


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def scratch_of(base: DecodeBase) -> Scratch:
    return Scratch([(site.in_features, site.out_features) for site in base.sites])


def streams(base: DecodeBase, sites: tuple[int, ...], rows: int, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Return an input and outputs of the base for some sites, each row with numbers of its own."""
    generator = torch.Generator().manual_seed(sites[0])
    inner = base.sites[sites[0]].in_features
    x_MI = torch.randn(rows, inner, generator=generator).to(dtype)
    return x_MI, [torch.randn(rows, base.sites[site].out_features, generator=generator).to(dtype) for site in sites]


def expected(weights: AdapterWeights | None, site: int, x_NI: Tensor, y_NO: Tensor) -> Tensor:
    """Return y + scale B A x in float64."""
    pairs = [] if weights is None else weights.layout.pairs(weights.flat)
    pair = pairs[site] if site < len(pairs) else None
    if weights is None or pair is None:
        return y_NO.double()
    a_RI, b_OR = (one.double() for one in pair)
    return y_NO.double() + weights.scale * (x_NI.double() @ a_RI.t() @ b_OR.t())


@pytest.mark.parametrize(("dtype", "halves"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)])
def test_every_segment_gets_its_adapter(
    base: DecodeBase,
    adapters: list[AdapterWeights],
    dtype: torch.dtype,
    halves: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ranks 3 to 16, adapters without some sites, rows of the plain base and segments of 1 to 150 rows."""
    if not halves:
        take_kernels_away(monkeypatch)
    elif not tiles.multiplies_halves():
        pytest.skip("this CPU has no such instructions")
    bounds = [(0, 1, adapters[0]), (1, 4, adapters[1]), (4, 9, None), (9, 159, adapters[2]), (159, 166, adapters[3])]
    segments = [Segment(start, stop, weights) for start, stop, weights in bounds]
    step = StepLora(segments, scratch_of(base), dtype)
    for sites in GROUPS:
        x_MI, ys = streams(base, sites, 176, dtype)
        before = [y_MO.clone() for y_MO in ys]
        step.add_to(sites, x_MI, ys)
        for site, y_MO, old_MO in zip(sites, ys, before, strict=True):
            for start, stop, weights in bounds:
                exact_NO = expected(weights, site, x_MI[start:stop], old_MO[start:stop])
                tolerance = 1e-5 if dtype == torch.float32 else 2**-6 if halves else 2**-8
                bound = tolerance * exact_NO.abs().amax() + 1e-6
                assert (y_MO[start:stop].double() - exact_NO).abs().amax() <= bound
            assert torch.equal(y_MO[4:9], old_MO[4:9])
            assert torch.equal(y_MO[166:], old_MO[166:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_row_has_the_same_bits_in_any_company(
    base: DecodeBase, adapters: list[AdapterWeights], dtype: torch.dtype, data: st.DataObject
) -> None:
    """A row alone, and among any rows of its adapter and of others, on one thread or two."""
    weights = data.draw(st.sampled_from(adapters))
    sites = data.draw(st.sampled_from(GROUPS))
    x_MI, ys = streams(base, sites, 1, dtype)
    before, after = data.draw(st.integers(0, 70)), data.draw(st.integers(0, 70))
    others = data.draw(st.sampled_from(adapters))
    start = data.draw(st.integers(0, 5))
    rows = start + before + 1 + after
    crowd_MI, crowd_ys = streams(base, sites, rows, dtype)
    place = start + before
    for one, many in zip((x_MI, *ys), (crowd_MI, *crowd_ys), strict=True):
        many[place] = one[0]
    company = [Segment(0, start, others)] if start else []
    torch.set_num_threads(data.draw(st.integers(1, 2)))
    StepLora([*company, Segment(start, rows, weights)], scratch_of(base), dtype).add_to(sites, crowd_MI, crowd_ys)
    torch.set_num_threads(1)
    StepLora([Segment(0, 1, weights)], scratch_of(base), dtype).add_to(sites, x_MI, ys)
    for y_MO, crowd_MO in zip(ys, crowd_ys, strict=True):
        assert torch.equal(y_MO[0], crowd_MO[place])


def test_stacked_adapters_give_the_same(base: DecodeBase, adapters: list[AdapterWeights]) -> None:
    """What other devices use agrees with the kernel: a few rows each, and many."""
    slots = AdapterSlots(base.sites, base.dtype, base.device, base.block_rows, ROW_MULTIPLE)
    segments = [Segment(0, 2, adapters[0]), Segment(2, 40, adapters[1]), Segment(43, 48, adapters[2])]
    for sites in GROUPS:
        x_MI, ys = streams(base, sites, 48, torch.float32)
        copies = [y_MO.clone() for y_MO in ys]
        StepLora(segments, scratch_of(base)).add_to(sites, x_MI, ys)
        StepAdapters(segments, slots).add_to(sites, x_MI, copies)
        for y_MO, copy_MO in zip(ys, copies, strict=True):
            torch.testing.assert_close(y_MO, copy_MO, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_share_a_long_step(base: DecodeBase, adapters: list[AdapterWeights], dtype: torch.dtype) -> None:
    """A prompt of 600 rows and a sample, by two threads, have the bits that one thread gives."""
    segments = [Segment(0, 600, adapters[0]), Segment(600, 601, adapters[1])]
    sites = GROUPS[2]
    x_MI, ys = streams(base, sites, 608, dtype)
    copies = [y_MO.clone() for y_MO in ys]
    StepLora(segments, scratch_of(base), dtype).add_to(sites, x_MI, ys)
    torch.set_num_threads(1)
    StepLora(segments, scratch_of(base), dtype).add_to(sites, x_MI, copies)
    for y_MO, copy_MO in zip(ys, copies, strict=True):
        assert torch.equal(y_MO, copy_MO)


def test_tensors_with_gaps_are_refused(base: DecodeBase, adapters: list[AdapterWeights]) -> None:
    x_MI, ys = streams(base, (3,), 16, torch.float32)
    with pytest.raises(ValueError, match="contiguous"):
        StepLora([Segment(0, 16, adapters[0])], scratch_of(base)).add_to((3,), x_MI, [ys[0][:, ::2]])


def test_bfloat16_is_rounded_as_torch_rounds_it() -> None:
    """Ties go to even, what is too large becomes infinite, and NaN stays NaN."""
    words = np.array([0x3F800000, 0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0x7F800000, 0x7FFFFFFF, 0xBF808000])
    numbers = torch.from_numpy(words.astype(np.uint32).view(np.float32).copy())
    # y = 0 + 1 * (1 * numbers): one row, rank 1, inner width 1.
    x, y = torch.ones(1, 1, dtype=torch.bfloat16), torch.zeros(1, len(numbers), dtype=torch.bfloat16)
    a, b = torch.ones(1, 1), numbers.view(1, -1).contiguous()
    one = np.ones(1, np.int64)
    add_lora(
        np.empty(0, np.uint16), np.empty(0, np.float32), x.data_ptr(), 1, one * len(numbers), one * y.data_ptr(),
        one * a.data_ptr(), (one * b.data_ptr()).reshape(1, 1), one * 0, one, one, np.ones(1, np.float32),
        *(np.empty((TILE, width), np.float32) for width in (1, 1, len(numbers))),
    )  # fmt: skip
    torch.testing.assert_close(y[0], numbers.bfloat16(), rtol=0, atol=0, equal_nan=True)
