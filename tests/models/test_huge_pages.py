"""Weights move into huge pages while they are used, and only whole ones."""

from __future__ import annotations

import gc
import mmap
import sys
import threading
import weakref
from collections.abc import Callable
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
) -> Callable[[list[tuple[object, range]]], bool]:
    """Runs the thread over some weights; whether it still waits for more. `answers`: the error of a page, or 0."""
    errors = [0]

    class Library:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def madvise(self, address: Any, _: object, __: object) -> int:
            errors[0] = answers(address.value)
            return -1 if errors[0] else 0

    monkeypatch.setattr(huge_pages.ctypes, "CDLL", Library)
    monkeypatch.setattr(huge_pages.ctypes, "get_errno", lambda: errors[0])

    def run(work: list[tuple[object, range]]) -> bool:
        waiting: SimpleQueue[tuple[object, range]] = SimpleQueue()
        thread = threading.Thread(target=huge_pages._move_all, args=(waiting,), daemon=True)
        for each in work:
            waiting.put(each)
        done = threading.Event()
        waiting.put((None, Last(done)))  # type: ignore[arg-type]
        thread.start()
        while thread.is_alive() and not done.wait(0.01):
            pass
        return done.is_set()

    return run


class Last:
    """Nothing to move, and a word that it was its turn."""

    def __init__(self, done: threading.Event) -> None:
        self.done = done

    def __iter__(self) -> Any:
        self.done.set()
        return iter(())


def test_a_weight_without_room_is_left_and_a_kernel_that_cannot_is_not_asked_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []

    def answers(address: int) -> int:
        asked.append(address)
        return {20: huge_pages.errno.ENOMEM, 40: huge_pages.errno.EINVAL}.get(address, 0)

    run = moved(monkeypatch, answers)
    assert run([(None, range(10, 13)), (None, range(19, 25)), (None, range(30, 32))])
    assert asked == [10, 11, 12, 19, 20, 30, 31]
    assert not run([(None, range(40, 45)), (None, range(50, 52))])
    assert asked[7:] == [40]


def test_who_owns_it_is_kept_no_longer_than_that(monkeypatch: pytest.MonkeyPatch) -> None:
    owner = Owner()
    gone, alive = weakref.ref(owner), []

    def answers(_: int) -> int:
        alive.append(gone() is not None)
        return 0

    work = [(owner, range(2))]
    del owner
    run = moved(monkeypatch, answers)
    taken, work = work, []
    assert run(taken)
    assert alive == [True, True]
    taken.clear()
    gc.collect()
    assert gone() is None


@pytest.mark.skipif(sys.platform != "linux", reason="pages of Linux")
def test_the_system_takes_the_advice_or_says_why_not() -> None:
    area = mmap.mmap(-1, 4 * HUGE_BYTES)
    area.write(b"\1" * len(area))
    library = huge_pages.ctypes.CDLL(None, use_errno=True)
    address = huge_pages.ctypes.addressof(huge_pages.ctypes.c_char.from_buffer(area))
    first = -(-address // HUGE_BYTES) * HUGE_BYTES
    answer = library.madvise(
        huge_pages.ctypes.c_void_p(first), huge_pages.ctypes.c_size_t(HUGE_BYTES), huge_pages._COLLAPSE
    )
    assert answer == 0 or huge_pages.ctypes.get_errno() in (
        huge_pages.errno.EINVAL, huge_pages.errno.ENOMEM, huge_pages.errno.EAGAIN, huge_pages.errno.EBUSY,
    )  # fmt: skip
    assert set(area[:]) == {1}
