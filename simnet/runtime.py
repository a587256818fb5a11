"""Deterministic trio: one seed, one schedule, virtual time.

MockClock alone gives another interleaving at each run; with trio's scheduler ordering tasks by age and shuffling them
from a seeded source, the same seed gives the same run in every process. The two attributes of trio that this needs are
private and live in this module alone; `run` fails loudly when trio no longer has them.

What still breaks determinism: iterating over a set of strings (PYTHONHASHSEED), and threads, which let virtual time
jump.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import TypeVar

import trio
import trio.testing

T = TypeVar("T")

EPOCH_S = 1_700_000_000.0  # Unix time at virtual zero: adverts and tickets carry plausible times
_SWITCH, _SOURCE = "_ALLOW_DETERMINISTIC_SCHEDULING", "_r"


def run(main: Callable[[], Awaitable[T]], seed: int) -> T:
    """`trio.run(main)` in virtual time, which jumps to the next deadline whenever every task waits."""
    with _deterministic_scheduling(seed):
        return trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


@contextmanager
def _deterministic_scheduling(seed: int) -> Iterator[None]:
    scheduler = importlib.import_module("trio._core._run")
    if not all(hasattr(scheduler, name) for name in (_SWITCH, _SOURCE)):
        raise RuntimeError(f"trio {version('trio')} has no {_SWITCH} or {_SOURCE}: simulations would not repeat")
    before = {name: getattr(scheduler, name) for name in (_SWITCH, _SOURCE)}
    setattr(scheduler, _SWITCH, True)
    setattr(scheduler, _SOURCE, random.Random(seed))
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(scheduler, name, value)


class VirtualClock:
    """protocol.ports.Clock in virtual time. `skew_s` is how far this node's wall clock is ahead."""

    def __init__(self, skew_s: float = 0.0) -> None:
        self.skew_s = skew_s

    def time(self) -> float:
        return EPOCH_S + self.skew_s + trio.current_time()

    def monotonic(self) -> float:
        return trio.current_time()


class SeededEntropy:
    """protocol.ports.Entropy: the same bytes for the same seed and name. Nothing here is secret."""

    def __init__(self, seed: int, name: str = "") -> None:
        self._random = random.Random(f"{seed}/{name}")

    def __call__(self, n: int) -> bytes:
        return self._random.randbytes(n)
