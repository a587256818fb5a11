"""The KV of one loaded span: its slabs and its book of pages, and each session's way through them.

Invariant: a session writes only to pages that it shares with nobody and that no key names, and what it leaves under a
key was computed by all blocks. Synchronous; the engine's thread calls it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from models.config import BlockConfig
from models.pages import Extent, Kvs, KvSlab, can_be_lazy, runs_of
from models.precision import counted_kv_bytes
from protocol import limits
from protocol.ids import PeerId
from worker.kv_pages import KvBudget, PageBook, PageTable, pages_for

# Slabs are so much longer than the budget, where length costs nothing: then nearly every session finds one free run.
SLACK = 4


class SpanKv:
    """Pages for sessions over blocks of `configs`, within `budget`."""

    def __init__(
        self, configs: Sequence[BlockConfig], dtype: torch.dtype, device: torch.device, budget: KvBudget
    ) -> None:
        self._configs, self._dtype, self._device = tuple(configs), dtype, device
        self.token_bytes = sum(counted_kv_bytes(config, dtype.itemsize) for config in configs)
        page_bytes = limits.PAGE_TOKENS * self.token_bytes
        pages = budget.bytes_max // page_bytes * (SLACK if can_be_lazy(device) else 1)
        self.book = PageBook(budget, pages, page_bytes)
        self._slabs: Kvs[KvSlab] = Kvs(())

    def open(self, tenant: PeerId, tokens: int, keys: Sequence[bytes] = ()) -> SessionKv:
        """Room for `tokens` tokens. Raises Refused(KV_MEMORY), MemoryError."""
        if not self._slabs:
            capacity = self.book.pages * limits.PAGE_TOKENS
            slabs = [KvSlab(config, capacity, self._dtype, self._device) for config in self._configs]
            self._slabs = Kvs(slabs)
        return SessionKv(self.book, self._slabs, self.book.open(tenant, tokens, keys), (tokens, tuple(keys)))

    def close(self) -> None:
        """The span goes; no session is open. Its memory is there until `give_back` has nothing left to do."""
        self.book.retire()

    def give_back(self, wanted_bytes: int) -> int:
        """Give free pages' memory back to the system, in whole pages: so much, or all that there is. Says how much."""
        pages = self.book.take_stale(-(-wanted_bytes // self.book.page_bytes))
        for run in runs_of(pages, limits.PAGE_TOKENS):
            for slab in self._slabs:
                slab.forget(run.at, run.count)
        return len(pages) * self.book.page_bytes


class SessionKv:
    """One session's KV, at most `kv_tokens` long; `length` tokens are there in all blocks, `held` of them from the
    start. It lies at `extent` in each of `slabs`, which all sessions of the span share, one for each block."""

    def __init__(
        self, book: PageBook, slabs: Kvs[KvSlab], table: PageTable, terms: tuple[int, tuple[bytes, ...]]
    ) -> None:
        self.kv_tokens, self._keys = terms
        self._book, self.slabs, self.table = book, slabs, table
        self._began = False  # before, a step below `held` computes again what other hops do not hold
        self._shut = table.hits  # so many pages, the first ones, are shared or named by keys
        self.held = table.hits * limits.PAGE_TOKENS
        self.extent = Extent(runs_of(table.pages, limits.PAGE_TOKENS), self.held)

    @property
    def length(self) -> int:
        return self.extent.length

    def begun_bytes(self, position: int, count: int) -> int:
        """Memory of the pages that a step of `count` tokens at `position` is the first to write to, or has copied."""
        first = position // limits.PAGE_TOKENS
        before = first if first < self._shut else pages_for(position)
        return (pages_for(position + count) - before) * self._book.page_bytes

    def begin(self, position: int) -> None:
        """A step is about to write from `position` <= `length` on. Raises Refused(KV_MEMORY) for a session that wrote
        into pages it shares, when no page is left; never for others."""
        first = position // limits.PAGE_TOKENS
        if self._began and position < self.length:  # the keys stand for what was there, and not for what comes now
            self._keys = self._keys[:first]
        self.extent.truncate(position)
        if first >= self._shut:
            return
        copied = self._book.write(self.table, first)
        self._shut = first
        self.extent.runs = runs_of(self.table.pages, limits.PAGE_TOKENS)
        if copied is not None:
            old, new = (page * limits.PAGE_TOKENS for page in copied)
            for slab in self.slabs:
                slab.copy(old, new, position % limits.PAGE_TOKENS)

    def commit(self, length: int) -> None:
        """All blocks have computed the tokens below `length`."""
        self.extent.length, self._began = length, True
        self._keep(self._keys)

    def forget_keys(self) -> None:
        """What is full from now on was computed over another route, and the keys do not stand for it."""
        self._keys = ()

    def close(self, keys: Sequence[bytes]) -> None:
        """The session is over; its full pages stay under `keys` for as long as there is room."""
        self._keep(keys)
        self._book.close(self.table)

    def _keep(self, keys: Sequence[bytes]) -> None:
        full = min(self.length // limits.PAGE_TOKENS, len(keys))
        if self._shut < full:
            self._book.keep(self.table, self._shut, *keys[self._shut : full])
            self._shut = full
