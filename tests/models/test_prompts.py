"""Attention of many rows of one sequence beside the same in float64, and what a row's bits do not depend on."""

from __future__ import annotations

from array import array
from typing import Any

import pytest
import torch

from models import attention, kernels
from models.attention import attend, attend_batch
from models.config import BlockConfig, RopeConfig
from models.kernels import Seen, attended_together
from models.layout import Layout, Segment
from models.pages import Extent, KvSlab, Run

pytestmark = pytest.mark.skipif("float32" not in kernels.SUPPORTED, reason="this processor has no kernels")
FLOATS = [dtype for dtype in (torch.float32, torch.bfloat16) if str(dtype)[6:] in kernels.SUPPORTED]
HEADS = [(1, 1, 2), (4, 2, 16), (3, 1, 24), (9, 1, 30), (12, 4, 64), (6, 2, 80), (20, 2, 128), (2, 1, 512)]


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


class Sequence:
    """A cache of 800 tokens, of which `runs` (first, count) hold one sequence's from token `start` on."""

    def __init__(self, heads: tuple[int, int, int], dtype: torch.dtype, *runs: tuple[int, int], start: int = 0) -> None:
        queries, keys, width = heads
        self.start, self.length = start, sum(count for _, count in runs)
        whole = random(keys, self.length, width, dtype=dtype), random(keys, self.length, width + 2, dtype=dtype)
        self.own = whole[0], whole[1][:, :, :width]
        self.queries = 2 * random(queries, self.length, width, dtype=dtype)
        self.keys, self.values = (torch.full((keys, 800, width), torch.nan, dtype=dtype) for _ in range(2))
        self.places, done = array("q"), 0
        for first, count in runs:
            self.places.extend((first, count))
            for cache, own in zip((self.keys, self.values), self.own, strict=True):
                cache[:, first : first + count] = own[:, done : done + count]
            done += count

    def last(self, count: int, window: int = 0, beside: int = 0) -> torch.Tensor:
        """What the last `count` rows get, with so many other rows before and after theirs."""
        others = random(self.queries.shape[0], beside, self.queries.shape[2], dtype=self.queries.dtype)
        queries = torch.cat([others, self.queries[:, self.length - count :], others], dim=1)
        seen = Seen(self.places, self.start, self.length, window)
        return attended_together(queries, self.keys, self.values, range(beside, beside + count), seen)

    def exact(self, count: int, window: int = 0) -> torch.Tensor:
        keys, values = (each.double() for each in self.own)
        return attend(self.queries[:, self.length - count :].double(), keys, values, window).transpose(0, 1)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize(
    ("count", "length", "start", "window"),
    [(1, 1, 0, 0), (64, 64, 0, 0), (65, 65, 0, 0), (7, 70, 0, 0), (140, 200, 0, 0), (129, 129, 0, 1),
     (30, 60, 63, 31), (70, 133, 129, 64), (200, 200, 0, 90)],
)  # fmt: skip
def test_many_rows_get_what_the_formula_says(
    heads: tuple[int, int, int], dtype: torch.dtype, count: int, length: int, start: int, window: int
) -> None:
    """Memory around the sequence's own is not numbers."""
    sequence = Sequence(heads, dtype, (3, length // 3), (400, length - length // 3), start=start)
    got, exact = sequence.last(count, window), sequence.exact(count, window)
    roundings = 8 + heads[2] / 32  # of a score, which is summed in order
    assert (got.double() - exact).abs().max() < roundings * torch.finfo(dtype).eps * sequence.own[1].abs().max()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("window", [0, 50])
def test_bits_depend_on_what_a_row_sees_alone(
    window: int, dtype: torch.dtype, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads, length = (10, 1, 24), 300
    whole = Sequence(heads, dtype, (0, length)).last(length, window)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    moved = Sequence(heads, dtype, (500, 1), (7, 62), (600, 130), (300, length - 193))
    assert torch.equal(moved.last(length, window), whole), "where keys lie"
    assert torch.equal(moved.last(77, window, beside=5), whole[-77:]), "what is computed with it"
    for end in (64, 101, 130):
        shorter = Sequence(heads, dtype, (0, length))
        shorter.length, shorter.places = end, array("q", (0, end))
        cut = 9 if window else end
        first = max(0, end - cut - window + 1) if window else 0  # what no row sees need not be there
        shorter.start, shorter.length, shorter.places = first, end - first, array("q", (first, end - first))
        shorter.queries = shorter.queries[:, first:end]
        assert torch.equal(shorter.last(cut, window), whole[end - cut : end]), "how a prompt is cut"


@pytest.mark.parametrize("dtype", FLOATS)
def test_scores_far_apart_are_weighed_from_the_largest(dtype: torch.dtype) -> None:
    """In another tile than what came before, which fades to nothing; and before what comes, which adds nothing."""
    keys, values = torch.zeros(1, 130, 16, dtype=dtype), random(1, 130, 16, dtype=dtype)
    keys[0, :, 0], keys[0, 100, 0] = -1000.0, 1000.0
    queries = torch.zeros(1, 30, 16, dtype=dtype)
    queries[0, :, 0] = 4.0
    got = attended_together(queries, keys, values, range(30), Seen(array("q", (0, 130)), 0, 130, 0))
    assert torch.equal(got, values[0, 100].expand(30, 1, 16))


def test_a_score_that_is_no_number_is_not_hidden() -> None:
    sequence = Sequence((2, 1, 16), torch.float32, (0, 200))
    sequence.keys[0, 70, 3] = torch.nan
    got = sequence.last(200)
    assert got[70:].isnan().all()
    assert got[:70].isfinite().all()


@pytest.mark.parametrize("transposed", [False, True])
def test_prompts_of_a_batch_go_to_the_kernel(transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the queries lie: torch's rotation leaves them as products give them."""
    calls: list[range] = []

    def counted(*given: Any) -> torch.Tensor:
        calls.append(given[3])
        return attended_together(*given)

    monkeypatch.setattr(attention, "attended_together", counted)
    config = BlockConfig("llama", 64, 48, 4, 2, 16, 1e-6, 1024, RopeConfig(1e4))
    slab = KvSlab(config, 512, torch.float32, torch.device("cpu"))
    slab.keys.copy_(random(*slab.keys.shape))
    slab.values.copy_(random(*slab.values.shape))
    queries = random(59, 4, 16).transpose(0, 1) if transposed else random(4, 59, 16)
    segments = [Segment(Extent([Run(0, 100, 64)], 20), 20, 18), Segment(Extent([Run(0, 10, 20)], 19), 19, 1)]
    segments.append(Segment(Extent([Run(0, 200, 30), Run(30, 300, 60)], 45), 45, 40))
    for window in (0, 13):
        got, row = attend_batch(queries, slab, Layout(segments, torch.device("cpu"), torch.float32), window), 0
        for segment in segments:
            places = segment.extent.places(0, segment.position + segment.count)
            own = [torch.cat([kv[:, at : at + n] for at, n in places], 1).double() for kv in (slab.keys, slab.values)]
            exact = attend(queries[:, row : row + segment.count].double(), own[0], own[1], window).transpose(0, 1)
            mine = got[row : row + segment.count].double()
            torch.testing.assert_close(mine, exact.reshape(segment.count, -1), rtol=0, atol=1e-5)
            row += segment.count
    assert calls == [range(18), range(19, 59)] * 2


def test_what_does_not_fit_is_refused() -> None:
    queries, keys, places = random(2, 9, 16), random(1, 20, 16), array("q", (0, 20))
    for wrong in (random(1, 20, 32)[:, :, ::2], random(1, 20, 8), random(1, 20, 16, dtype=torch.float64)):
        with pytest.raises(ValueError, match="lie otherwise"):
            attended_together(queries, wrong, wrong, range(9), Seen(places, 0, 20, 0))
    for rows, other in ((range(10), places), (range(0, 9, 2), places), (range(9), array("i", places))):
        with pytest.raises(ValueError, match="written otherwise"):
            attended_together(queries, keys, keys, rows, Seen(other, 0, 20, 0))
    with pytest.raises(ValueError, match="places of 20 tokens"):
        attended_together(queries, keys, keys, range(9), Seen(places, 0, 21, 0))
    with pytest.raises(ValueError, match="queries lie otherwise"):
        attended_together(random(9, 2, 16).transpose(0, 1), keys, keys, range(9), Seen(places, 0, 20, 0))
    wide = random(2, 9, 514)
    for given, cache, window in ((queries, keys, -1), (random(3, 9, 16), random(2, 20, 16), 0), (wide, wide[:1], 0)):
        own = Seen(array("q", (0, cache.shape[1])), 0, cache.shape[1], window)
        with pytest.raises(ValueError, match="no such attention"):
            attended_together(given, cache, cache, range(9), own)
    short = Seen(array("q", (0, 5)), 0, 5, 0)
    with pytest.raises(ValueError, match="no such attention"):
        attended_together(queries, keys, keys, range(9), short)
