"""How fast a peer's messages are taken from its streams, whatever they say.

A message of 30 bytes costs 20 to 200 us of the event loop, and a peer may send them as fast as its line carries, for
sessions that do not exist. Invariant: a peer's messages hold the loop for YIELD_EVERY of them at a time, counted from
its last rest, so that what comes together reaches the engine together; and all its streams together bring
MESSAGES_PER_S. The peer feels the rest as backpressure.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from protocol.ids import PeerId

MESSAGES_PER_S = 4000.0  # a hop before this one may bring the steps of many clients
BURST = 2000.0
YIELD_EVERY = 32
REST_S = 0.001  # without a message: others had their turn
PEERS_REMEMBERED = 4096  # whoever is forgotten has its burst again; it takes as many other peers


@dataclass(slots=True)
class _Allowance:
    left: float
    at: float
    taken: int = 0


@dataclass(slots=True)
class Pace:
    """`now` gives monotonic seconds."""

    now: Callable[[], float]
    _peers: OrderedDict[PeerId, _Allowance] = field(default_factory=OrderedDict)

    async def take(self, peer: PeerId, cost: float = 1.0) -> None:
        """One message of `peer` was read, which costs as much as `cost` usual ones: wait until it may be dealt with."""
        now = self.now()
        own = self._peers.setdefault(peer, _Allowance(BURST, now))
        self._peers.move_to_end(peer)
        if len(self._peers) > PEERS_REMEMBERED:
            self._peers.popitem(last=False)
        if now - own.at >= REST_S:
            own.taken = 0
        own.left, own.at = min(BURST, own.left + (now - own.at) * MESSAGES_PER_S) - cost, now
        own.taken += 1
        if own.left < 0:
            await trio.sleep(-own.left / MESSAGES_PER_S)
        elif own.taken % YIELD_EVERY == 0:
            await trio.lowlevel.checkpoint()
