"""Pages of KV: who uses which, and which are kept for later under a key. Bookkeeping only; models/pages.py has tensors.

A page holds PAGE_TOKENS tokens of one sequence in all blocks of a span. Sessions take all their pages when they open.
A full page may be kept under a key, which its tenant chose and which stands for the page's tokens and all before them:
later sessions of this tenant that name the key share the page instead of computing it. What no session uses stays until
its memory is needed, least recently used first.

Strangers choose how small pages are, and which of them are free. So that no call is long all the same, pages go many at
a time, and those that keys name are bounded in number.

Invariant: a page is free, used by one session or more, or kept unused. One that two sessions use, or that a key names,
is never written to. All books together hold no more than their budget. What is reserved for sessions is not counted
here (kv_pool.py): as sessions never use more pages than they reserved, room is found by giving up unused pages alone.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from heapq import merge
from itertools import islice, pairwise, repeat

from protocol import limits
from protocol.errors import LocalProtocolError, Refused
from protocol.ids import PeerId
from protocol.messages import RefusalReason
from worker.free_runs import FreeRuns

# Of one span: two million tokens. At a microsecond or so a page, to give up those of all spans takes a quarter second.
NAMED_PAGES_MAX = 1 << 15

log = logging.getLogger("sotto.worker")

Kept = tuple[PeerId, bytes]  # a tenant and its key


def pages_for(tokens: int) -> int:
    """How many pages `tokens` tokens take."""
    return -(-tokens // limits.PAGE_TOKENS)


@dataclass(slots=True, eq=False)
class PageTable:
    """One session's pages, in the order of its tokens; the first `hits` were kept by earlier sessions."""

    tenant: PeerId
    pages: list[int]
    hits: int


@dataclass(slots=True, eq=False)
class KvBudget:
    """Bytes that the pages of all books may take together."""

    bytes_max: int
    books: list[PageBook] = field(default_factory=list)
    turn: int = 0  # rises with each use: which unused page is the oldest, over all books

    @property
    def used_bytes(self) -> int:
        return sum(book.used_bytes for book in self.books)

    def make_room(self, wanted_bytes: int) -> None:
        """Give up unused pages until `wanted_bytes` fit. Raises Refused(KV_MEMORY) when they cannot."""
        missing = self.used_bytes + wanted_bytes - self.bytes_max
        if missing <= 0:
            return
        going: Counter[int] = Counter()  # how many, by the book's number
        for _, number in merge(*(zip(book.unused.values(), repeat(number)) for number, book in enumerate(self.books))):
            going[number] += 1
            missing -= self.books[number].page_bytes
            if missing <= 0:
                break
        for number, count in going.items():
            self.books[number].give_up(count)
        if missing > 0:
            raise Refused(RefusalReason.KV_MEMORY, f"{missing} bytes of KV are missing")


class PageBook:
    """The pages of one span: `pages` of them, of `page_bytes` each. `stale` ones are free, and were written to since
    their memory was given back."""

    def __init__(self, budget: KvBudget, pages: int, page_bytes: int) -> None:
        self.page_bytes = page_bytes
        self._budget = budget
        self.pages = pages
        self._free = FreeRuns([(0, pages)])
        self.stale: dict[int, None] = {}  # in the order in which they became free
        self._users: Counter[int] = Counter()
        self._kept: dict[Kept, int] = {}
        self._key_of: dict[int, Kept] = {}
        self.unused: OrderedDict[int, int] = OrderedDict()  # page: turn of its last use; oldest first
        budget.books.append(self)

    @property
    def used_bytes(self) -> int:
        """Of pages that sessions use or that are kept."""
        return (len(self._users) + len(self.unused)) * self.page_bytes

    def open(self, tenant: PeerId, tokens: int, keys: Sequence[bytes] = ()) -> PageTable:
        """Pages for a session of `tokens` tokens, beginning with those that `tenant` has kept under the first of
        `keys`; the page of the last token is never one of them, so that there is something to compute. Raises
        Refused(KV_MEMORY), and then nothing changed but that unused pages may have gone."""
        count, table = pages_for(tokens), PageTable(tenant, [], 0)
        for key in keys[: (tokens - 1) // limits.PAGE_TOKENS]:
            page = self._kept.get((tenant, key))
            if page is None:
                break
            self._use(page)
            table.pages.append(page)
        table.hits = len(table.pages)
        try:
            table.pages.extend(self._fresh(count - table.hits))
        except Refused:
            self.close(table)
            raise
        return table

    def keep(self, table: PageTable, first: int, *keys: bytes) -> None:
        """The session's pages from number `first` on are full: keep them under `keys`, if there is room for names. The
        first page of a key stays; a page has one."""
        new = sum((table.tenant, key) not in self._kept for key in keys)
        self.give_up(min(len(self.unused), len(self._kept) + new - NAMED_PAGES_MAX))
        for page, key in zip(table.pages[first:], keys, strict=False):
            kept = table.tenant, key
            if kept not in self._kept and page not in self._key_of and len(self._kept) < NAMED_PAGES_MAX:
                self._kept[kept] = page
                self._key_of[page] = kept

    def write(self, table: PageTable, first: int) -> tuple[int, int] | None:
        """The session is about to write to its pages from number `first` on: make them its own.

        When page `first` had to be replaced: (old, new), to copy what is before the first token written. Raises
        Refused(KV_MEMORY), which a session that keeps to its reservation never meets.
        """
        shared: list[int] = []
        left: Counter[int] = Counter()  # a session that names one key twice may use a page twice
        for index in range(first, len(table.pages)):
            page = table.pages[index]
            if self._users[page] - left[page] > 1:
                shared.append(index)
                left[page] += 1
        fresh = dict(zip(shared, self._fresh(len(shared)), strict=True)) if shared else {}
        copied = (table.pages[first], fresh[first]) if first in fresh else None
        for index in range(first, len(table.pages)):
            page = table.pages[index]
            if index in fresh:
                table.pages[index] = fresh[index]
                of_no_use = self._leave(page)
                assert not of_no_use, "others use it"
            else:
                self._forget_key(page)
        return copied

    def close(self, table: PageTable) -> None:
        """The session is over. Idempotent."""
        left = table.pages[::-1]  # the last first: a page is of no use without those before it, so it goes before them
        table.pages.clear()
        self._free_all([page for page in left if self._leave(page)])

    def give_up(self, count: int) -> None:
        """Free the `count` pages that were unused for longest; none if it is less than 1."""
        pages = [self.unused.popitem(last=False)[0] for _ in range(count)]
        for page in pages:
            self._forget_key(page)
        self._free_all(pages)

    def take_stale(self, most: int) -> list[int]:
        """Up to `most` stale pages in order, whose memory the caller gives back now."""
        taken = sorted(islice(self.stale, most))
        for page in taken:
            del self.stale[page]
        return taken

    def retire(self) -> None:
        """The span goes: leave the budget, and free all pages. Raises LocalProtocolError while a session uses one; says
        so in the log when a page was lost, or freed twice, in all the time before."""
        if self._users:
            raise LocalProtocolError("pages are in use")
        self._budget.books.remove(self)
        self.give_up(len(self.unused))
        if self._free.runs != [(0, self.pages)] or self._kept or self._key_of:
            log.error("the book of a span's pages was wrong", extra={"pages": self.pages, "free": self._free.pages})

    def check(self, tables: Iterable[PageTable]) -> None:
        """Raises AssertionError unless all is consistent; `tables` are those of all open sessions.

        For tests: at 10,000 pages it takes 8 ms, too long between two forwards. `retire` finds what came of a fault.
        """
        users = Counter(page for table in tables for page in table.pages)
        free = [page for start, count in self._free.runs for page in range(start, start + count)]
        assert users == self._users, "every use is one table's"
        assert sorted([*free, *users, *self.unused]) == list(range(self.pages)), "a page is one of the three"
        assert self._kept == {kept: page for page, kept in self._key_of.items()}, "keys and pages agree"
        assert len(self._kept) <= NAMED_PAGES_MAX, "keys are bounded"
        assert self.unused.keys() == self._key_of.keys() - users.keys(), "what nobody uses has a key"
        assert list(self.unused.values()) == sorted(self.unused.values()), "the oldest is first"
        assert self.stale.keys() <= set(free), "only free pages wait for their memory to be given back"
        ends = [(start, start + count) for start, count in self._free.runs]
        assert all(end < start for (_, end), (start, _) in pairwise(ends)), "free runs are merged"
        assert self._budget.used_bytes <= self._budget.bytes_max, "within the budget"

    def _fresh(self, count: int) -> list[int]:
        self._budget.make_room(count * self.page_bytes)
        pages = self._free.take(count)
        self._users.update(pages)
        for page in pages:
            self.stale.pop(page, None)
        return pages

    def _use(self, page: int) -> None:
        self._users[page] += 1
        self.unused.pop(page, None)

    def _leave(self, page: int) -> bool:
        """One user less; True when the page is of no use any more."""
        self._users[page] -= 1
        if self._users[page]:
            return False
        del self._users[page]
        if page not in self._key_of:
            return True
        self._budget.turn += 1
        self.unused[page] = self._budget.turn
        return False

    def _forget_key(self, page: int) -> None:
        kept = self._key_of.pop(page, None)
        if kept is not None:
            del self._kept[kept]

    def _free_all(self, pages: list[int]) -> None:
        self._free.put(pages)
        self.stale.update(dict.fromkeys(pages))
