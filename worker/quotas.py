"""Quotas: how much of this machine each peer, and all peers together, may take. Pure: time comes in as an argument.

Two answers to too much: bytes are slowed down (the caller waits before it moves more, which the peer feels as
backpressure), requests are refused with the time after which to come again. Invariant: what is remembered of peers is
bounded, and a peer that has been quiet is forgotten.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from math import inf

from protocol.errors import Refused, RemoteProtocolError
from protocol.ids import PeerId
from protocol.messages import RefusalReason

PEERS_REMEMBERED_MAX = 4096
BURST_S = 4.0  # a peer that was quiet may use so many seconds' worth at once
REFUSED_MAX = 100  # requests that are refused in a row before the stream is closed


@dataclass(slots=True)
class TokenBucket:
    """`rate` tokens a second, at most `burst` at once. It may go into debt: who took too much waits until it is
    paid."""

    rate: float
    burst: float
    _tokens: float = field(init=False)
    _at: float = field(default=-inf, init=False)

    def __post_init__(self) -> None:
        self._tokens = self.burst

    def wait_s(self, now: float) -> float:
        """Seconds until there is no debt; 0 when something may be taken now."""
        self._fill(now)
        return max(0.0, -self._tokens / self.rate) if self.rate < inf else 0.0

    def take(self, amount: float, now: float) -> None:
        """Take `amount`, into debt if need be."""
        self._fill(now)
        if self.rate < inf:
            self._tokens -= amount

    def _fill(self, now: float) -> None:
        if self.rate < inf:
            if self._at > -inf:
                self._tokens = min(self.burst, self._tokens + self.rate * max(0.0, now - self._at))
            self._at = now


@dataclass(slots=True)
class Rates:
    """One bucket for each peer and one for all: of requests, or of bytes."""

    peer_per_s: float
    total_per_s: float
    _all: TokenBucket = field(init=False)
    _peers: OrderedDict[PeerId, TokenBucket] = field(default_factory=OrderedDict, init=False)  # quiet for longest first

    def __post_init__(self) -> None:
        self._all = _bucket(self.total_per_s)

    def take(self, peer: PeerId, amount: float, now: float) -> float:
        """Take `amount` for `peer`; gives the seconds to wait before the next."""
        own = self._bucket(peer)
        for bucket in (own, self._all):
            bucket.take(amount, now)
        return max(own.wait_s(now), self._all.wait_s(now))

    def wait_s(self, peer: PeerId, now: float) -> float:
        """Seconds until `peer` may take something; 0 for now."""
        return max(self._bucket(peer).wait_s(now), self._all.wait_s(now))

    def _bucket(self, peer: PeerId) -> TokenBucket:
        # Whoever is forgotten starts with a full bucket: it takes 4,096 other identities to gain one burst.
        if peer not in self._peers:
            if len(self._peers) >= PEERS_REMEMBERED_MAX:
                self._peers.popitem(last=False)
            self._peers[peer] = _bucket(self.peer_per_s)
        self._peers.move_to_end(peer)
        return self._peers[peer]


def _bucket(rate: float) -> TokenBucket:
    return TokenBucket(rate, BURST_S * rate)


@dataclass(slots=True)
class RequestGate:
    """Requests on control, shard and session streams. `refused` counts those refused since the last good one."""

    rates: Rates
    refused: Counter[PeerId] = field(default_factory=Counter)

    def admit(self, peer: PeerId, cost: float, now: float) -> None:
        """Raises Refused(RATE) saying when to come again, and RemoteProtocolError when a peer does not listen."""
        wait_s = self.rates.wait_s(peer, now)
        if wait_s <= 0:
            self.rates.take(peer, cost, now)
            self.refused.pop(peer, None)
            return
        self.refused[peer] += 1
        if self.refused[peer] > REFUSED_MAX:
            del self.refused[peer]
            raise RemoteProtocolError(f"more than {REFUSED_MAX} requests after being told to wait")
        raise Refused(RefusalReason.RATE, f"too many requests: come again in {max(0.1, wait_s):.1f} s")

    def forget(self, peer: PeerId) -> None:
        """The peer's last stream has gone."""
        self.refused.pop(peer, None)


@dataclass(slots=True)
class QueueBook:
    """Bytes that wait in queues: steps to be computed, answers to be acknowledged, frames to be written. They are part
    of the memory that the owner gives. A peer may have `peer_share` of what it has and nobody else has: so a few that
    hold all they can leave the next one something."""

    capacity_bytes: int
    peer_share: float = 0.5
    used_bytes: int = 0
    _peers: Counter[PeerId] = field(default_factory=Counter)

    def fits(self, peer: PeerId, size: int) -> bool:
        """Whether `size` more bytes may wait for `peer`. None always may, also when others' have made its part smaller
        than what it holds."""
        if not size:
            return True
        own, free = self._peers[peer] + size, self.capacity_bytes - self.used_bytes - size
        return free >= 0 and own * (1 - self.peer_share) <= self.peer_share * free

    def take(self, peer: PeerId, size: int) -> None:
        """Raises Refused(MEMORY), and then nothing changed."""
        if not size:
            return
        if not self.fits(peer, size):
            raise Refused(
                RefusalReason.MEMORY, f"{size} bytes more than this worker lets wait for one client or in all"
            )
        self.used_bytes += size
        self._peers[peer] += size

    def give(self, peer: PeerId, size: int) -> None:
        if not size:
            return
        self.used_bytes -= size
        self._peers[peer] -= size
        if not self._peers[peer]:
            del self._peers[peer]


@dataclass(frozen=True, slots=True)
class Room:
    """The part of a QueueBook that is `peer`'s."""

    book: QueueBook
    peer: PeerId

    def fits(self, size: int) -> bool:
        return self.book.fits(self.peer, size)

    def take(self, size: int) -> None:
        """Raises Refused(MEMORY)."""
        self.book.take(self.peer, size)

    def give(self, size: int) -> None:
        self.book.give(self.peer, size)
