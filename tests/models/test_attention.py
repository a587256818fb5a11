"""Long sequences: what attention copies of their keys and values is bounded, and what it gives is the same."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from models import attention
from models.attention import attend, attend_batch
from models.config import BlockConfig, RopeConfig
from models.layout import Layout, Segment
from models.pages import Extent, KvSlab, Run

pytestmark = pytest.mark.usefixtures("in_both_ways")

CPU = torch.device("cpu")
HEADS, KV_HEADS, WIDTH, TOKENS, ROWS = 8, 4, 16, 700, 9
CONFIG = BlockConfig("llama", 128, 48, HEADS, KV_HEADS, WIDTH, 1e-6, 1024, RopeConfig(1e4))
ONE_RUN, RUNS = [Run(0, 50, TOKENS)], [Run(0, 900, 256), Run(256, 5, 100), Run(356, 300, TOKENS - 356)]


def sequence(runs: list[Run], dtype: torch.dtype) -> tuple[KvSlab, Extent, Tensor, Tensor]:
    """A slab with one sequence in it, no numbers elsewhere; its keys and values [nk, TOKENS, hd]."""
    generator = torch.Generator().manual_seed(0)
    slab = KvSlab(CONFIG, 1200, dtype, CPU)
    keys, values = (torch.randn(KV_HEADS, TOKENS, WIDTH, generator=generator).to(dtype) for _ in range(2))
    slab.keys.fill_(math.nan)
    slab.values.fill_(math.nan)
    for run in runs:
        slab.keys[:, run.at : run.at + run.count] = 3 * keys[:, run.first : run.first + run.count]
        slab.values[:, run.at : run.at + run.count] = values[:, run.first : run.first + run.count]
    return slab, Extent(runs, TOKENS), 3 * keys, values


@contextmanager
def copies() -> Iterator[list[int]]:
    """Bytes of each copy of more tokens than there are rows: keys and values joined, or in another dtype."""
    sizes: list[int] = []
    cat, to = torch.cat, Tensor.to

    def watched_cat(tensors: Any, dim: int = 0) -> Tensor:
        joined = cat(tensors, dim=dim)
        if dim == 1:
            sizes.append(2 * joined.nbytes)
        return joined

    def watched_to(tensor: Tensor, *rest: Any, **named: Any) -> Tensor:
        other = to(tensor, *rest, **named)
        if other is not tensor and tensor.dim() == 3 and tensor.shape[-1] == WIDTH and tensor.shape[1] > 2 * ROWS:
            sizes.append(other.nbytes)
        return other

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "cat", watched_cat)
        patch.setattr(Tensor, "to", watched_to)
        yield sizes


@pytest.mark.usefixtures("in_both_ways")
@pytest.mark.parametrize("runs", [ONE_RUN, RUNS], ids=["one run", "runs"])
@pytest.mark.parametrize("window", [0, 7, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, ROWS])
def test_copies_of_a_long_sequence_are_bounded(
    count: int, dtype: torch.dtype, window: int, runs: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    slab, extent, keys, values = sequence(runs, dtype)
    queries = torch.randn(HEADS, count, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    layout = Layout([Segment(extent, TOKENS - count, count)], CPU, dtype)
    exact = attend(queries.double(), keys.double(), values.double(), window).transpose(0, 1).reshape(count, -1)
    whole = attend_batch(queries, slab, layout, window)
    head_bytes = 2 * TOKENS * WIDTH * dtype.itemsize
    for most in (4 * head_bytes, 3 * head_bytes, head_bytes, head_bytes // 4, 4096):
        monkeypatch.setattr(attention, "COPIED_BYTES_MAX", most)
        with copies() as sizes:
            got = attend_batch(queries, slab, layout, window)
        assert max(sizes, default=0) <= most
        tolerance = 1e-5 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=tolerance)
        if most >= head_bytes and count > 1:
            assert torch.equal(got, whole), "heads are computed as they were"
        if most >= 4 * head_bytes:
            assert torch.equal(got, whole)
