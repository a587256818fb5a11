"""KV of many sequences in one block: a slab of tokens, and where one sequence lies in it.

Which tokens of a slab belong to whom is decided elsewhere (worker/kv_pages.py); a sequence lies in a few runs of
neighbouring tokens, most often one, so that attention can read views (layout.py says when it copies).

Invariant: a sequence reads only tokens that it wrote, or that it was handed as written (its `length` at its start). On
Linux a slab takes memory for what was written and not given back by `forget`, however large it is; elsewhere, and on a
GPU, for its whole capacity. Tokens lie so far apart that 64 of them, from a multiple of 64 on, share no page (of 4 KiB)
of the system's memory with others.
"""

from __future__ import annotations

import mmap
import sys
from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from models.config import BlockConfig
from models.precision import kv_head_bytes


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


Place = tuple[int, int]  # tokens [at, at + count) of a slab


class Kv(Protocol):
    """Keys and values [nk, capacity, hd] of one block, of one sequence or of many."""

    @property
    def keys(self) -> Tensor: ...

    @property
    def values(self) -> Tensor: ...


AnyKv = TypeVar("AnyKv", bound=Kv)


class Kvs(Generic[AnyKv]):
    """The caches of consecutive blocks, one for each, and `numbers`: where they lie, as csrc/blocks.c has it. All hold
    `capacity` tokens. Raises ValueError on keys and values that lie otherwise than each other's, or with gaps, and on
    caches that differ in precision or capacity. Tensors are not replaced later."""

    __slots__ = ("_kvs", "capacity", "numbers")

    def __init__(self, kvs: Sequence[AnyKv]) -> None:
        self._kvs, self.numbers = tuple(kvs), array("q")
        self.capacity = kvs[0].keys.shape[1] if kvs else 0
        for keys, values in ((kv.keys, kv.values) for kv in kvs):
            if keys.shape != values.shape or keys.stride() != values.stride() or keys.stride(2) != 1:
                raise ValueError("keys and values of a cache lie otherwise than each other's")
            if any((each.dtype, each.device) != (kvs[0].keys.dtype, kvs[0].keys.device) for each in (keys, values)):
                raise ValueError("caches differ in precision, or device")
            if keys.shape[1] != self.capacity:
                raise ValueError(f"caches of {keys.shape[1]} and {self.capacity} tokens")
            self.numbers.extend((keys.data_ptr(), values.data_ptr(), keys.stride(0), keys.stride(1)))

    def __len__(self) -> int:
        return len(self._kvs)

    def __iter__(self) -> Iterator[AnyKv]:
        return iter(self._kvs)

    def __getitem__(self, index: int) -> AnyKv:
        return self._kvs[index]


class KvSlab:
    """Keys and values [nk, capacity, hd] of one block, not cleared. `lazy`: memory is taken when it is written to."""

    __slots__ = ("_maps", "keys", "lazy", "values")

    def __init__(self, config: BlockConfig, capacity_tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (config.num_kv_heads, capacity_tokens, kv_head_bytes(config, dtype.itemsize) // dtype.itemsize)
        self.lazy = can_be_lazy(device)
        self._maps: list[mmap.mmap] = []
        self.keys = self._allocate(shape, dtype, device)[:, :, : config.head_dim]
        self.values = self._allocate(shape, dtype, device)[:, :, : config.head_dim]

    @property
    def token_bytes(self) -> int:
        return 2 * self.keys.shape[0] * self.keys.stride(1) * self.keys.element_size()

    def copy(self, source: int, target: int, count: int) -> None:
        """Copy `count` tokens from `source` on to `target`."""
        for tensor in (self.keys, self.values):
            tensor[:, target : target + count] = tensor[:, source : source + count]

    def forget(self, start: int, count: int) -> None:
        """Give the memory of tokens [start, start + count) back to the system, where that can be done: of each head,
        all pages of the system's that they fill."""
        for tensor, area in zip((self.keys, self.values), self._maps, strict=False):
            heads, capacity, _ = tensor.shape
            token_bytes = tensor.stride(1) * tensor.element_size()
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


class Extent:
    """Where one sequence lies in the slabs of its blocks: `runs`, and how many tokens are valid, `length`."""

    __slots__ = ("length", "runs")

    def __init__(self, runs: list[Run], length: int = 0) -> None:
        self.runs = runs
        self.length = length

    @property
    def capacity(self) -> int:
        last = self.runs[-1]
        return last.first + last.count

    def truncate(self, position: int) -> None:
        """Forget all tokens from `position` on. Raises ValueError when there are fewer than `position`."""
        if not 0 <= position <= self.length:
            raise ValueError(f"position {position} is outside the {self.length} tokens that are cached")
        self.length = position

    def places(self, start: int, end: int) -> list[Place]:
        """Where tokens [start, end) lie, in order. Raises ValueError when there is no room for them."""
        if end > self.capacity:
            raise ValueError(f"{end} tokens do not fit into a cache of {self.capacity}")
        found = []
        for run in self.runs:
            low, high = max(start, run.first), min(end, run.first + run.count)
            if low < high:
                found.append((run.at + low - run.first, high - low))
        return found


def can_be_lazy(device: torch.device) -> bool:
    """Whether a slab takes memory only where it is written to."""
    return device.type == "cpu" and sys.platform == "linux"
