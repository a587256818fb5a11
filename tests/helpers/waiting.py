"""Waiting for other processes. Between two looks this one sleeps, since they need the processor."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def until(condition: Callable[[], T], what: str, within_s: float = 60.0, every_s: float = 0.05) -> T:
    """What `condition` gives as soon as it is true. Fails with `what` was waited for."""
    deadline = time.monotonic() + within_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {within_s:g} s: {what}"
        time.sleep(every_s)
    return found
