"""The memory of a span's KV: what the system holds for it is what the books say, whatever its shape."""

from __future__ import annotations

import ctypes
import dataclasses
import mmap
import sys

import pytest
import torch

from models.pages import KvSlab
from protocol.ids import PeerId
from protocol.limits import PAGE_TOKENS
from tests.helpers.engines import CONFIG
from worker.kv_pages import KvBudget
from worker.span_kv import SessionKv, SpanKv

CPU = torch.device("cpu")
PAGES = 64


def span_of(width: int, dtype: torch.dtype) -> SpanKv:
    """Two blocks of two heads, and a budget of PAGES pages."""
    configs = [dataclasses.replace(CONFIG, head_dim=width)] * 2
    page_bytes = SpanKv(configs, dtype, CPU, KvBudget(0)).book.page_bytes
    return SpanKv(configs, dtype, CPU, KvBudget(PAGES * page_bytes))


def filled(kv: SpanKv, pages: int) -> SessionKv:
    """A session of so many pages, all of them written to."""
    session = kv.open(PeerId("ann"), pages * PAGE_TOKENS)
    for slab in session.slabs:
        for at, count in session.extent.places(0, pages * PAGE_TOKENS):
            slab.keys[:, at : at + count] = slab.values[:, at : at + count] = 1
    return session


def resident_bytes(kv: SpanKv) -> int:
    """What the system holds for the span's slabs."""
    libc, total = ctypes.CDLL(None, use_errno=True), 0
    for slab in kv._slabs:
        for tensor in (slab.keys, slab.values):
            size = tensor.shape[0] * tensor.stride(0) * tensor.element_size()
            pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
            assert not libc.mincore(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(size), pages)
            total += mmap.PAGESIZE * sum(page & 1 for page in pages)
    return total


@pytest.mark.skipif(sys.platform != "linux" or mmap.PAGESIZE != 4096, reason="of Linux with pages of 4 KiB")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [2, 12, 40, 64, 80, 100, 128])
def test_free_pages_go_back_whole_whoever_is_beside_them(width: int, dtype: torch.dtype) -> None:
    kv = span_of(width, dtype)
    pairs = [(filled(kv, 1), filled(kv, 15)) for _ in range(PAGES // 16)]
    assert resident_bytes(kv) == kv.book.used_bytes == PAGES * kv.book.page_bytes
    for _, long in pairs:
        long.close(())
        kv.give_back(PAGES * kv.book.page_bytes)
        assert resident_bytes(kv) == kv.book.used_bytes
    for _ in range(3):  # they find no hole that is large enough, and lie elsewhere
        filled(kv, 16)
    assert resident_bytes(kv) == kv.book.used_bytes == (PAGES - 12) * kv.book.page_bytes
    for short, _ in pairs:
        short.close(())
        kv.give_back(1)
        assert resident_bytes(kv) == kv.book.used_bytes


@pytest.mark.parametrize("width", [2, 80])
def test_pages_of_a_session_are_views_and_share_no_number_with_others(width: int) -> None:
    kv = span_of(width, torch.bfloat16)
    first, second = filled(kv, 3), filled(kv, 2)
    slab: KvSlab = kv._slabs[0]
    assert slab.keys.shape[2] == slab.values.shape[2] == width
    ((at, count),) = second.extent.places(0, 2 * PAGE_TOKENS)
    slab.keys[:, at : at + count] = 2
    ((at, count),) = first.extent.places(0, 3 * PAGE_TOKENS)
    assert (slab.keys[:, at : at + count] == 1).all()


def test_what_a_step_takes_for_the_first_time_is_the_pages_that_it_begins() -> None:
    kv = span_of(8, torch.float32)
    keys = (b"k" * 16, b"l" * 16)
    first = kv.open(PeerId("ann"), 200, keys)
    pages = [first.begun_bytes(*step) for step in ((0, 1), (1, 63), (64, 1), (60, 4), (60, 5), (1, 130), (0, 200))]
    assert [size // kv.book.page_bytes for size in pages] == [1, 0, 1, 0, 1, 2, 4]
    first.begin(0)
    first.commit(130)
    second = kv.open(PeerId("ann"), 200, keys)
    pages = [second.begun_bytes(*step) for step in ((128, 1), (70, 1), (0, 65))]
    assert [size // kv.book.page_bytes for size in pages] == [1, 1, 2], "a shared page is copied"
