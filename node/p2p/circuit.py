"""Connections through a relay: the other two sides of libp2p's circuit relay v2, who dials and who is dialled.

Invariants: what comes out is an ordinary connection of the host, with the peer at the far end proven by Noise and our
yamux on top, so that streams keep their contract; a circuit is accepted only from a relay where this node holds a
reservation; a circuit ends when its stream does.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import trio
from libp2p.connection_types import ConnectionType
from libp2p.io.abc import ReadWriteCloser
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb import circuit_pb2 as pb
from multiaddr import Multiaddr

from node.p2p import addresses
from node.p2p.addresses import CIRCUIT
from node.p2p.delimited import Delimited
from node.p2p.holepunch import HolePunching
from node.p2p.host import Host
from node.p2p.relay import HOP, MESSAGE_BYTES_MAX, RESERVATION_S, STOP, TALK_S, Node
from node.p2p.streams import foreign
from protocol.errors import InputError, RemoteProtocolError, TransportError
from protocol.ids import PeerId
from protocol.limits import ADDR_CHARS_MAX
from protocol.ports import Stream
from protocol.scopes import scope_of

log = logging.getLogger(__name__)

RENEW_PART = 0.5  # of a reservation's life
RENEW_MIN_S = 10.0


@dataclass(frozen=True, slots=True)
class Reservation:
    """`circuits`: the addresses under which the relay makes this node dialable, best first: those on the internet, and
    of these what the relay says now."""

    renew_s: float
    circuits: tuple[str, ...]


class CircuitStream(ReadWriteCloser):
    """A stream through a relay as libp2p wants a socket. `closed` is set once it is closed from this side."""

    def __init__(self, stream: Stream, unread: bytearray) -> None:
        self.closed = trio.Event()
        self._stream = stream
        self._unread = unread

    async def read(self, n: int | None = None) -> bytes:
        if n == 0:
            return b""
        if not self._unread:
            try:
                self._unread += await self._stream.receive(1 << 18)
            except TransportError as error:
                raise ConnectionClosedError("the circuit ended", transport="circuit") from error
        data = bytes(memoryview(self._unread)[:n])
        del self._unread[: len(data)]
        return data

    async def write(self, data: bytes) -> None:
        try:
            await self._stream.send(data)
        except TransportError as error:
            raise ConnectionClosedError("the circuit ended", transport="circuit") from error

    async def close(self) -> None:
        self.closed.set()
        await self._stream.aclose()

    def get_remote_address(self) -> tuple[str, int] | None:
        return None


class Circuits:
    def __init__(self, node: Node, host: Host, wall: Callable[[], float] = time.time) -> None:
        self._node = node
        self._host = host
        self._wall = wall
        self._punching = HolePunching(node, host)
        self._reserved: dict[PeerId, float] = {}  # relays, and until when (trio's clock)

    def serve(self) -> None:
        """Accept circuits from relays where this node reserved."""
        self._node.handle(STOP, self._accept)

    def serve_punching(self) -> None:
        """Accept attempts to get from a relay to a direct connection."""
        self._punching.serve()

    async def reserve(self, relay: PeerId, addrs: tuple[str, ...]) -> Reservation:
        """Ask `relay`, who is dialled at `addrs` unless connected. Raises TransportError (also when it declines)."""
        stream, _, answer = await self._ask(relay, addrs, pb.HopMessage(type=pb.HopMessage.RESERVE))
        await stream.aclose()
        if answer.status != pb.OK:
            raise TransportError(f"{relay} gives no reservation (status {answer.status})")
        life_s = min(answer.reservation.expire - self._wall(), RESERVATION_S)
        if life_s <= RENEW_MIN_S:
            raise TransportError(f"{relay} gives a reservation for {life_s:.0f} s: its clock or this one is wrong")
        self._reserved[relay] = trio.current_time() + life_s
        suffix = f"/p2p/{relay}"
        told = addresses.stated(answer.reservation.addrs, suffix)  # newer than `addrs`, which it said when it connected
        direct = sorted(addresses.dialable((*told, *addrs)), key=lambda addr: scope_of(str(addr)) != "global")
        circuits = [f"{addr}{suffix}{CIRCUIT}" for addr in direct if not addresses.is_circuit(str(addr))]
        usable = tuple(addr for addr in circuits if len(addr) <= ADDR_CHARS_MAX)
        if not usable:
            raise TransportError(f"{relay} states no address under which others can dial it")
        return Reservation(max(RENEW_PART * life_s, RENEW_MIN_S), usable)

    async def dial(self, circuit: str, peer: PeerId) -> None:
        """Connect to `peer` through the relay that `circuit` names. Raises TransportError."""
        try:
            relay, where = addresses.parse_circuit(circuit)
        except InputError as error:
            raise TransportError(str(error)) from error
        if relay in (peer, self._node.peer):
            raise TransportError(f"{circuit} leads nowhere")
        target = pb.PeerId(id=ID.from_base58(peer).to_bytes())
        request = pb.HopMessage(type=pb.HopMessage.CONNECT, peer=target)
        stream, messages, answer = await self._ask(relay, (str(where),), request)
        try:
            if answer.status != pb.OK:
                raise TransportError(f"the relay {relay} does not reach {peer} (status {answer.status})")
            raw = _raw(stream, messages, True, f"{circuit}/p2p/{peer}")
            with foreign(f"cannot connect to {peer} through {relay}"):
                await self._host.swarm.upgrade_outbound_raw_conn(raw, ID.from_base58(peer))
        except BaseException:
            await stream.aclose()
            raise

    async def _ask(
        self, relay: PeerId, addrs: tuple[str, ...], request: pb.HopMessage
    ) -> tuple[Stream, Delimited, pb.HopMessage]:
        """Raises TransportError."""
        try:
            with trio.fail_after(TALK_S):
                stream = await self._node.open(relay, addrs, HOP)
                try:
                    messages = Delimited(stream, MESSAGE_BYTES_MAX)
                    await messages.send(request)
                    answer = await messages.receive(pb.HopMessage)
                    if answer.type != pb.HopMessage.STATUS:
                        raise RemoteProtocolError(f"message type {answer.type} for an answer")
                except BaseException:
                    await stream.aclose()
                    raise
                return stream, messages, answer
        except trio.TooSlowError:
            raise TransportError(f"the relay {relay} did not answer within {TALK_S:g} s") from None
        except RemoteProtocolError as error:
            raise TransportError(f"the relay {relay} broke its protocol: {error}") from error

    async def _accept(self, stream: Stream) -> None:
        relay = stream.remote
        messages = Delimited(stream, MESSAGE_BYTES_MAX)
        try:
            with trio.fail_after(TALK_S):
                request = await messages.receive(pb.StopMessage)
                peer = addresses.peer_of_bytes(request.peer.id)
                known = self._reserved.get(relay, 0.0) > trio.current_time()
                if request.type != pb.StopMessage.CONNECT or peer is None or not known:
                    await messages.send(pb.StopMessage(type=pb.StopMessage.STATUS, status=pb.PERMISSION_DENIED))
                    return
                await messages.send(pb.StopMessage(type=pb.StopMessage.STATUS, status=pb.OK))
        except (trio.TooSlowError, RemoteProtocolError) as error:
            raise TransportError(f"the relay {relay} broke its protocol: {error}") from error
        raw = _raw(stream, messages, False, f"/p2p/{relay}{CIRCUIT}/p2p/{peer}")
        with foreign(f"no connection with {peer} through {relay}"):
            muxed = await self._host.swarm.upgrade_inbound_raw_conn(raw, raw.get_transport_addresses()[0])
        assert isinstance(raw.stream, CircuitStream)
        try:
            await self._punching.start(PeerId(muxed.peer_id.to_base58()))  # proven, whatever the relay said
        except TransportError as error:
            log.debug("still through %s: %s", relay, error)
        await raw.stream.closed.wait()  # the stream is closed when this handler returns


def _raw(stream: Stream, messages: Delimited, initiator: bool, addr: str) -> RawConnection:
    circuit = CircuitStream(stream, messages.unread)
    return RawConnection(circuit, initiator, ConnectionType.RELAYED, [Multiaddr(addr)])
