"""The long run without atheris: edits from a random source, one target, one process, for some seconds.

It notices what a target does not declare, an input that takes longer than INPUT_S_MAX, and memory that grows after the
first quarter of the time. Coverage does not guide it; with atheris it does (tests/fuzz/__main__.py).
"""

from __future__ import annotations

import gc
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil

from tests.fuzz.edits import apply, random_edit
from tests.fuzz.targets import Target

INPUT_S_MAX = 2.0
GROWTH_BYTES_MAX = 32 << 20  # allocators keep some of what was freed; a leak of 100 bytes an input is far above it
_EDITS_MAX = 6


class Hang(BaseException):
    """Not an Exception: no parser may catch it."""


@dataclass(slots=True)
class Report:
    target: str
    seed: int
    inputs: int = 0
    taken: int = 0  # the others were refused, as declared
    seconds: float = 0.0
    slowest_ms: float = 0.0
    rss_warm_bytes: int = 0
    rss_end_bytes: int = 0
    failure: str = ""
    failing_input: str = ""  # in hexadecimal


def run(name: str, target: Target, seconds: float, seed: int, clock: Callable[[], float] = time.monotonic) -> Report:
    """Feed `target` until the time is over or something is found."""
    report, source = Report(name, seed), random.Random(f"{seed}/{name}")
    process, started = psutil.Process(), clock()
    with _alarms():
        while (now := clock()) - started < seconds and not report.failure:
            if not report.rss_warm_bytes and now - started > seconds / 4:
                gc.collect()
                report.rss_warm_bytes = process.memory_info().rss
            start = source.choice(target.corpus)
            edits = [random_edit(source) for _ in range(source.randrange(_EDITS_MAX))]
            _feed(target, apply(start, edits, target.corpus), report)
    gc.collect()
    report.rss_end_bytes = process.memory_info().rss
    report.seconds = clock() - started
    grown = report.rss_end_bytes - report.rss_warm_bytes
    if not report.failure and report.rss_warm_bytes and grown > GROWTH_BYTES_MAX:
        report.failure = f"memory grew by {grown} bytes after a quarter of the time"
    return report


def _feed(target: Target, data: bytes, report: Report) -> None:
    started = time.perf_counter()
    signal.setitimer(signal.ITIMER_REAL, INPUT_S_MAX)
    try:
        report.taken += target(data)
    except (Exception, Hang) as error:
        report.failure, report.failing_input = f"{type(error).__name__}: {error}", data.hex()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    report.inputs += 1
    report.slowest_ms = max(report.slowest_ms, 1000 * (time.perf_counter() - started))


@contextmanager
def _alarms() -> Iterator[None]:
    def ring(*_: object) -> None:
        raise Hang(f"an input took longer than {INPUT_S_MAX} s")

    before = signal.signal(signal.SIGALRM, ring)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)
