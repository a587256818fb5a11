"""Whether the owner's own programs need this machine: processor load by others and free memory, with hysteresis.

`Pressure` is pure: samples in, a decision out. It begins after the machine was short for BEGIN_S without a break and
ends after it was at ease for END_S, so that neither a compile of a few seconds nor a pause within a game flips it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import psutil

SAMPLE_S = 2.0
BEGIN_S, END_S = 10.0, 60.0
BUSY_ABOVE, BUSY_BELOW = 0.60, 0.35  # share of all cores that other processes use
FREE_BELOW, FREE_ABOVE = 0.08, 0.15  # share that is available of the memory beside this process's own


@dataclass(frozen=True, slots=True)
class Sample:
    """`others_busy`: cores that other processes use, as a share of all. `memory_free`: what they leave of the memory
    that this process has not taken, as a share of that: large beside a model that fills the machine but for what they
    need, and small where they need more, for then the machine swaps."""

    others_busy: float
    memory_free: float


@dataclass(slots=True)
class Pressure:
    """`yielding` is the decision after the last `feed`."""

    yielding: bool = False
    _since: float | None = None  # when the samples began to say the opposite of `yielding`

    def feed(self, sample: Sample, now: float) -> bool:
        """The decision at `now` (monotonic seconds)."""
        short = sample.others_busy > BUSY_ABOVE or sample.memory_free < FREE_BELOW
        at_ease = sample.others_busy < BUSY_BELOW and sample.memory_free > FREE_ABOVE
        if not (at_ease if self.yielding else short):
            self._since = None
            return self.yielding
        self._since = now if self._since is None else self._since
        if now - self._since >= (END_S if self.yielding else BEGIN_S):
            self.yielding, self._since = not self.yielding, None
        return self.yielding


class Probe:
    """Measures between one `sample` and the next. The first one after it was made says little about the processor."""

    def __init__(self) -> None:
        self._process = psutil.Process(os.getpid())
        self._cores = psutil.cpu_count() or 1
        self.sample()

    def sample(self) -> Sample:
        """Takes about a millisecond."""
        total = psutil.cpu_percent() / 100
        own = self._process.cpu_percent() / 100 / self._cores
        memory, taken = psutil.virtual_memory(), self._process.memory_info()
        # Pages of files, which Linux counts as shared, are available though they are mapped here.
        kept = max(0, taken.rss - getattr(taken, "shared", 0))
        beside = max(memory.available, memory.total - kept, 1)
        return Sample(max(0.0, total - own), memory.available / beside)
