"""Batches of sequences in slabs: each computes what it would alone, and reads nothing but its own tokens."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from models import kernels
from models import layout as layouts
from models.attention import KvCache, attend, attend_batch
from models.blocks import Block
from models.config import BlockConfig, RopeConfig
from models.layout import Layout, Plan, Segment
from models.pages import Extent, KvSlab, Run
from tests.helpers.blocks import CONFIG, random_tensors

pytestmark = pytest.mark.usefixtures("in_both_ways")

CPU = torch.device("cpu")
WIDE = dataclasses.replace(CONFIG, max_position=1024)
Lengths = Sequence[int]


def slab_of(config: BlockConfig, dtype: torch.dtype, tokens: int) -> KvSlab:
    """Whoever reads what was not written computes NaN."""
    slab = KvSlab(config, tokens, dtype, CPU)
    slab.keys.fill_(math.nan)
    slab.values.fill_(math.nan)
    return slab


def scattered(lengths: Lengths, pieces: Sequence[int]) -> tuple[list[Extent], int]:
    """Room for so many tokens each, in so many runs each, the last pieces first; and how much all take."""
    runs: list[list[Run]] = [[] for _ in lengths]
    at = 3
    for piece in reversed(range(max(pieces))):
        for number, (length, count) in enumerate(zip(lengths, pieces, strict=True)):
            if piece < count:
                first, end = length * piece // count, length * (piece + 1) // count
                runs[number].insert(0, Run(first, at, end - first))
                at += end - first
    return [Extent(each) for each in runs], at


@torch.inference_mode()
def step(block: Block, slab: KvSlab, parts: Sequence[tuple[Extent, int, Tensor]]) -> list[Tensor]:
    """The rows of each (extent, position, x) in one forward."""
    segments = [Segment(extent, position, len(x)) for extent, position, x in parts]
    x = torch.cat([x for _, _, x in parts])
    block.check(x, slab, segments)
    layout = Layout(segments, CPU, slab.keys.dtype)
    rows = block.run(x, slab, layout, block.rotations_of(layout))
    for extent, position, x in parts:
        extent.length = position + len(x)
    return list(rows.split([len(x) for _, _, x in parts]))


CASES = {
    "like lengths": ([20, 21, 19, 23, 20], [1] * 5, 0),
    "ragged lengths": ([2, 300, 3, 41, 2, 260, 9, 700, 2], [1] * 9, 0),
    "several runs": ([30, 40, 20, 33, 28, 31], [1, 3, 1, 2, 1, 1], 0),
    "a window": ([30, 4, 20, 90, 25], [1, 1, 2, 3, 1], 7),
    "few": ([30, 40], [1, 2], 0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [False, True], ids=["decodes", "beside a chunk"])
@pytest.mark.parametrize("case", CASES)
def test_a_batch_computes_what_each_of_its_sequences_would_alone(case: str, chunk: bool, dtype: torch.dtype) -> None:
    lengths, pieces, window = CASES[case]
    config = dataclasses.replace(WIDE, sliding_window=window)
    block = Block(config, random_tensors(config), dtype=dtype)
    extents, tokens = scattered(lengths, pieces)
    slab = slab_of(config, dtype, tokens)
    texts = [torch.randn(n, 24, generator=torch.Generator().manual_seed(n)).to(dtype) for n in lengths]
    cuts = [len(text) - 1 for text in texts]
    if chunk:
        cuts[1] -= 1
    for extent, text, cut in zip(extents, texts, cuts, strict=True):
        step(block, slab, [(extent, 0, text[:cut])])
    parts = [(extent, cut, text[cut:]) for extent, text, cut in zip(extents, texts, cuts, strict=True)]
    tolerance = 1e-5 if dtype == torch.float32 else 64 * torch.finfo(dtype).eps
    for text, cut, got in zip(texts, cuts, step(block, slab, parts), strict=True):
        whole = block.forward(text, KvCache(config, len(text), dtype), 0)
        torch.testing.assert_close(got, whole[cut:], rtol=0, atol=tolerance)


def plan_of(lengths: Lengths, pieces: Sequence[int], chunk: int | None = None) -> tuple[Plan, int]:
    """For the last token of each, or the last two of sequence `chunk`; and how many tokens fit into a group."""
    extents, tokens = scattered(lengths, pieces)
    counts = [2 if number == chunk else 1 for number in range(len(lengths))]
    segments = [Segment(e, n - c, c) for e, n, c in zip(extents, lengths, counts, strict=True)]
    keys = torch.empty(8, tokens, 128, dtype=torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "SUPPORTED", frozenset())  # no groups are needed where rows are attended alone
        return Layout(segments, CPU, keys.dtype).plan(keys, 0), layouts.GROUP_BYTES_MAX // (4 * 8 * 128)


@given(st.lists(st.tuples(st.integers(3, 200), st.integers(1, 2)), min_size=1, max_size=40), st.integers(0, 80))
def test_groups_are_bounded_and_every_row_is_attended_once(sequences: list[tuple[int, int]], chunk: int) -> None:
    lengths = [length for length, _ in sequences]
    plan, tokens_max = plan_of(lengths, [pieces for _, pieces in sequences], chunk)
    given_rows: list[int] = []
    for group in plan.groups:
        count = len(group.mask) // 8
        rows = list(range(count)) if group.rows is None else group.rows.tolist()
        padding = int(group.mask.view(8, count, -1)[0].isinf().sum())
        assert len(group.tokens) <= tokens_max
        assert padding <= layouts.PADDING_MAX
        assert count >= layouts.GROUP_ROWS_MIN
        given_rows += rows
    given_rows += [row for read in plan.apart for row in range(read.row, read.row + read.count)]
    total = len(lengths) + (chunk < len(lengths))
    assert sorted(given_rows) == list(range(total))
    order = list(range(total)) if plan.order is None else plan.order.tolist()
    assert [given_rows[at] for at in order] == list(range(total))


def test_long_rows_stay_apart_and_short_ones_are_attended_together() -> None:
    plan, tokens_max = plan_of([10, 12, 65, 11, 9], [1] * 5)
    assert [read.row for read in plan.apart] == [2]
    assert tokens_max == 8 * 64
    assert [group.rows.tolist() for group in plan.groups if group.rows is not None] == [[0, 1, 3, 4]]
    plan, _ = plan_of([10, 12, 64, 9], [1] * 4)
    assert not plan.apart
    assert plan.order is plan.groups[0].rows is None


def test_rows_of_unlike_length_are_in_different_groups() -> None:
    plan, _ = plan_of([3, 60, 3, 61, 3, 60, 3, 60, 3, 3, 3], [1] * 11)
    rows = [group.rows.tolist() for group in plan.groups if group.rows is not None]
    assert (rows, plan.apart) == ([[0, 2, 4, 6, 8, 9, 10], [1, 3, 5, 7]], [])


@pytest.mark.usefixtures("without_kernels")
@pytest.mark.parametrize("kinds", [(4, 4, 16), (4, 2, 8)])
def test_scores_of_a_group_are_in_float32(kinds: tuple[int, int, int]) -> None:
    """Beside float64 a group is as near as the fused kernel: scores in bfloat16 would be ten times as far off."""
    nq, nk, width = kinds
    config = BlockConfig("llama", nq * width, 48, nq, nk, width, 1e-6, 1024, RopeConfig(1e4))
    lengths = [100, 101, 99, 100]
    extents, tokens = scattered(lengths, [1] * 4)
    slab = KvSlab(config, tokens, torch.bfloat16, CPU)
    generator = torch.Generator().manual_seed(0)
    slab.keys.copy_(4 * torch.randn(slab.keys.shape, generator=generator))
    slab.values.copy_(torch.randn(slab.values.shape, generator=generator))
    queries = (4 * torch.randn(nq, 4, width, generator=generator)).bfloat16()
    layout = Layout(
        [Segment(extent, n - 1, 1) for extent, n in zip(extents, lengths, strict=True)], CPU, torch.bfloat16
    )
    got = attend_batch(queries, slab, layout, 0).view(4, nq, width).double()
    assert layout.plan(slab.keys, 0).groups
    for row, (extent, length) in enumerate(zip(extents, lengths, strict=True)):
        ((at, _),) = extent.places(0, length)
        keys, values = (tensor[:, at : at + length].double() for tensor in (slab.keys, slab.values))
        exact = attend(queries[:, row : row + 1].double(), keys, values, 0)[:, 0]
        assert (got[row] - exact).abs().max() < 4 * torch.finfo(torch.bfloat16).eps


def test_a_segment_must_fit_its_extent() -> None:
    extents, _ = scattered([8], [2])
    assert extents[0].places(2, 7) == [(9, 2), (3, 3)]
    with pytest.raises(ValueError, match="do not fit"):
        Layout([Segment(extents[0], 0, 9)], CPU, torch.float32)
    with pytest.raises(ValueError, match="cached"):
        extents[0].truncate(1)
