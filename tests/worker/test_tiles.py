"""Tiles: the same bits however a sequence is cut, in memory that does not grow with heads times tokens."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from models import attention
from models.attention import attend, attend_tile
from models.blocks import TILE_ROWS
from models.int8 import quantise_block
from models.layout import Layout, Segment
from models.pages import Extent, KvSlab, Run
from models.precision import INT8, compute_dtype
from protocol.ids import PeerId
from tests.helpers.engines import CONFIG, inputs, random_tensors
from worker.kv_pages import KvBudget
from worker.runner import FloatBlocks, Part, build_float_blocks, tile_rows_left
from worker.span_kv import SessionKv, SpanKv

CPU = torch.device("cpu")
TOKENS = 90


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def tile(heads: int, kv_heads: int, width: int, tokens: int, window: int) -> tuple[Tensor, Tensor]:
    """The last tile of so many tokens, which lie in two runs, and what it ought to be."""
    config = dataclasses.replace(
        CONFIG, num_heads=heads, num_kv_heads=kv_heads, head_dim=width, max_position=2 * tokens
    )
    slab = KvSlab(config, 2 * tokens, torch.float32, CPU)
    slab.keys.fill_(math.nan)
    slab.values.fill_(math.nan)
    half = tokens // 2
    extent = Extent([Run(0, tokens, half), Run(half, 5, tokens - half)], tokens)
    queries, keys, values = (
        noise(heads, TILE_ROWS, width),
        noise(kv_heads, tokens, width),
        noise(kv_heads, tokens, width),
    )
    first = max(0, tokens - TILE_ROWS + 1 - window) if window else 0
    for at in range(first, tokens):  # what no query may see is no number
        place = extent.places(at, at + 1)[0][0]
        slab.keys[:, place], slab.values[:, place] = keys[:, at], values[:, at]
    layout = Layout([Segment(extent, tokens - 3, 3)], CPU, torch.float32)
    expected = attend(queries, keys, values, window).transpose(0, 1).reshape(TILE_ROWS, -1)
    return attend_tile(queries, slab, layout, window), expected


@pytest.mark.parametrize("most", [100, 700, 5000, 1 << 22])
@pytest.mark.parametrize("window", [0, 1, 7, 40, 200])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 1), (6, 2), (4, 4)])
def test_a_tile_is_attention_in_however_many_parts(
    heads: int, kv_heads: int, window: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "TILE_NUMBERS", most)
    got, expected = tile(heads, kv_heads, 8, 96, window)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "tokens", "window"),
    [(1024, 1, 2, 2048, 0), (512, 512, 2, 2048, 0), (16, 1, 2, 40_000, 1), (2, 2, 512, 10_000, 0)],
)
def test_no_part_is_larger_than_it_may_be(
    heads: int, kv_heads: int, width: int, tokens: int, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def watched(name: str) -> None:
        plain = getattr(torch, name)

        def call(*given: Any, **named: Any) -> Tensor:
            result: Tensor = plain(*given, **named)
            sizes.append(result.numel())
            return result

        monkeypatch.setattr(torch, name, call)

    for name in ("bmm", "cat", "softmax"):
        watched(name)
    got, expected = tile(heads, kv_heads, width, tokens, window)
    assert max(sizes) <= attention.TILE_NUMBERS
    assert not window or sum(sizes) < 100_000, "the window alone is read"
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


class Span:
    """Two blocks of `window`, and sessions over them."""

    def __init__(self, window: int, precision: str = "float32") -> None:
        configs = [dataclasses.replace(CONFIG, sliding_window=window)] * 2
        dtype = getattr(torch, compute_dtype(precision))
        read = (lambda index: quantise_block(random_tensors(index))) if precision == INT8 else random_tensors
        self.blocks: FloatBlocks = build_float_blocks(configs, read, dtype, CPU)
        self.kv = SpanKv(configs, dtype, CPU, KvBudget(1 << 24))

    def open(self) -> SessionKv:
        return self.kv.open(PeerId("ann"), 200)

    def rows(self, session: SessionKv, x: Tensor, start: int, end: int) -> Tensor:
        parts = []
        while start < end:
            count = min(tile_rows_left(start), end - start)
            parts.append(self.blocks.forward_tile(x[start : start + count], Part(session, start, count)))
            start += count
        return torch.cat(parts)


@pytest.mark.usefixtures("in_both_ways")
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_bits_do_not_depend_on_cuts_in_any_precision(precision: str) -> None:
    span, generator = Span(0, precision), random.Random(0)
    x = inputs(TOKENS).to(span.blocks.dtype)
    whole = span.rows(span.open(), x, 0, TOKENS)
    for _ in range(3):
        session, at = span.open(), 0
        while at < TOKENS:
            end = min(at + generator.choice([1, 1, 2, 5, 16, 40]), TOKENS)
            assert torch.equal(span.rows(session, x, at, end), whole[at:end])
            at = end


@pytest.mark.parametrize("most", [100, 1500, 1 << 22])
@pytest.mark.parametrize("window", [0, 1, 20, 64])
def test_bits_do_not_depend_on_cuts(window: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "TILE_NUMBERS", most)
    span, x, generator = Span(window), inputs(TOKENS), random.Random(window)
    session = span.open()
    whole = span.rows(session, x, 0, TOKENS)
    plain = span.open()
    expected = span.blocks.forward(x, [Part(plain, 0, TOKENS)])
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-4)
    for _ in range(3):
        session, at = span.open(), 0
        while at < TOKENS:
            end, back = min(at + generator.choice([1, 1, 2, 5, 16, 40]), TOKENS), generator.choice([0, min(3, at)])
            assert torch.equal(span.rows(session, x, at - back, end), whole[at - back : end])
            at = end
