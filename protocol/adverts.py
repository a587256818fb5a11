"""Signed, expiring statements of capacity: what a worker gossips about itself.

An advert is at most limits.ADVERT_BYTES_MAX on the wire. Sequence numbers start at the clock's milliseconds, so a
worker that restarts goes on above its past; one whose clock was ahead before is heard again when what it said then has
expired. `AdvertGate` refuses whatever is forged, replayed, expired, from the future
or living too long, and what comes faster than honest workers speak; it remembers a few numbers per peer and is bounded.
An author's clock may be wrong by CLOCK_SKEW_MAX_S either way, so `believed_until_ms` goes by the receiver's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Annotated

from protocol import limits
from protocol.codec import decode, encode
from protocol.errors import RemoteProtocolError
from protocol.ids import ID_BYTES, DeploymentId, PeerId
from protocol.schema import Between, Count, Milliseconds, Record, Size
from protocol.signed import Identity, Signed

TOPIC = "sotto/adverts/1"
_DOMAIN = "advert/1"
_SKEW_MS = round(limits.CLOCK_SKEW_MAX_S * 1000)


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
    """`reason` is one of a few names, for counters: forged, expired, future, replay, rate, crowd, full."""

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
    """Seconds between a worker's adverts in a swarm of `peers`: each node receives at most 5 a second from up to 300.
    Bounded, for peers may be invented: see limits."""
    wanted_s = peers / limits.ADVERTS_RECEIVED_PER_S
    return min(max(limits.ADVERT_INTERVAL_MIN_S, wanted_s), limits.ADVERT_INTERVAL_MAX_S)


def believed_until_ms(advert: Advert, received_ms: int) -> int:
    """When an advert that came at `received_ms` ends: after its life by the receiver's clock, and never later than any
    tolerable clock of its author says, or what was held back on the way could live twice."""
    return min(received_ms + advert.expires_ms - advert.issued_ms, advert.expires_ms + _SKEW_MS)


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


@dataclass(frozen=True, slots=True)
class _Heard:
    """What is remembered of a peer: its last sequence, the latest end of all its adverts, and how many it may send."""

    sequence: int
    expires_ms: int
    room: float
    at_ms: int

    def is_over(self, now_ms: int) -> bool:
        """Have all adverts of the peer expired? Then none can be replayed: its own expiry refuses it."""
        return self.expires_ms + _SKEW_MS <= now_ms


@dataclass(slots=True)
class AdvertGate:
    """Admits each peer's adverts in rising sequence, no faster than honest ones send them, and so many new peers."""

    latest: dict[PeerId, _Heard] = field(default_factory=dict)
    _room: float = float(limits.ADVERT_AUTHORS_BURST)  # for new peers
    _at_ms: int = 0

    def admit(self, data: bytes, author: PeerId, now_ms: int) -> Advert:
        """The advert in `data`, published by `author`. Raises RemoteProtocolError, and then nothing changed."""
        advert = read_advert(data, author)
        if advert.expires_ms + _SKEW_MS <= now_ms:
            raise AdvertRefused("expired", "an advert that has expired")
        if advert.issued_ms > now_ms + _SKEW_MS:
            raise AdvertRefused("future", "an advert from the future: the peer's clock, or this one, is wrong")
        known = self.latest.get(author)
        self.latest[author] = self._first(advert, now_ms) if known is None else _next(known, advert, now_ms)
        return advert

    def _first(self, advert: Advert, now_ms: int) -> _Heard:
        """Raises AdvertRefused."""
        room = _refilled(self._room, now_ms - self._at_ms, limits.ADVERT_AUTHORS_PER_S, limits.ADVERT_AUTHORS_BURST)
        if room < 1:
            raise AdvertRefused("crowd", "more new peers than a node should hear of")
        if len(self.latest) >= limits.PEERS_MAX:
            self._make_room(now_ms)
        self._room, self._at_ms = room - 1, now_ms
        return _Heard(advert.sequence, advert.expires_ms, limits.ADVERTS_BURST - 1, now_ms)

    def _make_room(self, now_ms: int) -> None:
        for peer in [peer for peer, heard in self.latest.items() if heard.is_over(now_ms)]:
            del self.latest[peer]
        if len(self.latest) >= limits.PEERS_MAX:
            raise AdvertRefused("full", "too many peers")


def _next(known: _Heard, advert: Advert, now_ms: int) -> _Heard:
    """Raises AdvertRefused."""
    if advert.sequence <= known.sequence and not known.is_over(now_ms):
        raise AdvertRefused("replay", "an advert that is not newer than the last one: a replay")
    room = _refilled(known.room, now_ms - known.at_ms, limits.ADVERTS_PER_S, limits.ADVERTS_BURST)
    if room < 1:
        raise AdvertRefused("rate", "more adverts than a worker has reason to send")
    return _Heard(advert.sequence, max(advert.expires_ms, known.expires_ms), room - 1, now_ms)


def _refilled(room: float, waited_ms: int, per_s: float, burst: int) -> float:
    # A clock that was set back counts as time, too: nobody is shut out until it is there again.
    return min(float(burst), room + abs(waited_ms) / 1000 * per_s)
