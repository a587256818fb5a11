"""From a relay to a direct connection: hole punching by libp2p's DCUtR, between two nodes that nobody can dial.

Who was dialled through the relay starts: both tell where their router would let them out, and dial each other at the
same moment from the port they told, so that each router takes the other's packets for answers. New streams then go over
the direct connection, and the relay carries nothing but what was under way.

It guesses that a router lets a connection out under the port that it has inside, which most home routers do while that
port is free; where one does not (carriers' NAT, mostly), the attempt fails and the peers stay on their relay. One
attempt per relayed connection; it never makes anything worse. Source: libp2p's dcutr specification.

Where to dial is the other's word, and it may be a stranger. Invariants: PUNCHES_MAX attempts at a time, in all; one
address each, on the internet or in a network beyond which this node has no address and no neighbour.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import trio
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.dcutr_pb2 import HolePunch
from multiaddr import Multiaddr

from node.p2p.addresses import is_circuit, of_ip, stated, tcp_endpoint
from node.p2p.delimited import Delimited
from node.p2p.host import Host
from node.p2p.identify import seen_at
from node.p2p.relay import Node
from node.p2p.streams import foreign
from node.p2p.tcp import connect_from
from protocol.errors import InputError, RemoteProtocolError, TransportError
from protocol.ids import PeerId
from protocol.ports import Stream
from protocol.scopes import dialable_from

log = logging.getLogger(__name__)

DCUTR = "/libp2p/dcutr"
MESSAGE_BYTES_MAX = 4096
TALK_S = 8.0  # through the relay: three messages, and each side's question to a neighbour
PUNCH_S = 3.0  # SYNs that cross arrive within a round trip; a lost one is sent again after a second
AGAIN_S = 0.05  # a router that declines the other's first packet answers with a reset
WITNESSES_MAX = 3
PUNCHES_MAX = 8  # at a time: a client's relayed hops; each knocks PUNCH_S / AGAIN_S times at the most


class HolePunching:
    def __init__(self, node: Node, host: Host) -> None:
        self._node = node
        self._host = host
        self._punches = trio.CapacityLimiter(PUNCHES_MAX)

    def serve(self) -> None:
        self._node.handle(DCUTR, self._answer)

    async def start(self, peer: PeerId) -> None:
        """Try to reach `peer`, who came through a relay, directly. Raises TransportError when that fails."""
        with _talking():
            own, source = await self._way_out()
            stream = await self._node.open(peer, (), DCUTR)
            try:
                messages = Delimited(stream, MESSAGE_BYTES_MAX)
                asked = trio.current_time()
                await messages.send(HolePunch(type=HolePunch.CONNECT, ObsAddrs=own))
                answer = await _received(messages, HolePunch.CONNECT)
                round_trip_s = trio.current_time() - asked
                self._require_turn()
                await messages.send(HolePunch(type=HolePunch.SYNC))
                await stream.finish()
                await trio.sleep(round_trip_s / 2)
            finally:
                await stream.aclose()
        async with self._punches:
            await self._punch(peer, source, answer, initiator=False)

    async def _answer(self, stream: Stream) -> None:
        peer = ID.from_base58(stream.remote)
        if not self._host.is_live(peer) or self._host.observed_ip(peer) is not None:
            raise TransportError(f"{stream.remote} is not connected through a relay")
        with _talking():
            own, source = await self._way_out()
            messages = Delimited(stream, MESSAGE_BYTES_MAX)
            request = await _received(messages, HolePunch.CONNECT)
            await messages.send(HolePunch(type=HolePunch.CONNECT, ObsAddrs=own))
            await _received(messages, HolePunch.SYNC)
        self._require_turn()
        async with self._punches:
            await self._punch(stream.remote, source, request, initiator=True)

    def _require_turn(self) -> None:
        """To wait for one would be too late. Who only talks, or is silent, takes nobody's."""
        if not self._punches.available_tokens:
            raise TransportError("as many attempts as may be are under way")

    async def _way_out(self) -> tuple[list[bytes], int]:
        """Where the router lets this node out, as far as can be guessed, and the port here."""
        listening = [addr for addr in self._host.get_transport_addrs() if not is_circuit(str(addr))]
        port = tcp_endpoint(listening[0])[1] if listening else _free_port()
        witnesses = [peer for peer in self._node.connected() if self._host.observed_ip(ID.from_base58(peer))]
        for witness in witnesses[:WITNESSES_MAX]:
            ip = await seen_at(self._node, witness)
            if ip is not None:
                return [Multiaddr(f"{of_ip(ip)}/tcp/{port}").to_bytes()], port
        raise TransportError("nobody says where this node's connections come from")

    async def _punch(self, peer: PeerId, source: int, told: HolePunch, *, initiator: bool) -> None:
        addrs = stated(told.ObsAddrs)
        try:
            target = Multiaddr(addrs[0])
            tcp_endpoint(target)
        except (IndexError, InputError):
            raise TransportError(f"{peer} does not say where it can be dialled") from None
        if not dialable_from(self._own_addrs(), (str(target),), self._node.addrs):
            raise TransportError(f"{peer} names {target}, which is inside a network")
        with trio.move_on_after(PUNCH_S):
            while self._host.observed_ip(ID.from_base58(peer)) is None:
                try:
                    with foreign(f"no direct connection to {peer} at {target}"):
                        raw = await connect_from(source, target, initiator)
                        await self._host.take_connection(raw, ID.from_base58(peer), target)
                except TransportError as error:
                    log.debug("%s", error)
                    await trio.sleep(AGAIN_S)
            log.info("direct connection", extra={"peer": peer, "addr": str(target)})
            return
        raise TransportError(f"no hole to {peer} at {target} within {PUNCH_S:g} s")

    def _own_addrs(self) -> tuple[str, ...]:
        """Where this node is, as far as it knows by itself: its addresses, and its neighbours' as connections have
        them. A client has no addresses, but a relay."""
        ips = [self._host.observed_ip(ID.from_base58(peer)) for peer in self._node.connected()]
        return (*self._node.own_addrs, *(of_ip(ip) for ip in ips if ip is not None))


@contextmanager
def _talking() -> Iterator[None]:
    """Around the exchange of addresses: too slow, or broken, is a TransportError."""
    try:
        with trio.fail_after(TALK_S):
            yield
    except (trio.TooSlowError, RemoteProtocolError) as error:
        raise TransportError(f"no agreement on a direct connection: {error}") from error


async def _received(messages: Delimited, kind: HolePunch.Type.ValueType) -> HolePunch:
    message = await messages.receive(HolePunch)
    if message.type != kind:
        raise RemoteProtocolError(f"message type {message.type}, not {kind}")
    return message


def _free_port() -> int:
    """A port that no socket has now; it is used within seconds."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
