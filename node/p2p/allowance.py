"""What a peer may still ask of this node: so much a second, and a burst after it was quiet."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
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
