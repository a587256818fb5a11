"""Weights into huge pages, in the background.

A token reads every weight once, and with pages of 4 KiB looking up where they lie takes 4 to 7 % of that. Most systems
give huge pages only to who asks; asking before memory is written to could make a load wait for room to be made, page by
page. So loaded weights are moved, 2 MiB at a time, while they are already in use.

The thread that does it belongs to nobody: no work waits for it, whoever loads weights may use it, and what it has not
done when the process ends is lost without harm. It keeps weights in memory while it moves one page of them.
"""

from __future__ import annotations

import ctypes
import queue
import sys
import threading
import weakref
from functools import cache

HUGE_BYTES = 2 << 20
_COLLAPSE = 25  # MADV_COLLAPSE: Linux 6.1 and later
_Weights = tuple["weakref.ref[object]", range]  # whose they are, and where their pages begin


def move(owner: object, address: int, nbytes: int) -> None:
    """Soon, the whole huge pages in `nbytes` from `address` on, which belong to `owner`. Nothing where that cannot be:
    a weight that stays is only slower."""
    first = -(-address // HUGE_BYTES) * HUGE_BYTES
    if sys.platform == "linux" and first + HUGE_BYTES <= address + nbytes:
        _waiting().put((weakref.ref(owner), range(first, address + nbytes - HUGE_BYTES + 1, HUGE_BYTES)))


@cache
def _waiting() -> queue.SimpleQueue[_Weights]:
    """What waits for the one thread that moves, which lives as long as the process."""
    waiting: queue.SimpleQueue[_Weights] = queue.SimpleQueue()
    threading.Thread(target=_move_all, args=(waiting,), name="huge-pages", daemon=True).start()
    return waiting


def _move_all(waiting: queue.SimpleQueue[_Weights]) -> None:
    madvise = ctypes.CDLL(None).madvise

    def moves(weights: weakref.ref[object], address: int) -> bool:
        owner = weights()  # until this returns
        return owner is not None and madvise(ctypes.c_void_p(address), ctypes.c_size_t(HUGE_BYTES), _COLLAPSE) == 0

    while True:
        weights, addresses = waiting.get()
        for address in addresses:
            if not moves(weights, address):
                break  # gone; no room now, or a kernel that cannot: it is not asked for the rest of a weight
