"""What a Kademlia node remembers: peers by their distance, and who provides what. Pure; time comes in as an argument.

Invariant: both are bounded, whatever peers say. A full bucket keeps the peers it knows (they stay up longer than
newcomers do, and a flood of new identities moves nothing); a peer has a share of the records, and when all are taken
the oldest goes. Source: Maymounkov and Mazieres, Kademlia (2002), sections 2.2 to 2.4; libp2p's kad-dht specification.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import sha256

from libp2p.peer.id import ID

from protocol.ids import PeerId
from protocol.limits import PROVIDER_LIFE_S, PROVIDERS_MAX

BUCKET_PEERS_MAX = 20  # k of the paper
RECORDS_MAX = 1 << 15  # about 20 MB
RECORDS_PER_PEER_MAX = 1 << 11  # eight deployments of the deepest model


@dataclass(frozen=True, slots=True)
class Contact:
    """A peer and where it may be dialled (multiaddrs without /p2p suffix)."""

    peer: PeerId
    addrs: tuple[str, ...] = ()


def place_of(name: bytes) -> int:
    """Where a key stands: 256 bits, by SHA-256 as in all of libp2p."""
    return int.from_bytes(sha256(name).digest(), "big")


def peer_place(peer: PeerId) -> int:
    return place_of(ID.from_base58(peer).to_bytes())


def nearest(contacts: Iterable[Contact], target: int) -> list[Contact]:
    """As many contacts as a bucket holds, those nearest to `target`, the nearest first."""
    return sorted(contacts, key=lambda contact: peer_place(contact.peer) ^ target)[:BUCKET_PEERS_MAX]


class RoutingTable:
    """Peers that have answered, by the length of the prefix that they share with this node."""

    def __init__(self, own: PeerId) -> None:
        self._own = own
        self._place = peer_place(own)
        self._buckets: dict[int, dict[PeerId, Contact]] = {}

    def __len__(self) -> int:
        return sum(len(bucket) for bucket in self._buckets.values())

    def __contains__(self, peer: object) -> bool:
        return any(peer in bucket for bucket in self._buckets.values())

    def add(self, contact: Contact) -> None:
        """Remember, or bring up to date. A full bucket stays as it is."""
        if contact.peer == self._own:
            return
        bucket = self._buckets.setdefault((self._place ^ peer_place(contact.peer)).bit_length(), {})
        if contact.peer in bucket or len(bucket) < BUCKET_PEERS_MAX:
            known = bucket.get(contact.peer)
            bucket[contact.peer] = contact if contact.addrs or known is None else known

    def remove(self, peer: PeerId) -> None:
        self._buckets.get((self._place ^ peer_place(peer)).bit_length(), {}).pop(peer, None)

    def closest(self, target: int) -> list[Contact]:
        return nearest((contact for bucket in self._buckets.values() for contact in bucket.values()), target)


@dataclass(slots=True)
class ProviderRecords:
    """Who said that it holds a key, and when. Oldest first."""

    _records: OrderedDict[tuple[bytes, PeerId], tuple[Contact, float]] = field(default_factory=OrderedDict)
    _holders: dict[bytes, dict[PeerId, None]] = field(default_factory=dict)
    _held: dict[PeerId, OrderedDict[bytes, None]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._records)

    def put(self, key: bytes, provider: Contact, now: float) -> None:
        """Take a record, new or again."""
        self._remove(key, provider.peer)
        held = self._held.get(provider.peer, OrderedDict[bytes, None]())
        if len(held) >= RECORDS_PER_PEER_MAX:
            self._remove(next(iter(held)), provider.peer)
        if len(self._records) >= RECORDS_MAX:
            self._remove(*next(iter(self._records)))
        self._records[key, provider.peer] = (provider, now)
        self._holders.setdefault(key, {})[provider.peer] = None
        self._held.setdefault(provider.peer, OrderedDict())[key] = None

    def get(self, key: bytes, now: float) -> list[Contact]:
        """The providers of `key` that said so within PROVIDER_LIFE_S, the most recent first."""
        self.expire(now)
        peers = reversed(self._holders.get(key, {}))
        return [self._records[key, peer][0] for peer in peers][:PROVIDERS_MAX]

    def expire(self, now: float) -> None:
        while self._records:
            (key, peer), (_, since) = next(iter(self._records.items()))
            if now - since < PROVIDER_LIFE_S:
                return
            self._remove(key, peer)

    def _remove(self, key: bytes, peer: PeerId) -> None:
        if self._records.pop((key, peer), None) is None:
            return
        del self._holders[key][peer], self._held[peer][key]
        if not self._holders[key]:
            del self._holders[key]
        if not self._held[peer]:
            del self._held[peer]
