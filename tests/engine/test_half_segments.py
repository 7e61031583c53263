"""LoRA's products in bfloat16: against the formula in float64, and the same bits whoever else is in the stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from treadle_engine import tiles
from treadle_engine.half_segments import half_segments
from treadle_engine.lora import AdapterWeights, LoraConfig, LoraSite, Segment, SegmentedLinear, Segments

pytestmark = pytest.mark.skipif(not tiles.multiplies_halves(), reason="this CPU does not multiply pairs of bfloat16")

INNER, OUTER = 96, (64, 32, 160)
"""Features of an input, and of the three linears that read it."""

ODD = 40
"""Features that are no whole vectors."""


@dataclass(frozen=True)
class Site:
    """A base of four linears: three that share their input, and one whose widths are odd."""

    dtype: torch.dtype = torch.bfloat16
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - immutable

    def lora_sites(self, config: LoraConfig) -> tuple[LoraSite, ...]:
        """All of them, or those of the three alone."""
        three = [LoraSite(index, f"m{index}", INNER, outer, "attn", 0) for index, outer in enumerate(OUTER)]
        return (*three, LoraSite(3, "m3", ODD, INNER, "mlp", 3)) if config.train_mlp else tuple(three)


def adapter(rank: int, seed: int, *, mlp: bool = True) -> AdapterWeights:
    """Return an adapter with random A and B."""
    weights = AdapterWeights(Site(), LoraConfig(rank=rank, alpha=8.0, train_mlp=mlp))
    weights.flat.copy_(torch.randn(weights.flat.shape, generator=torch.Generator().manual_seed(seed)) * 0.3)
    weights.refresh()
    return weights


def linears() -> list[SegmentedLinear]:
    """Return the three linears, their frozen weights zero: what is left is LoRA."""
    made = [SegmentedLinear(nn.Linear(INNER, outer, bias=False).bfloat16(), index) for index, outer in enumerate(OUTER)]
    for linear in made:
        nn.init.zeros_(linear.weight)
    return made


@dataclass(frozen=True)
class Outcome:
    """What a pass over the linears gives."""

    ys: list[Tensor]
    g_MI: Tensor
    grads: list[Tensor]


def streams(rows: int, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    """Return an input and a gradient of each output."""
    generator = torch.Generator().manual_seed(seed)
    x_MI = torch.randn(rows, INNER, generator=generator).bfloat16()
    return x_MI, [torch.randn(rows, outer, generator=generator).bfloat16() for outer in OUTER]


def compute(x_MI: Tensor, gradients: Sequence[Tensor], bounds: Sequence[tuple[int, int, AdapterWeights]]) -> Outcome:
    """Run forward and backward of the three linears."""
    grads = [torch.zeros_like(weights.flat) for *_, weights in bounds]
    segments = Segments(Segment(*bound, own) for bound, own in zip(bounds, grads, strict=True))
    group = linears()
    ys, lows = SegmentedLinear.project_group(group, x_MI, segments)
    assert lows.grouped is not None
    g_MI = SegmentedLinear.group_backward(group, gradients, x_MI, lows, segments, need_input=True)
    assert g_MI is not None
    return Outcome(ys, g_MI, grads)


def close(found: Tensor, exact: Tensor, bits: int = 6) -> None:
    """Compare with what float64 gives; A x^T is rounded to bfloat16's 8 bits on the way."""
    assert (found.double() - exact).abs().amax() <= 2.0**-bits * exact.abs().amax() + 1e-9


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Run the test with two threads."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def test_every_segment_gets_its_adapter() -> None:
    """Ranks of all sizes, odd ones too; segments of 1 to 200 rows; rows of nobody stay as they are."""
    rows, ranks = (1, 2, 7, 65, 200, 17, 33, 128), (1, 3, 4, 8, 16, 33, 6, 12)
    bounds, start = [], 0
    for seed, (count, rank) in enumerate(zip(rows, ranks, strict=True)):
        bounds.append((start, start + count, adapter(rank, seed, mlp=bool(seed % 2))))
        start += count
    x_MI, gradients = streams(start + 5)
    outcome = compute(x_MI, gradients, bounds)
    for (begin, end, weights), grads in zip(bounds, outcome.grads, strict=True):
        x, total = x_MI[begin:end].double(), torch.zeros(end - begin, INNER, dtype=torch.float64)
        gradient_pairs = weights.layout.pairs(grads)
        for site, (g_MO, y_MO) in enumerate(zip(gradients, outcome.ys, strict=True)):
            pair, gradient_pair = weights.layout.pairs(weights.flat)[site], gradient_pairs[site]
            assert pair is not None
            assert gradient_pair is not None
            a_RI, b_OR = (one.double() for one in pair)
            g = g_MO[begin:end].double()
            close(y_MO[begin:end], weights.scale * x @ a_RI.t() @ b_OR.t())
            close(gradient_pair[0], weights.scale * (g @ b_OR).t() @ x)
            close(gradient_pair[1], weights.scale * g.t() @ (x @ a_RI.t()))
            total += weights.scale * g @ b_OR @ a_RI
        close(outcome.g_MI[begin:end], total)
    assert not any(y_MO[start:].any() for y_MO in outcome.ys)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_bits_do_not_tell_who_else_is_there(data: st.DataObject) -> None:
    """One segment alone, and at any place among others, on one thread or two."""
    rows, rank = data.draw(st.integers(1, 150)), data.draw(st.sampled_from((1, 2, 3, 5, 8, 16, 20)))
    others = data.draw(st.lists(st.tuples(st.integers(1, 90), st.sampled_from((1, 4, 7, 32))), max_size=4))
    place = data.draw(st.integers(0, len(others)))
    mine = adapter(rank, 99)
    x_NI, own = streams(rows, 1)
    alone = compute(x_NI, own, [(0, rows, mine)])
    parts = [(streams(count, 2 + index), adapter(more, index)) for index, (count, more) in enumerate(others)]
    parts.insert(place, ((x_NI, own), mine))
    bounds, start = [], 0
    for (x, _), weights in parts:
        bounds.append((start, start + len(x), weights))
        start += len(x)
    gradients = [torch.cat([g[site] for (_, g), _ in parts]) for site in range(len(OUTER))]
    torch.set_num_threads(data.draw(st.sampled_from((1, 2))))
    try:
        company = compute(torch.cat([x for (x, _), _ in parts]), gradients, bounds)
    finally:
        torch.set_num_threads(1)
    begin, end, _ = bounds[place]
    assert all(torch.equal(one, two[begin:end]) for one, two in zip(alone.ys, company.ys, strict=True))
    assert torch.equal(alone.g_MI, company.g_MI[begin:end])
    assert torch.equal(alone.grads[0], company.grads[place])


@pytest.mark.parametrize("rank", [3, 4])
def test_numbers_that_are_none_stay_where_they_are(rank: int) -> None:
    """An adapter has diverged: neighbours, who use the same scratch after it, get their own numbers."""
    broken, sound = adapter(5, 0), adapter(rank, 1)
    broken.flat.fill_(torch.nan)
    broken.refresh()
    x_MI, gradients = streams(141)
    outcome = compute(x_MI, gradients, [(0, 70, broken), (70, 141, sound)])
    alone = compute(x_MI[70:], [g_MO[70:] for g_MO in gradients], [(0, 71, sound)])
    assert outcome.ys[0][:70].isnan().all()
    assert all(torch.equal(one[70:], two) for one, two in zip(outcome.ys, alone.ys, strict=True))
    assert torch.equal(outcome.g_MI[70:], alone.g_MI)
    assert torch.equal(outcome.grads[1], alone.grads[0])


@pytest.mark.usefixtures("two_threads")
def test_chunks_of_one_run_are_added_in_their_order() -> None:
    """On two threads as on one: a sum depends on the order of what is added."""
    mine = adapter(8, 0)
    x_MI, gradients = streams(600)
    cuts = ((0, 200), (200, 410), (410, 600))
    grads = torch.zeros_like(mine.flat)
    group, segments = linears(), Segments(Segment(*cut, mine, grads, fresh=False) for cut in cuts)
    _, lows = SegmentedLinear.project_group(group, x_MI, segments)
    SegmentedLinear.group_backward(group, gradients, x_MI, lows, segments, need_input=False)
    torch.set_num_threads(1)
    expected = torch.zeros_like(mine.flat)
    for start, stop in cuts:
        expected += compute(
            x_MI[start:stop], [g_MO[start:stop] for g_MO in gradients], [(0, stop - start, mine)]
        ).grads[0]
    assert torch.equal(grads, expected)


def test_rows_that_lie_apart_are_read_and_written_where_they_are() -> None:
    """Streams that are columns of wider ones, and such whose columns are not neighbours."""
    mine = adapter(8, 0)
    x_MI, gradients = streams(50)
    expected = compute(x_MI, gradients, [(0, 50, mine)])
    apart = torch.cat((x_MI, x_MI), dim=1)[:, INNER:]
    turned = [g_MO.t().contiguous().t() for g_MO in gradients]
    found = compute(apart, turned, [(0, 50, mine)])
    assert torch.equal(expected.grads[0], found.grads[0])
    assert torch.equal(expected.g_MI, found.g_MI)
    segments = half_segments([Segment(0, 50, mine)])
    assert segments is not None
    outputs = [torch.zeros(outer, 50, dtype=torch.bfloat16).t() for outer in OUTER]
    segments.forward(0, x_MI, outputs)
    assert all(torch.equal(one, two) for one, two in zip(expected.ys, outputs, strict=True))


def test_widths_that_are_no_whole_vectors_go_another_way() -> None:
    """Such a site is not grouped in bfloat16; its neighbours are."""
    segments = half_segments([Segment(0, 200, adapter(8, 0)), Segment(200, 210, adapter(8, 0, mlp=False))])
    assert segments is not None
    assert segments.at(3) is None
    assert segments.at(0) is segments
