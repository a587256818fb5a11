"""Peers with whom this node has nothing to do for a while.

Invariant: no connection of a shunned peer gets past the handshake that proves who it is, and none is made to it. An
address from which such a peer comes again is blamed (doorway.py). At most PEERS_MAX are remembered: whoever is
forgotten early took as many other identities.

Whom to shun is the caller's decision; it closes nothing.
"""

from __future__ import annotations

from collections import OrderedDict

import trio

from node.p2p.doorway import Doorway
from protocol.errors import TransportError
from protocol.ids import PeerId

PEERS_MAX = 4096


class Shunned:
    def __init__(self, doorway: Doorway) -> None:
        self._doorway = doorway
        self._until: OrderedDict[PeerId, float] = OrderedDict()

    def add(self, peer: PeerId, seconds: float) -> None:
        self._until[peer] = trio.current_time() + seconds
        self._until.move_to_end(peer)
        if len(self._until) > PEERS_MAX:
            self._until.popitem(last=False)

    def check(self, peer: PeerId, address: str = "") -> None:
        """`peer` is to be dialled, or has proven who it is at the IP address `address`. Raises TransportError."""
        if self._until.get(peer, 0.0) <= trio.current_time():
            self._until.pop(peer, None)
            return
        if address:
            self._doorway.blame(address)
        raise TransportError(f"{peer} is shunned: it broke the protocol too often")
