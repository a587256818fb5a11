"""Weights move into huge pages while they are used, and only whole ones."""

from __future__ import annotations

import ctypes
import errno
import mmap
import sys
import threading
import weakref
from collections.abc import Callable, Iterable
from queue import SimpleQueue
from typing import Any

import pytest

from models import huge_pages
from models.huge_pages import HUGE_BYTES, move


class Owner:
    """Of memory that is to be moved."""


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> SimpleQueue[Any]:
    found: SimpleQueue[Any] = SimpleQueue()
    monkeypatch.setattr(huge_pages, "_waiting", lambda: found)
    monkeypatch.setattr(sys, "platform", "linux")
    return found


@pytest.mark.parametrize(
    ("first", "end", "pages"),
    [(0, 1, [1]), (0, 3, [1, 2, 3]), (1, 1, []), (-1, 2, [1, 2]), (5, 3, [2, 3])],
    ids=["one", "three", "a byte short of one", "begun before", "begun after"],
)
def test_whole_huge_pages_are_asked_for(waiting: SimpleQueue[Any], first: int, end: int, pages: list[int]) -> None:
    start = HUGE_BYTES + first
    move(owner := Owner(), start, (end + 1) * HUGE_BYTES - start)
    assert waiting.qsize() == bool(pages)
    if pages:
        assert waiting.get() == (
            weakref.ref(owner),
            range(pages[0] * HUGE_BYTES, pages[-1] * HUGE_BYTES + 1, HUGE_BYTES),
        )


def test_no_other_system_is_asked(waiting: SimpleQueue[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    move(object(), HUGE_BYTES, HUGE_BYTES)
    assert waiting.empty()


def moved(
    monkeypatch: pytest.MonkeyPatch, answers: Callable[[int], int]
) -> Callable[[list[tuple[Callable[[], object], Iterable[int]]]], None]:
    """Runs the thread over some weights, until it waits for more. `answers`: what the system says to a page."""

    class Library:
        def __init__(self, *_: object) -> None:
            pass

        def madvise(self, address: Any, _: object, __: object) -> int:
            return answers(address.value)

    monkeypatch.setattr(huge_pages.ctypes, "CDLL", Library)

    def run(work: list[tuple[Callable[[], object], Iterable[int]]]) -> None:
        waiting: SimpleQueue[Any] = SimpleQueue()
        thread = threading.Thread(target=huge_pages._move_all, args=(waiting,), daemon=True)
        for each in work:
            waiting.put(each)
        done = threading.Event()
        waiting.put((None, Last(done)))
        thread.start()
        assert done.wait(20)

    return run


class Last:
    """Nothing to move, and a word that it was its turn."""

    def __init__(self, done: threading.Event) -> None:
        self.done = done

    def __iter__(self) -> Any:
        self.done.set()
        return iter(())


def test_a_weight_that_cannot_be_moved_is_left_and_the_next_one_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by a kernel that can move none: who waits for nothing would keep weights that are gone in memory."""
    asked: list[int] = []

    def answers(address: int) -> int:
        asked.append(address)
        return -1 if address in (20, 40) else 0

    owner = weakref.ref(kept := Owner())
    pages = [range(10, 13), range(19, 25), range(40, 45), range(50, 51)]
    moved(monkeypatch, answers)([(owner, each) for each in pages])
    assert asked == [10, 11, 12, 19, 20, 40, 50]
    assert owner() is kept


def test_weights_that_are_gone_are_kept_for_one_page_and_not_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    owners, asked, alive = [Owner(), Owner()], list[int](), list[bool]()
    weak = [weakref.ref(each) for each in owners]

    def answers(address: int) -> int:
        if address == 11:
            owners.clear()  # its span is unloaded
        asked.append(address)
        alive.append(weak[0]() is not None)
        return 0

    moved(monkeypatch, answers)([(weak[0], range(10, 15)), (weak[1], range(20, 25))])
    assert (asked, alive) == ([10, 11], [True, True])
    assert [each() for each in weak] == [None, None]


@pytest.mark.skipif(sys.platform != "linux", reason="pages of Linux")
def test_the_system_takes_the_advice_or_says_why_not() -> None:
    area = mmap.mmap(-1, 4 * HUGE_BYTES)
    area.write(b"\1" * len(area))
    library = ctypes.CDLL(None, use_errno=True)
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    first = -(-address // HUGE_BYTES) * HUGE_BYTES
    answer = library.madvise(ctypes.c_void_p(first), ctypes.c_size_t(HUGE_BYTES), huge_pages._COLLAPSE)
    assert answer == 0 or ctypes.get_errno() in (errno.EINVAL, errno.ENOMEM, errno.EAGAIN, errno.EBUSY)
    assert set(area[:]) == {1}
