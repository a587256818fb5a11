"""How fast a peer's messages are taken from its streams, whatever they say.

A message of 30 bytes costs 20 to 200 us of the event loop, and a peer may send them as fast as its line carries, for
sessions that do not exist. Invariant: a stream's messages hold the loop for YIELD_EVERY of them at a time, counted from
its last read, so that what comes together reaches the engine together, or for one that costs more than others; and all
streams of a peer that have one pace together bring its `per_s`. The peer feels the rest as backpressure.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from protocol import limits
from protocol.ids import PeerId

MESSAGES_PER_S = 4000.0
LINK_MESSAGES_PER_S = 2 * MESSAGES_PER_S  # in all, links included: a hop before this one brings many clients' steps
BURST_S = 0.5  # a peer that was quiet may send so many seconds' worth at once
YIELD_EVERY = limits.TOGETHER_MESSAGES
PEERS_REMEMBERED = 4096  # whoever is forgotten has its burst again; it takes as many other peers


@dataclass(slots=True)
class _Allowance:
    left: float
    at: float


@dataclass(slots=True)
class Pace:
    """`now` gives monotonic seconds. A peer may bring `per_s` messages a second."""

    now: Callable[[], float]
    per_s: float = MESSAGES_PER_S
    _peers: OrderedDict[PeerId, _Allowance] = field(default_factory=OrderedDict)

    async def take(self, peer: PeerId, number: int, cost: float = 1.0) -> None:
        """One message of `peer` came, the `number`th since its stream was read, which let others have their turn. It
        costs as much as `cost` usual ones. Wait until it may be dealt with."""
        now, burst = self.now(), BURST_S * self.per_s
        own = self._peers.setdefault(peer, _Allowance(burst, now))
        self._peers.move_to_end(peer)
        if len(self._peers) > PEERS_REMEMBERED:
            self._peers.popitem(last=False)
        own.left, own.at = min(burst, own.left + (now - own.at) * self.per_s) - cost, now
        if own.left < 0:
            await trio.sleep(-own.left / self.per_s)
        elif cost > 1 or number % YIELD_EVERY == 0:
            await trio.lowlevel.checkpoint()
