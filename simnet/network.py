"""The virtual network: any number of peers in one process, each behind the ports Transport and Gossip.

What it promises is what the libp2p adapter promises (tests/conformance runs over both); what it adds is that a seed
fixes every delay, and that peers can be crashed, frozen, cut off from each other or made to refuse dials. Run it under
`simnet.runtime.run`: all waiting is in virtual time, and the same seed gives the same `trace`.

Faults act as they would on real machines: the end of a process is seen after one delay, silence only after DETECT_S.
Bytes inside a stream are never dropped or reordered.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio
from nacl.signing import SigningKey

from protocol.errors import LocalProtocolError, TransportError
from protocol.ids import PeerId, peer_id_of
from simnet.endpoint import VirtualEndpoint
from simnet.links import Link, LinkOptions, Pipe, VirtualStream

DIAL_ROUND_TRIPS = 5.4  # as measured for libp2p: TCP, Noise, muxer
DIAL_S = 5.0
DETECT_S = 6.0  # after which a silent peer is given up


@dataclass(frozen=True, slots=True)
class NetworkOptions:
    """`link` holds for every pair without an entry of its own."""

    link: LinkOptions = field(default_factory=LinkOptions)
    links: dict[tuple[PeerId, PeerId], LinkOptions] = field(default_factory=dict)


@dataclass(slots=True)
class Connection:
    peers: tuple[PeerId, PeerId]  # (dialler, dialled)
    streams: list[VirtualStream] = field(default_factory=list)
    ended: trio.Event = field(default_factory=trio.Event)


class VirtualNetwork:
    """Made by `open_network`. Peers join with `join`; the faults are methods here."""

    def __init__(self, seed: int, options: NetworkOptions, nursery: trio.Nursery) -> None:
        self.options = options
        self.trace: list[tuple[float, str, PeerId, PeerId, int]] = []
        self._random = random.Random(f"{seed}/network")
        self._nursery = nursery
        self._endpoints: dict[PeerId, VirtualEndpoint] = {}
        self._at: dict[str, PeerId] = {}
        self._joined = 0
        self._published = 0
        self._links: dict[tuple[PeerId, PeerId], Link] = {}
        self._connections: dict[tuple[PeerId, PeerId], Connection] = {}
        self._refusing: dict[PeerId, bool] = {}

    @asynccontextmanager
    async def join(self, seed: bytes, listen: bool = True) -> AsyncIterator[VirtualEndpoint]:
        """A peer with the identity that libp2p would give it. Leaving the block ends the peer.

        The block is the peer's process: `crash` cancels it. Give each peer that may crash a task of its own.
        """
        peer = peer_id_of(SigningKey(seed).verify_key.encode())
        if peer in self._endpoints:
            raise LocalProtocolError(f"{peer} has joined already")
        self._joined += 1
        addr = f"/ip4/10.0.{self._joined // 256}.{self._joined % 256}/tcp/4001"
        failure: BaseException | None = None
        async with trio.open_nursery() as nursery:
            endpoint = self._endpoints[peer] = VirtualEndpoint(self, peer, (addr,) if listen else (), nursery)
            if listen:
                self._at[addr] = peer
            try:
                yield endpoint
            except (Exception, KeyboardInterrupt) as error:  # raised again below: the nursery would wrap it in a group
                failure = error
            finally:
                self.crash(peer)
        if failure is not None:
            raise failure

    # faults

    def crash(self, peer: PeerId) -> None:
        """The process ends: its tasks are cancelled, its connections are gone, dialling it is refused."""
        endpoint = self._endpoints.pop(peer, None)
        if endpoint is not None:
            for addr in endpoint.addrs:
                del self._at[addr]
            for connection in self._connections_of(peer):
                self._end(connection, f"{peer} is gone")
            endpoint.stop()

    def block(self, source: PeerId, target: PeerId) -> None:
        """Nothing goes from `source` to `target` any more; after DETECT_S both give up the connection."""
        self.link(source, target).set_blocked(True)
        self._nursery.start_soon(self._detect, source, target)

    def heal(self, source: PeerId, target: PeerId) -> None:
        self.link(source, target).set_blocked(False)

    def partition(self, side: Sequence[PeerId], other: Sequence[PeerId]) -> None:
        for a in side:
            for b in other:
                self.block(a, b)
                self.block(b, a)

    def freeze(self, peer: PeerId) -> None:
        """Power loss, or a process that is stopped: silence in both directions."""
        self.partition([peer], [other for other in self._endpoints if other != peer])

    def thaw(self, peer: PeerId) -> None:
        for other in self._endpoints:
            if other != peer:
                self.heal(peer, other)
                self.heal(other, peer)

    def refuse_dials(self, peer: PeerId, refuse: bool = True) -> None:
        self._refusing[peer] = refuse

    # what the endpoints use

    def link(self, source: PeerId, target: PeerId) -> Link:
        pair = (source, target)
        if pair not in self._links:
            options = self.options.links.get(pair, self.options.link)
            self._links[pair] = Link(options, random.Random(self._random.random()))
        return self._links[pair]

    def record(self, event: str, source: PeerId, target: PeerId, size: int) -> None:
        self.trace.append((trio.current_time(), event, source, target, size))

    def connection(self, a: PeerId, b: PeerId) -> Connection | None:
        return self._connections.get((min(a, b), max(a, b)))

    def disconnect(self, a: PeerId, b: PeerId, why: str) -> None:
        connection = self.connection(a, b)
        if connection is not None:
            self._end(connection, why)

    def neighbours(self, peer: PeerId) -> list[PeerId]:
        return sorted(a if b == peer else b for a, b in self._connections if peer in (a, b))

    def next_sequence(self) -> int:
        """Numbers for messages; they go on when an author restarts, as numbers taken from a clock do."""
        self._published += 1
        return self._published

    def endpoint(self, peer: PeerId) -> VirtualEndpoint | None:
        return self._endpoints.get(peer)

    async def round_trips(self, a: PeerId, b: PeerId, count: float) -> None:
        there, back = self.link(a, b), self.link(b, a)
        await there.wait_open()
        await back.wait_open()
        await trio.sleep(count * (there.options.delay_s + back.options.delay_s))

    async def dial(self, source: PeerId, target: PeerId, addr: str) -> None:
        """Raises TransportError, at once or when a dial of libp2p would."""
        found = self._at.get(addr)
        if found is None or self._refusing.get(found):
            await trio.sleep(self.options.link.delay_s * 2)
            raise TransportError(f"cannot connect to {target} at {addr}: refused")
        with trio.move_on_after(DIAL_S):
            await self.round_trips(source, found, DIAL_ROUND_TRIPS)
            if found != target:
                raise TransportError(f"cannot connect to {target} at {addr}: {found} answers there")
            if target not in self._endpoints:
                raise TransportError(f"cannot connect to {target} at {addr}: it is gone")
            if self._endpoints[target].shuns(source):
                raise TransportError(f"cannot connect to {target} at {addr}: it closed the connection")
            pair = (min(source, target), max(source, target))
            self._connections.setdefault(pair, Connection((source, target)))
            self.record("connect", source, target, 0)
            return
        raise TransportError(f"{target} did not answer within {DIAL_S:g} s")

    def stream_pair(self, connection: Connection, a: PeerId, b: PeerId) -> tuple[VirtualStream, VirtualStream]:
        """The two ends of a new stream, a's first."""
        there, back = self.link(a, b), self.link(b, a)
        forth, reply = Pipe(there, back), Pipe(back, there)
        near = VirtualStream(b, forth, reply, lambda at: self._reset(far, there, at))
        far = VirtualStream(a, reply, forth, lambda at: self._reset(near, back, at))
        connection.streams = [stream for stream in connection.streams if not stream.closed] + [near, far]
        return near, far

    def later(self, at: float, link: Link, action: Callable[[], None]) -> None:
        """Do `action` at the other end of `link`: at a time, and not while the link is blocked."""
        self._nursery.start_soon(self._later, at, link, action)

    async def _later(self, at: float, link: Link, action: Callable[[], None]) -> None:
        await trio.sleep_until(at)
        await link.wait_open()
        action()

    def _reset(self, stream: VirtualStream, link: Link, at: float) -> None:
        self.later(
            max(at + link.options.delay_s, link.arrival(0)), link, lambda: stream.fail("the peer reset the stream")
        )

    async def _detect(self, source: PeerId, target: PeerId) -> None:
        connection = self.connection(source, target)
        with trio.move_on_after(DETECT_S):
            await self.link(source, target).wait_open()
            return
        if connection is not None and connection is self.connection(source, target):
            self._end(connection, "the peer is silent")

    def _connections_of(self, peer: PeerId) -> list[Connection]:
        return [connection for pair, connection in sorted(self._connections.items()) if peer in pair]

    def _end(self, connection: Connection, why: str) -> None:
        a, b = sorted(connection.peers)
        self._connections.pop((a, b), None)
        self.record("disconnect", a, b, 0)
        connection.ended.set()
        for stream in connection.streams:
            stream.fail(why)


@asynccontextmanager
async def open_network(seed: int, options: NetworkOptions | None = None) -> AsyncIterator[VirtualNetwork]:
    """A network without peers; leaving the block ends whatever is still under way in it."""
    failure: BaseException | None = None
    async with trio.open_nursery() as nursery:
        try:
            yield VirtualNetwork(seed, options or NetworkOptions(), nursery)
        except (Exception, KeyboardInterrupt) as error:  # raised again below: the nursery would wrap it in a group
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
