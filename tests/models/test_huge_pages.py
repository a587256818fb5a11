"""Weights move into huge pages while they are used, and only whole ones."""

from __future__ import annotations

import ctypes
import errno
import gc
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
def waiting(monkeypatch: pytest.MonkeyPatch) -> SimpleQueue[tuple[object, range]]:
    found: SimpleQueue[tuple[object, range]] = SimpleQueue()
    monkeypatch.setattr(huge_pages, "_waiting", lambda: found)
    monkeypatch.setattr(sys, "platform", "linux")
    return found


@pytest.mark.parametrize(
    ("first", "end", "pages"),
    [(0, 1, [1]), (0, 3, [1, 2, 3]), (1, 1, []), (-1, 2, [1, 2]), (5, 3, [2, 3])],
    ids=["one", "three", "a byte short of one", "begun before", "begun after"],
)
def test_whole_huge_pages_are_asked_for(
    waiting: SimpleQueue[tuple[object, range]], first: int, end: int, pages: list[int]
) -> None:
    start = HUGE_BYTES + first
    move(self := object(), start, (end + 1) * HUGE_BYTES - start)
    assert waiting.qsize() == bool(pages)
    if pages:
        assert waiting.get() == (self, range(pages[0] * HUGE_BYTES, pages[-1] * HUGE_BYTES + 1, HUGE_BYTES))


def test_no_other_system_is_asked(waiting: SimpleQueue[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    move(object(), HUGE_BYTES, HUGE_BYTES)
    assert waiting.empty()


def moved(
    monkeypatch: pytest.MonkeyPatch, answers: Callable[[int], int]
) -> Callable[[list[tuple[object, Iterable[int]]]], None]:
    """Runs the thread over some weights, until it waits for more. `answers`: what the system says to a page."""

    class Library:
        def __init__(self, *_: object) -> None:
            pass

        def madvise(self, address: Any, _: object, __: object) -> int:
            return answers(address.value)

    monkeypatch.setattr(huge_pages.ctypes, "CDLL", Library)

    def run(work: list[tuple[object, Iterable[int]]]) -> None:
        waiting: SimpleQueue[tuple[object, Any]] = SimpleQueue()
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

    moved(monkeypatch, answers)([(None, range(10, 13)), (None, range(19, 25)), (None, range(40, 45)), (None, [50])])
    assert asked == [10, 11, 12, 19, 20, 40, 50]


def test_who_owns_it_is_kept_no_longer_than_that(monkeypatch: pytest.MonkeyPatch) -> None:
    owner = Owner()
    gone, alive = weakref.ref(owner), []

    def answers(_: int) -> int:
        alive.append(gone() is not None)
        return 0

    work: list[tuple[object, Iterable[int]]] = [(owner, range(2))]
    del owner
    run = moved(monkeypatch, answers)
    run(work)
    assert alive == [True, True]
    work.clear()
    gc.collect()
    assert gone() is None


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
