"""A relay for nodes that cannot be dialled: the hop side of libp2p's circuit relay v2.

Speaks RESERVE and CONNECT of /libp2p/circuit/relay/0.2.0/hop. It replaces py-libp2p's, which gives a reservation in the
name of whomever the message names, resets a circuit whose reader pauses, and writes status messages into the data.

Invariants: a node that cannot be dialled itself is no relay; a reservation is the connected peer's own; a circuit leads
to a peer that reserved and is connected now; all circuits together pass BYTES_PER_S; a reader that stops stalls its own
circuit; at a target that is full nobody keeps two circuits while another peer has none, and at a relay that is full no
address keeps two reservations while another has none. The relay sees peer ids, sizes and times; what passes is
encrypted between the ends. Circuits have no limit of bytes or time, and say so by stating none.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import trio
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb import circuit_pb2 as pb
from multiaddr import Multiaddr

from node.p2p.addresses import is_circuit, peer_of_bytes
from node.p2p.delimited import Delimited
from node.p2p.doorway import source_of
from protocol.errors import RemoteProtocolError, TransportError
from protocol.ids import PeerId
from protocol.ports import Stream, StreamHandler

log = logging.getLogger(__name__)

HOP = "/libp2p/circuit/relay/0.2.0/hop"
STOP = "/libp2p/circuit/relay/0.2.0/stop"
MESSAGE_BYTES_MAX = 4096
TALK_S = 5.0  # a request and its answer
RESERVATION_S = 3600.0
RESERVATIONS_MAX = 64
RESERVATIONS_PER_ADDRESS_MAX = 16  # of peers at one address; those that come through relays count as one
CIRCUITS_PER_PEER_MAX = 16  # to one reserved peer, and from one peer
CIRCUITS_PER_PAIR_MAX = 2  # an honest peer needs one, and comes again before its dead one is noticed
CIRCUITS_MAX = 128
BYTES_PER_S = 16 << 20  # of the owner's uplink, for all circuits: a 64 KiB activation passes in 4 ms
PIECE_BYTES = 64 << 10


class Node(Protocol):
    """The mesh as it is used here."""

    @property
    def peer(self) -> PeerId: ...
    @property
    def addrs(self) -> tuple[str, ...]: ...
    @property
    def own_addrs(self) -> tuple[str, ...]: ...
    @property
    def hidden(self) -> bool: ...
    def handle(self, protocol: str, handler: StreamHandler) -> None: ...
    async def open(self, peer: PeerId, addrs: Sequence[str], protocol: str) -> Stream: ...
    def connected(self) -> tuple[PeerId, ...]: ...


@dataclass(slots=True, eq=False)
class Circuit:
    """Cancelling `end` ends it."""

    source: PeerId
    target: PeerId
    end: trio.CancelScope = field(default_factory=trio.CancelScope)


class Host(Protocol):
    """The node's host as it is used here."""

    def observed_ip(self, peer: ID) -> str | None: ...


class Relay:
    """`serve` offers it."""

    def __init__(self, node: Node, host: Host) -> None:
        self.reservations: dict[PeerId, float] = {}  # until when, trio's clock
        self.circuits: list[Circuit] = []  # the oldest first
        self._node = node
        self._host = host
        self._free_at = 0.0  # when the bytes let through so far are paid for

    def serve(self) -> None:
        self._node.handle(HOP, self._serve)

    async def _serve(self, stream: Stream) -> None:
        messages = Delimited(stream, MESSAGE_BYTES_MAX)
        try:
            with trio.fail_after(TALK_S):
                request = await messages.receive(pb.HopMessage)
                if request.type == pb.HopMessage.RESERVE:
                    await messages.send(self._reserve(stream.remote))
                    return
        except (trio.TooSlowError, RemoteProtocolError) as error:
            raise TransportError(f"{stream.remote} sent no request for a relay: {error}") from error
        if request.type != pb.HopMessage.CONNECT:
            await messages.send(_status(pb.UNEXPECTED_MESSAGE))
            return
        await self._connect(stream, messages, peer_of_bytes(request.peer.id))

    def _reserve(self, peer: PeerId) -> pb.HopMessage:
        now = trio.current_time()
        connected = self._node.connected()
        self.reservations = {
            holder: until for holder, until in self.reservations.items() if until > now and holder in connected
        }
        if self._node.hidden or not (peer in self.reservations or self._make_room(peer)):
            return _status(pb.RESERVATION_REFUSED)
        self.reservations[peer] = now + RESERVATION_S
        suffix = f"/p2p/{self._node.peer}"
        addrs = [Multiaddr(addr + suffix).to_bytes() for addr in self._node.addrs if not is_circuit(addr)]
        answer = _status(pb.OK)
        answer.reservation.CopyFrom(pb.Reservation(expire=int(time.time() + RESERVATION_S), addrs=addrs))
        return answer

    def _make_room(self, peer: PeerId) -> bool:
        """A place for one more reservation, False when there is none. When all are taken, the address that has most
        makes room for one that would still have fewer: its newest reservation ends, which its holder hears when it
        renews it, while circuits that are open stay."""
        held = [(holder, self._source(holder)) for holder in self.reservations]
        counts, source = Counter(where for _, where in held), self._source(peer)
        if counts[source] >= RESERVATIONS_PER_ADDRESS_MAX:
            return False
        if len(held) >= RESERVATIONS_MAX:
            ((greediest, most),) = counts.most_common(1)
            if most < counts[source] + 2:
                return False
            newest = next(holder for holder, where in reversed(held) if where == greediest)
            del self.reservations[newest]
        return True

    def _source(self, peer: PeerId) -> str:
        return source_of(self._host.observed_ip(ID.from_base58(peer)) or "")

    async def _connect(self, stream: Stream, messages: Delimited, target: PeerId | None) -> None:
        source = stream.remote
        if target is None or self.reservations.get(target, 0.0) <= trio.current_time() or target == source:
            await messages.send(_status(pb.NO_RESERVATION))
            return
        circuit = self._admit(source, target)
        if circuit is None:
            await messages.send(_status(pb.RESOURCE_LIMIT_EXCEEDED))
            return
        try:
            with circuit.end:
                await self._carry(circuit, stream, messages)
        finally:
            if circuit in self.circuits:
                self.circuits.remove(circuit)
        if circuit.end.cancelled_caught:
            raise TransportError(f"the circuit from {source} to {target} made room for another")

    def _admit(self, source: PeerId, target: PeerId) -> Circuit | None:
        """A place for one more circuit, None when there is none. At a target that is full, the source that has most
        makes room for one that would still have fewer: its oldest circuit ends."""
        there = [circuit for circuit in self.circuits if circuit.target == target]
        had = sum(circuit.source == source for circuit in there)
        outgoing = sum(circuit.source == source for circuit in self.circuits)
        if had >= CIRCUITS_PER_PAIR_MAX or outgoing >= CIRCUITS_PER_PEER_MAX:
            return None
        if len(there) >= CIRCUITS_PER_PEER_MAX:
            ((greediest, most),) = Counter(circuit.source for circuit in there).most_common(1)
            if most < had + 2:
                return None
            oldest = next(circuit for circuit in there if circuit.source == greediest)
            self.circuits.remove(oldest)
            oldest.end.cancel()
        elif len(self.circuits) >= CIRCUITS_MAX:
            return None
        self.circuits.append(circuit := Circuit(source, target))
        return circuit

    async def _carry(self, circuit: Circuit, stream: Stream, messages: Delimited) -> None:
        """Raises TransportError."""
        try:
            far, far_messages = await self._call(circuit.source, circuit.target)
        except (TransportError, RemoteProtocolError) as error:
            log.debug("no circuit to %s: %s", circuit.target, error)
            await messages.send(_status(pb.CONNECTION_FAILED))
            return
        try:
            await messages.send(_status(pb.OK))
            await self._join((stream, messages), (far, far_messages))
        finally:
            await far.aclose()

    async def _call(self, source: PeerId, target: PeerId) -> tuple[Stream, Delimited]:
        """A stream to `target` that it accepted as `source`'s. Raises TransportError, RemoteProtocolError."""
        try:
            with trio.fail_after(TALK_S):
                stream = await self._node.open(target, (), STOP)
                try:
                    messages = Delimited(stream, MESSAGE_BYTES_MAX)
                    peer = pb.PeerId(id=ID.from_base58(source).to_bytes())
                    await messages.send(pb.StopMessage(type=pb.StopMessage.CONNECT, peer=peer))
                    answer = await messages.receive(pb.StopMessage)
                    if answer.type != pb.StopMessage.STATUS or answer.status != pb.OK:
                        raise TransportError(f"{target} wants no circuit (status {answer.status})")
                except BaseException:
                    await stream.aclose()
                    raise
                return stream, messages
        except trio.TooSlowError:
            raise TransportError(f"{target} did not answer within {TALK_S:g} s") from None

    async def _join(self, near: tuple[Stream, Delimited], far: tuple[Stream, Delimited]) -> None:
        """Pass bytes both ways until both ends finished or one is gone. Raises TransportError."""
        failures: list[TransportError] = []
        async with trio.open_nursery() as nursery:

            async def pump(source: tuple[Stream, Delimited], target: Stream) -> None:
                try:
                    await self._pump(*source, target)
                except TransportError as error:
                    failures.append(error)
                    nursery.cancel_scope.cancel()

            nursery.start_soon(pump, near, far[0])
            nursery.start_soon(pump, far, near[0])
        if failures:
            raise failures[0]

    async def _pump(self, source: Stream, behind: Delimited, target: Stream) -> None:
        data = bytes(behind.unread)
        while data or (data := await source.receive(PIECE_BYTES)):
            now = trio.current_time()
            self._free_at = max(self._free_at, now) + len(data) / BYTES_PER_S
            await trio.sleep_until(self._free_at - PIECE_BYTES / BYTES_PER_S)
            await target.send(data)
            data = b""
        await target.finish()


def _status(status: pb.Status.ValueType) -> pb.HopMessage:
    return pb.HopMessage(type=pb.HopMessage.STATUS, status=status)
