"""The book of pages against a model of it: any order of sessions, keys, writes and evictions."""

from __future__ import annotations

import time
from collections.abc import Collection

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from protocol.errors import LocalProtocolError, Refused
from protocol.ids import PeerId
from protocol.limits import PAGE_TOKENS
from worker import kv_pages
from worker.free_runs import FreeRuns
from worker.kv_pages import KvBudget, PageBook, PageTable, pages_for

ANN, BEN = PeerId("ann"), PeerId("ben")
PAGES = 12


def keys(*names: str) -> tuple[bytes, ...]:
    return tuple(name.encode() for name in names)


class Books(RuleBasedStateMachine):
    """Two spans of one worker. What a page holds is modelled by its content: (tenant, key) where it is known."""

    @initialize()
    def begin(self) -> None:
        self.budget = KvBudget(PAGES * 2)
        self.books = [PageBook(self.budget, PAGES * 4, 1), PageBook(self.budget, PAGES * 4, 2)]
        self.reserved = 0
        self.open: list[tuple[PageBook, PageTable, int]] = []
        self.content: list[dict[int, object]] = [{}, {}]

    @rule(
        which=st.integers(0, 1),
        tenant=st.sampled_from([ANN, BEN]),
        tokens=st.integers(1, 6 * PAGE_TOKENS),
        names=st.lists(st.sampled_from("abcdefg"), max_size=6),
    )
    def session(self, which: int, tenant: PeerId, tokens: int, names: list[str]) -> None:
        book = self.books[which]
        needed = pages_for(tokens) * book.page_bytes
        if self.reserved + needed > self.budget.bytes_max:
            return  # what kv_pool.py refuses never comes here
        table = book.open(tenant, tokens, keys(*names))  # so this is never refused
        self.reserved += needed
        self.open.append((book, table, needed))
        assert len(table.pages) == pages_for(tokens)
        assert table.hits * PAGE_TOKENS < tokens, "something is left to compute"
        for page, name in zip(table.pages[: table.hits], names, strict=False):
            assert self.content[which][page] == (tenant, name.encode()), "a hit is the tenant's own"
        for page in table.pages[table.hits :]:
            assert page not in book._key_of, "a fresh page is nobody's"
            self.content[which].pop(page, None)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), name=st.sampled_from("abcdefg"))
    def keep(self, data: st.DataObject, name: str) -> None:
        book, table, _ = data.draw(st.sampled_from(self.open))
        index = data.draw(st.integers(0, len(table.pages) - 1))
        before = dict(book._kept)
        book.keep(table, index, name.encode())
        if book._kept != before:
            self.content[self.books.index(book)][table.pages[index]] = (table.tenant, name.encode())

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def write(self, data: st.DataObject) -> None:
        book, table, _ = data.draw(st.sampled_from(self.open))
        first, before = data.draw(st.integers(0, len(table.pages) - 1)), list(table.pages)
        copied = book.write(table, first)
        assert table.pages[:first] == before[:first]
        assert copied == (None if table.pages[first] == before[first] else (before[first], table.pages[first]))
        others = {page for other, each, _ in self.open if other is book and each is not table for page in each.pages}
        for page in table.pages[first:]:
            assert page not in others, "what is written to is the session's own"
            assert page not in book._key_of, "and no key finds it"
            self.content[self.books.index(book)].pop(page, None)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        chosen = data.draw(st.sampled_from(self.open))
        self.open.remove(chosen)
        book, table, needed = chosen
        self.reserved -= needed
        book.close(table)
        book.close(table)

    @invariant()
    def consistent(self) -> None:
        for which, book in enumerate(getattr(self, "books", [])):
            book.check([table for other, table, _ in self.open if other is book])
            for page in list(self.content[which]):
                if page not in book._key_of:
                    del self.content[which][page]


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=25, stateful_step_count=30, deadline=None, derandomize=True)


def test_a_prefix_is_found_by_its_tenant_alone() -> None:
    book = PageBook(KvBudget(PAGES), PAGES, 1)
    table = book.open(ANN, 3 * PAGE_TOKENS)
    for index, key in enumerate(keys("a", "b", "c")):
        book.keep(table, index, key)
    shared = book.open(ANN, 3 * PAGE_TOKENS, keys("a", "b", "x"))
    assert shared.hits == 2, "while the first session is still open"
    assert shared.pages[:2] == table.pages[:2]
    assert book.open(BEN, 3 * PAGE_TOKENS, keys("a", "b", "c")).hits == 0
    assert book.open(ANN, 3 * PAGE_TOKENS, keys("a", "b", "c")).hits == 2, "the last page is always computed"


def test_unused_pages_go_when_memory_is_needed_the_oldest_and_the_last_of_a_prefix_first() -> None:
    budget = KvBudget(6)
    one, other = PageBook(budget, 24, 1), PageBook(budget, 24, 1)
    for book, names in ((one, "abc"), (other, "def")):
        table = book.open(ANN, 3 * PAGE_TOKENS)
        for index, name in enumerate(names):
            book.keep(table, index, name.encode())
        book.close(table)
    assert (len(one.unused), len(other.unused)) == (3, 3)
    used = other.open(ANN, 2 * PAGE_TOKENS)
    assert (len(one.unused), len(other.unused)) == (1, 3), "the other span's are younger"
    again = one.open(ANN, 2 * PAGE_TOKENS, keys("a", "b"))
    assert again.hits == 1
    with pytest.raises(Refused, match="kv_memory"):
        other.open(BEN, 3 * PAGE_TOKENS)
    for book, table in ((one, again), (other, used)):
        book.close(table)
    one.open(ANN, 1)
    with pytest.raises(LocalProtocolError):
        one.retire()


def test_a_session_that_writes_into_a_shared_page_gets_its_own() -> None:
    book = PageBook(KvBudget(PAGES), PAGES, 1)
    first = book.open(ANN, 2 * PAGE_TOKENS)
    book.keep(first, 0, b"a")
    second = book.open(ANN, 2 * PAGE_TOKENS, keys("a"))
    shared = second.pages[0]
    assert book.write(second, 0) == (shared, second.pages[0])
    assert first.pages[0] == shared
    assert book.write(first, 0) is None, "nobody else uses it"
    assert book.open(ANN, 2 * PAGE_TOKENS, keys("a")).hits == 0, "and nobody will find it"


def test_free_runs_prefer_one_run_and_merge() -> None:
    free = FreeRuns([(0, 2), (4, 3), (10, 8)])
    assert free.take(3) == [4, 5, 6], "the shortest that is long enough"
    assert free.take(9) == [*range(10, 18), 0]
    free.put([11, 13])
    free.put([0, 12])
    free.put([])
    assert free.runs == [(0, 2), (11, 3)]
    with pytest.raises(LocalProtocolError):
        free.take(6)


def test_scattered_pages_are_taken_in_one_pass() -> None:
    free = FreeRuns([(3 * number, 1 + number % 2) for number in range(20_000)])
    started = time.perf_counter()
    assert len(free.take(25_000)) == 25_000
    assert time.perf_counter() - started < 2.0, "going through all runs for each of 15,000 takes many times that"
    assert free.pages == 5_000


def test_many_pages_go_at_the_price_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    budget, given = KvBudget(600), list[int]()
    books, put = [PageBook(budget, 2000, size) for size in (1, 2)], FreeRuns.put

    def counted(free: FreeRuns, pages: Collection[int]) -> None:
        given.append(len(pages))
        put(free, pages)

    monkeypatch.setattr(FreeRuns, "put", counted)
    names = keys(*(str(number // 2) for number in range(100)))  # every second page is kept
    tables = [book.open(ANN, 100 * PAGE_TOKENS) for book in books]
    for book, table in zip(books, tables, strict=True):
        book.keep(table, 0, *names)
        book.close(table)
    assert [len(book.unused) for book in books] == [50, 50]
    younger = list(books[1].unused)
    given.clear()
    table = books[0].open(BEN, 510 * PAGE_TOKENS)
    assert [count for count in given if count] == [50, 5], "50 pages of 1 byte, then 5 of 2: the oldest"
    assert list(books[1].unused) == younger[5:]
    assert not books[0].unused
    given.clear()
    books[0].close(table)
    assert [count for count in given if count] == [510]


def test_a_write_to_many_shared_pages_takes_new_ones_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    book, taken, take = PageBook(KvBudget(99), 99, 1), list[int](), FreeRuns.take
    monkeypatch.setattr(FreeRuns, "take", lambda free, count: taken.append(count) or take(free, count))
    one = book.open(ANN, 9 * PAGE_TOKENS)
    book.keep(one, 0, *keys(*"abcdefgh"))
    other = book.open(ANN, 9 * PAGE_TOKENS, keys(*"abcdefgh"))
    taken.clear()
    assert book.write(other, 2) == (one.pages[2], other.pages[2])
    assert taken == [6]
    assert other.pages[:2] == one.pages[:2]
    book.check([one, other])


def test_a_page_that_a_session_uses_twice_becomes_its_own_once() -> None:
    book = PageBook(KvBudget(3), 9, 1)
    first = book.open(ANN, 2 * PAGE_TOKENS)
    book.keep(first, 0, b"a")
    book.close(first)
    twice = book.open(ANN, 3 * PAGE_TOKENS, keys("a", "a"))
    page = twice.pages[0]
    assert twice.pages[1] == page
    assert book.write(twice, 0) == (page, twice.pages[0]), "within what it reserved"
    assert twice.pages[1] == page
    book.check([twice])


def test_so_many_pages_have_names_and_the_oldest_lose_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_pages, "NAMED_PAGES_MAX", 5)
    book = PageBook(KvBudget(PAGES * 2), PAGES * 8, 1)
    first = book.open(ANN, 3 * PAGE_TOKENS)
    book.keep(first, 0, *keys("a", "b", "c"))
    book.close(first)
    second = book.open(ANN, 4 * PAGE_TOKENS)
    book.keep(second, 0, *keys("d", "e", "f", "g"))
    assert len(book.unused) == 1, "two of the three had to go"
    book.check([second])
    third = book.open(ANN, 4 * PAGE_TOKENS, keys("a"))
    assert third.hits == 1, "the last of a prefix go first"
    book.keep(third, 1, *keys("h", "i"))
    assert len(book._kept) == 5, "sessions use all that have names: the others get none"
    book.check([second, third])
    for table in (second, third):
        book.close(table)
    assert len(book.unused) == 5
    again = book.open(ANN, 2 * PAGE_TOKENS)
    book.keep(again, 0, *[key for _, key in book._kept][:2])
    assert len(book.unused) == 5, "names that are there already ask nobody to go"
    book.check([again])


def test_a_span_that_goes_tells_of_pages_that_were_lost(caplog: pytest.LogCaptureFixture) -> None:
    def book() -> tuple[PageBook, PageTable]:
        book = PageBook(KvBudget(99), 9, 1)
        table = book.open(ANN, 3 * PAGE_TOKENS)
        book.keep(table, 0, b"a")
        return book, table

    sound, table = book()
    sound.close(table)
    sound.retire()
    assert not caplog.records

    leaking, table = book()
    table.pages.pop()
    leaking._users.popitem()
    leaking.close(table)
    leaking.retire()
    assert [(record.message, record.free) for record in caplog.records] == [  # type: ignore[attr-defined]
        ("the book of a span's pages was wrong", 8)
    ]
