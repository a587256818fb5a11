"""What a peer may still ask of this node, and all together: so much a second, and a burst after it was quiet."""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from math import inf
from typing import TypeVar

import trio

Peer = TypeVar("Peer")
PEERS_REMEMBERED = 4096  # of each kind of allowance; the connection limit is below it


@dataclass(slots=True)
class Allowance:
    """What is left of it, `rate` a second up to `burst`."""

    rate: float
    burst: float
    left: float
    at: float

    def refill(self, now: float) -> float:
        self.left, self.at = min(self.burst, self.left + (now - self.at) * self.rate), now
        return self.left


def allowance_of(allowances: OrderedDict[Peer, Allowance], peer: Peer, rate: float, burst: float) -> Allowance:
    """The allowance of `peer`; those that were used least recently are forgotten."""
    allowance = allowances.setdefault(peer, Allowance(rate, burst, burst, trio.current_time()))
    allowances.move_to_end(peer)
    if len(allowances) > PEERS_REMEMBERED:
        allowances.popitem(last=False)
    return allowance


@dataclass(slots=True)
class Shared:
    """What all sources together may have, `rate` a second up to `burst`. Half of `burst` is for anybody. The less is
    left of the other half, the fewer a source must have had lately, beside the one that had most: so those that flood
    have what others leave, in equal parts, however much they ask for."""

    rate: float
    burst: float
    at: float
    _all: Allowance = field(init=False)
    _had: Counter[str] = field(default_factory=Counter, init=False)  # by source, since `at`...
    _before: Counter[str] = field(default_factory=Counter, init=False)  # ...and in as long a time before it

    def __post_init__(self) -> None:
        self._all = Allowance(self.rate, self.burst, self.burst, self.at)

    def take(self, source: str, now: float) -> bool:
        """One for `source`; False when there is none for it now."""
        window_s = self.burst / self.rate
        if now - self.at >= window_s:
            self._before = self._had if now - self.at < 2 * window_s else Counter()
            self._had, self.at = Counter(), now
        if self._all.refill(now) < 1 or self._had[source] + self._before[source] > self._most():
            return False
        self._all.left -= 1
        self._had[source] += 1
        return True

    def _most(self) -> float:
        """How many a source may have had lately."""
        part = 2 * self._all.left / self.burst
        if part >= 1:
            return inf
        return part * max((self._had[each] + self._before[each] for each in self._had | self._before), default=0)
