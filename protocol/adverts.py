"""Signed, expiring statements of capacity: what a worker gossips about itself.

An advert is at most limits.ADVERT_BYTES_MAX on the wire. Sequence numbers start at the clock's milliseconds, so a
worker that restarts goes on above its past. `AdvertGate` refuses whatever is forged, replayed, expired, from the future
or living too long; it remembers one sequence number per peer and is bounded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Annotated

from protocol import limits
from protocol.codec import decode, encode
from protocol.errors import RemoteProtocolError
from protocol.ids import ID_BYTES, DeploymentId, PeerId
from protocol.schema import Between, Record, Size
from protocol.signed import Identity, Signed

TOPIC = "sotto/adverts/1"
_DOMAIN = "advert/1"
Count = Annotated[int, Between(0, 1 << 53)]
Milliseconds = Annotated[int, Between(0, 1 << 53)]


@dataclass(frozen=True, slots=True)
class HeldSpan(Record):
    """Blocks [start, end) of a deployment, loaded, with the measured time of one position through one block."""

    deployment: Annotated[DeploymentId, Size(ID_BYTES, ID_BYTES)]
    start: Annotated[int, Between(0, limits.BLOCKS_MAX)]
    end: Annotated[int, Between(1, limits.BLOCKS_MAX)]
    block_time_us: Count

    def check(self) -> None:
        if self.end <= self.start:
            raise ValueError("an empty span")


@dataclass(frozen=True, slots=True)
class Speed(Record):
    """What the machine reaches in one dtype, measured at start-up."""

    dtype: Annotated[str, Size(1, 16)]
    read_gb_s: float  # weights streamed from memory, GB/s: bounds decode
    gflop_s: float  # matrix products, GFLOP/s: bounds prefill

    def check(self) -> None:
        if self.read_gb_s <= 0 or self.gflop_s <= 0:
            raise ValueError("a speed is above zero")


@dataclass(frozen=True, slots=True)
class Rtt(Record):
    """Round-trip time to a peer, who is named by `peer_tag`."""

    tag: Annotated[bytes, Size(8, 8)]
    rtt_ms: float

    def check(self) -> None:
        if self.rtt_ms < 0:
            raise ValueError("a round trip takes time")


@dataclass(frozen=True, slots=True)
class Advert(Record):
    """One worker's capacity at `issued_ms`; believed until `expires_ms`."""

    sequence: Milliseconds
    issued_ms: Milliseconds
    expires_ms: Milliseconds
    addrs: Annotated[tuple[Annotated[str, Size(1, limits.ADDR_CHARS_MAX)], ...], Size(0, limits.ADDRS_MAX)]
    memory_bytes: Count  # what the owner gives, weights and KV together
    memory_free_bytes: Count  # for weights
    kv_free_bytes: Count
    disk_free_bytes: Count  # for shards of spans that are leased
    speeds: Annotated[tuple[Speed, ...], Size(0, 4)]
    spans: Annotated[tuple[HeldSpan, ...], Size(0, limits.ADVERT_SPANS_MAX)]
    rtts: Annotated[tuple[Rtt, ...], Size(0, limits.ADVERT_RTTS_MAX)]
    device: Annotated[str, Size(1, 16)]
    version: Annotated[str, Size(1, 16)]
    accepting: bool  # False: paused or yielding to its owner; no new leases and sessions
    relayed: bool  # True: reached through a relay only, so each hop costs more
    load_percent: Annotated[int, Between(0, 100)]  # of the last seconds the engine was busy

    def check(self) -> None:
        if not self.issued_ms < self.expires_ms <= self.issued_ms + limits.ADVERT_LIFE_MAX_S * 1000:
            raise ValueError("an advert's life is positive and bounded")
        if self.memory_free_bytes > self.memory_bytes or self.kv_free_bytes > self.memory_bytes:
            raise ValueError("more free than there is")


class AdvertRefused(RemoteProtocolError):
    """`reason` is one of a few names, for counters: forged, expired, future, replay, full."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def peer_tag(peer: PeerId) -> bytes:
    """Eight bytes that name a peer where 52 characters would not fit."""
    return blake2b(peer.encode(), digest_size=8, person=b"sotto-peer-tag").digest()


def sign_advert(advert: Advert, identity: Identity) -> bytes:
    """The advert as it is gossiped. Raises ValueError when it is too large (give fewer RTTs or spans)."""
    data = encode(identity.sign(_DOMAIN, encode(advert)))
    if len(data) > limits.ADVERT_BYTES_MAX:
        raise ValueError(f"an advert of {len(data)} bytes; {limits.ADVERT_BYTES_MAX} at most")
    return data


def advert_interval_s(peers: int) -> float:
    """Seconds between a worker's adverts in a swarm of `peers`: each node receives at most 5 a second at any size."""
    return max(limits.ADVERT_INTERVAL_MIN_S, peers / limits.ADVERTS_RECEIVED_PER_S)


def read_advert(data: bytes, author: PeerId) -> Advert:
    """The advert that `author` signed, whatever its time. Raises RemoteProtocolError."""
    if len(data) > limits.ADVERT_BYTES_MAX:
        raise RemoteProtocolError(f"an advert of {len(data)} bytes; {limits.ADVERT_BYTES_MAX} at most")
    signed = decode(Signed, data)
    if signed.signer != author:
        raise AdvertRefused("forged", "an advert signed by another than its author")
    try:
        body = signed.verify(_DOMAIN)
    except RemoteProtocolError as error:
        raise AdvertRefused("forged", str(error)) from None
    return decode(Advert, body)


@dataclass(slots=True)
class AdvertGate:
    """Admits each peer's adverts in rising sequence."""

    latest: dict[PeerId, tuple[int, int]] = field(default_factory=dict)  # peer -> (sequence, latest expires_ms of all)

    def admit(self, data: bytes, author: PeerId, now_ms: int) -> Advert:
        """The advert in `data`, published by `author`. Raises RemoteProtocolError, and then nothing changed."""
        advert = read_advert(data, author)
        if advert.expires_ms <= now_ms:
            raise AdvertRefused("expired", "an advert that has expired")
        if advert.issued_ms > now_ms + limits.CLOCK_SKEW_MAX_S * 1000:
            raise AdvertRefused("future", "an advert from the future: the peer's clock, or this one, is wrong")
        known = self.latest.get(author)
        if known is not None and advert.sequence <= known[0]:
            raise AdvertRefused("replay", "an advert that is not newer than the last one: a replay")
        if known is None and len(self.latest) >= limits.PEERS_MAX:
            self._make_room(now_ms)
        self.latest[author] = (advert.sequence, max(advert.expires_ms, known[1] if known else 0))
        return advert

    def _make_room(self, now_ms: int) -> None:
        # Once all adverts of a peer have expired, none can be replayed: its own expiry refuses it.
        for peer in [peer for peer, (_, expires_ms) in self.latest.items() if expires_ms <= now_ms]:
            del self.latest[peer]
        if len(self.latest) >= limits.PEERS_MAX:
            raise AdvertRefused("full", "too many peers")
