"""KV of many sequences in one block: a slab of tokens, and one sequence's way through it.

Which tokens of a slab belong to whom is decided elsewhere (worker/kv_pages.py); a sequence lies in a few runs of
neighbouring tokens, most often one, so that attention reads views and copies nothing.

Invariant: a sequence reads only tokens that it wrote, or that it was handed as written (`length` at its start). On
Linux a slab takes memory for what was written and not given back by `forget`, however large it is; elsewhere, and on a
GPU, for its whole capacity.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from models.config import BlockConfig


@dataclass(frozen=True, slots=True)
class Run:
    """Tokens [first, first + count) of a sequence lie at [at, at + count) of each slab."""

    first: int
    at: int
    count: int


def runs_of(pages: Sequence[int], page_tokens: int) -> list[Run]:
    """The runs of a sequence whose tokens fill `pages` in this order."""
    runs: list[Run] = []
    start = 0
    for end in range(1, len(pages) + 1):
        if end == len(pages) or pages[end] != pages[end - 1] + 1:
            runs.append(Run(start * page_tokens, pages[start] * page_tokens, (end - start) * page_tokens))
            start = end
    return runs


class KvSlab:
    """Keys and values [nk, capacity, hd] of one block, not cleared. `lazy`: memory is taken when it is written to."""

    __slots__ = ("_maps", "keys", "lazy", "values")

    def __init__(self, config: BlockConfig, capacity_tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (config.num_kv_heads, capacity_tokens, config.head_dim)
        self.lazy = can_be_lazy(device)
        self._maps: list[mmap.mmap] = []
        self.keys, self.values = self._allocate(shape, dtype, device), self._allocate(shape, dtype, device)

    @property
    def token_bytes(self) -> int:
        return 2 * self.keys.shape[0] * self.keys.shape[2] * self.keys.element_size()

    def copy(self, source: int, target: int, count: int) -> None:
        """Copy `count` tokens from `source` on to `target`."""
        for tensor in (self.keys, self.values):
            tensor[:, target : target + count] = tensor[:, source : source + count]

    def forget(self, start: int, count: int) -> None:
        """Give the memory of tokens [start, start + count) back to the system, where that can be done."""
        for tensor, area in zip((self.keys, self.values), self._maps, strict=False):
            heads, capacity, width = tensor.shape
            token_bytes = width * tensor.element_size()
            for head in range(heads):
                first = (head * capacity + start) * token_bytes
                low = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
                high = (first + count * token_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
                if low < high:
                    area.madvise(mmap.MADV_DONTNEED, low, high - low)

    def _allocate(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        if not self.lazy:
            return torch.empty(shape, dtype=dtype, device=device)
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        try:
            area = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise MemoryError(f"no address space for {nbytes} bytes of KV") from error
        with suppress(OSError):  # a kernel without huge pages
            area.madvise(mmap.MADV_NOHUGEPAGE)  # one token of each head would take 2 MiB where they are on for all
        self._maps.append(area)
        return torch.frombuffer(area, dtype=dtype).view(shape)


class PagedKv:
    """One sequence in one block's slab. `runs` is shared by all blocks of the sequence and may change between steps."""

    __slots__ = ("_length", "_runs", "_slab")

    def __init__(self, slab: KvSlab, runs: list[Run], length: int) -> None:
        self._slab = slab
        self._runs = runs
        self._length = length

    @property
    def capacity(self) -> int:
        last = self._runs[-1]
        return last.first + last.count

    @property
    def length(self) -> int:
        """Tokens that are valid, from position 0."""
        return self._length

    @property
    def dtype(self) -> torch.dtype:
        return self._slab.keys.dtype

    def fits(self, config: BlockConfig) -> bool:
        """Whether it was made for blocks of this shape."""
        heads, _, width = self._slab.keys.shape
        return (heads, width) == (config.num_kv_heads, config.head_dim)

    def truncate(self, position: int) -> None:
        """Forget all tokens from `position` on. Raises ValueError when there are fewer than `position`."""
        if not 0 <= position <= self._length:
            raise ValueError(f"position {position} is outside the {self._length} tokens that are cached")
        self._length = position

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add keys and values [nk, T, hd]. Raises ValueError when they do not fit."""
        start, end = self._length, self._length + keys.shape[1]
        if end > self.capacity:
            raise ValueError(f"{end} tokens do not fit into a cache of {self.capacity}")
        for run in self._runs:
            low, high = max(start, run.first), min(end, run.first + run.count)
            if low < high:
                here, whole = slice(run.at + low - run.first, run.at + high - run.first), high - low == end - start
                self._slab.keys[:, here] = keys if whole else keys[:, low - start : high - start]
                self._slab.values[:, here] = values if whole else values[:, low - start : high - start]
        self._length = end

    def read(self, start: int) -> list[tuple[Tensor, Tensor]]:
        """Views of the keys and values [nk, n, hd] from `start` on, one pair for each run, in order."""
        parts = []
        for run in self._runs:
            low, high = max(start, run.first), min(self._length, run.first + run.count)
            if low < high:
                here = slice(run.at + low - run.first, run.at + high - run.first)
                parts.append((self._slab.keys[:, here], self._slab.values[:, here]))
        return parts


def can_be_lazy(device: torch.device) -> bool:
    """Whether a slab takes memory only where it is written to."""
    return device.type == "cpu" and sys.platform == "linux"
