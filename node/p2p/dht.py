"""Provider records over libp2p's Kademlia: protocol.ports.Directory on the mesh. A node with few neighbours finds more
by it.

Speaks FIND_NODE, ADD_PROVIDER, GET_PROVIDERS and PING of libp2p's kad-dht under a protocol id of its own. It replaces
py-libp2p's KadDHT, which offers the id /ipfs/kad/1.0.0 whatever prefix it is given, can be held up by twelve silent
streams, keeps up to 50,000 values of 1 MiB for strangers, and never asks whom it is connected to.

Invariants: a record names nobody but the peer that brought it, as the handshake proved it; requests are read and
answered within SERVE_S, at most REQUESTS_PER_S of one peer; when all places for streams are taken, the oldest stream of
the peer with most gives way to a newcomer, who needs its own for milliseconds only; the table holds only peers that
have answered; a lookup ends within LOOKUP_S, and dials addresses that peers named under the rule of protocol/scopes.py.
It keeps no values and no signed peer records.
"""

from __future__ import annotations

import logging
import math
import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Protocol

import trio
from libp2p.kad_dht.pb.kademlia_pb2 import Message
from libp2p.peer.id import ID
from multiaddr import Multiaddr

from node.p2p import addresses
from node.p2p.addresses import peer_of_bytes
from node.p2p.allowance import Allowance, allowance_of
from node.p2p.delimited import Delimited
from node.p2p.gossip import DEGREE
from node.p2p.kad_search import Search
from node.p2p.kad_table import BUCKET_PEERS_MAX, Contact, ProviderRecords, RoutingTable, place_of
from protocol import limits
from protocol.directory import KEY_BYTES
from protocol.errors import LocalProtocolError, RemoteProtocolError, TransportError
from protocol.ids import PeerId
from protocol.ports import Provider, Stream, StreamHandler
from protocol.scopes import dialable_from

log = logging.getLogger(__name__)

KAD = "/sotto/kad/1.0.0"
PARALLEL = 5  # questions of one lookup that wait at a time
ASK_S = 4.0  # one question, connecting included
LOOKUP_S = 12.0  # a whole lookup
SERVE_S = 10.0  # a peer's stream: its requests and our answers
MEET_S = 2.0  # who connected is asked within this time whether it speaks this...
STRANGER_S = 120.0  # ...and who did not answer, again after this time
NEIGHBOURS_ENOUGH = DEGREE  # more connections carry no advert further; who has fewer looks for more...
WIDEN_FIRST_S, WIDEN_S = 5.0, 60.0  # ...after the first (many start at once), then ever later up to the second
REQUEST_BYTES_MAX = 16 * 1024  # a provider with four addresses and a signed record of a foreign library
ANSWER_BYTES_MAX = 64 * 1024  # forty peers with their addresses
STREAMS_PER_PEER_MAX, STREAMS_MAX = 4, 64
REQUESTS_PER_S, REQUESTS_BURST = 10.0, 200.0
KEY_ON_WIRE_BYTES_MAX = 80
_SHA256 = b"\x12\x20"  # the multihash prefix: other libraries ask for records by content identifier
_STRANGERS_MAX = 4096


class Node(Protocol):
    """A Transport, as far as it is used here."""

    @property
    def peer(self) -> PeerId: ...
    @property
    def addrs(self) -> tuple[str, ...]: ...
    @property
    def own_addrs(self) -> tuple[str, ...]: ...
    def handle(self, protocol: str, handler: StreamHandler) -> None: ...
    async def open(self, peer: PeerId, addrs: Sequence[str], protocol: str) -> Stream: ...
    def connected(self) -> tuple[PeerId, ...]: ...


class Kademlia:
    """`serve` and `run` make it a part of the directory; `provide` and `providers` work without. `known_addrs` gives
    where a peer said that it can be dialled."""

    def __init__(self, node: Node, known_addrs: Callable[[PeerId], tuple[str, ...]]) -> None:
        self.table = RoutingTable(node.peer)
        self.records = ProviderRecords()
        self._node = node
        self._known_addrs = known_addrs
        self._own_key = ID.from_base58(node.peer).to_bytes()
        self._strangers: OrderedDict[PeerId, float] = OrderedDict()  # peers that do not speak this, and when asked
        self._open: list[tuple[PeerId, trio.CancelScope]] = []  # streams that are served, the oldest first
        self._asking: OrderedDict[PeerId, Allowance] = OrderedDict()  # requests

    # Directory

    async def provide(self, key: bytes) -> None:
        wire = _wire_key(key)
        own = Contact(self._node.peer, self._node.addrs)
        self.records.put(wire, own, trio.current_time())
        request = Message(type=Message.ADD_PROVIDER, key=wire, providerPeers=[_peer_of(own)])
        search = await self._look_up(Message(type=Message.FIND_NODE, key=wire))
        taken = 0

        async def tell(contact: Contact) -> None:
            nonlocal taken
            try:
                await self._ask(contact, request)
                taken += 1
            except (TransportError, RemoteProtocolError) as error:
                log.debug("%s took no record: %s", contact.peer, error)

        async with trio.open_nursery() as nursery:
            for contact in search.found():
                nursery.start_soon(tell, contact)
        if not taken:
            raise TransportError("no peer took the provider record")

    async def providers(self, key: bytes) -> tuple[Provider, ...]:
        wire = _wire_key(key)
        found: dict[PeerId, Contact] = {}

        def collect(answer: Message) -> bool:
            for contact in _contacts(answer.providerPeers):
                if contact.peer != self._node.peer and (contact.addrs or contact.peer not in found):
                    found[contact.peer] = contact
            return len(found) >= limits.PROVIDERS_MAX

        own = Message(providerPeers=[_peer_of(contact) for contact in self.records.get(wire, trio.current_time())])
        if not collect(own):
            await self._look_up(Message(type=Message.GET_PROVIDERS, key=wire), collect)
        return tuple(Provider(contact.peer, contact.addrs) for contact in found.values())[: limits.PROVIDERS_MAX]

    async def run(self) -> None:
        """Get to know those who connect, and others through them while they are few, for ever."""
        due, pause_s = -math.inf, WIDEN_FIRST_S
        while True:
            await self._meet()
            now = trio.current_time()
            self.records.expire(now)
            if len(self.table) and now >= due:
                due, pause_s = now + pause_s, min(2 * pause_s, WIDEN_S)
                await self._widen()
            await trio.sleep(MEET_S)

    async def _widen(self) -> None:
        """Have neighbours enough that the loss of one cuts nobody off. Each time at a random place: who looked only
        around its own would find those who look there too, and together they would be an island."""
        for peer in self._node.connected():
            if peer in self.table:  # what it says of its addresses changes, and may come later than its first answer
                self.table.add(Contact(peer, self._known_addrs(peer)))
        if not self._wide():
            request = Message(type=Message.FIND_NODE, key=_wire_key(os.urandom(KEY_BYTES)))
            await self._look_up(request, lambda _: self._wide())

    def _wide(self) -> bool:
        return sum(peer in self.table for peer in self._node.connected()) >= NEIGHBOURS_ENOUGH

    def serve(self) -> None:
        """Answer others from now on."""
        self._node.handle(KAD, self._serve)

    # asking

    async def _look_up(self, request: Message, enough: Callable[[Message], bool] = lambda _: False) -> Search:
        """Ask ever nearer peers until the nearest have answered, or `enough` says so of an answer."""
        target = place_of(request.key)
        search = Search(target, self._node.peer)
        with trio.move_on_after(LOOKUP_S):
            await self._meet()
            search.add(self.table.closest(target))
            async with trio.open_nursery() as nursery:

                async def pull() -> None:
                    while (contact := await search.take()) is not None:
                        answer: Message | None = None
                        try:
                            answer = await self._ask(contact, request)
                        except (TransportError, RemoteProtocolError) as error:
                            log.debug("%s gave no answer: %s", contact.peer, error)
                            self.table.remove(contact.peer)
                        finally:
                            search.done(contact, answer is not None)
                        if answer is not None:
                            self.table.add(contact)
                            search.add(_contacts(answer.closerPeers))
                            if enough(answer):
                                nursery.cancel_scope.cancel()

                for _ in range(PARALLEL):
                    nursery.start_soon(pull)
        return search

    async def _ask(self, contact: Contact, request: Message) -> Message:
        """Raises TransportError, RemoteProtocolError. Who takes a record need not answer: an empty one is made up."""
        addrs = dialable_from(self._node.own_addrs, contact.addrs, self._node.addrs)  # () will do for who is connected
        try:
            with trio.fail_after(ASK_S):
                stream = await self._node.open(contact.peer, addrs, KAD)
                try:
                    messages = Delimited(stream, ANSWER_BYTES_MAX)
                    await messages.send(request)
                    await stream.finish()
                    if request.type == Message.ADD_PROVIDER:
                        return await messages.receive_or_end(Message) or Message()
                    return await messages.receive(Message)
                finally:
                    await stream.aclose()
        except trio.TooSlowError:
            raise TransportError(f"{contact.peer} did not answer within {ASK_S:g} s") from None

    async def _meet(self) -> None:
        """Ask connected peers that are neither in the table nor known not to speak this."""
        now = trio.current_time()
        while self._strangers and now - next(iter(self._strangers.values())) > STRANGER_S:
            self._strangers.popitem(last=False)
        request = Message(type=Message.FIND_NODE, key=self._own_key)

        async def meet(peer: PeerId) -> None:
            try:
                await self._ask(Contact(peer, self._known_addrs(peer)), request)
                self.table.add(Contact(peer, self._known_addrs(peer)))
            except (TransportError, RemoteProtocolError):
                pass

        async with trio.open_nursery() as nursery:
            for peer in self._node.connected():
                if peer not in self.table and peer not in self._strangers:
                    self._strangers[peer] = now
                    nursery.start_soon(meet, peer)
        while len(self._strangers) > _STRANGERS_MAX:
            self._strangers.popitem(last=False)

    # answering

    async def _serve(self, stream: Stream) -> None:
        peer = stream.remote
        messages = Delimited(stream, REQUEST_BYTES_MAX)
        try:
            with self._place(peer):
                while (request := await messages.receive_or_end(Message)) is not None:
                    if not self._admit(peer):
                        raise TransportError(f"{peer} asks too often")
                    await messages.send(self._answer(request, peer))
        except RemoteProtocolError as error:  # reset, as the specification asks
            raise TransportError(f"{peer} broke kad-dht: {error}") from error

    @contextmanager
    def _place(self, peer: PeerId) -> Iterator[None]:
        """A place among the streams that are served. Raises TransportError: too many of `peer`, or it took too long."""
        streams = Counter(each for each, _ in self._open)
        if streams[peer] >= STREAMS_PER_PEER_MAX:
            raise TransportError(f"{peer} asks too much at a time")
        if len(self._open) >= STREAMS_MAX:
            most = max(streams.values())
            oldest = next(place for place in self._open if streams[place[0]] == most)
            self._open.remove(oldest)
            oldest[1].cancel()
        place = (peer, trio.CancelScope(deadline=trio.current_time() + SERVE_S))
        self._open.append(place)
        try:
            with place[1] as scope:
                yield
        finally:
            if place in self._open:  # else it gave way
                self._open.remove(place)
        if scope.cancelled_caught:
            raise TransportError(f"{peer} took longer than {SERVE_S:g} s, or than others could wait")

    def _answer(self, request: Message, peer: PeerId) -> Message:
        """Raises RemoteProtocolError for what is not asked here."""
        key = request.key
        if request.type == Message.PING:
            return Message(type=Message.PING)
        if not 0 < len(key) <= KEY_ON_WIRE_BYTES_MAX:
            raise RemoteProtocolError(f"a key of {len(key)} bytes")
        closer = [
            _peer_of(contact) for contact in self.table.closest(place_of(key)) if contact.peer != peer and contact.addrs
        ]
        now = trio.current_time()
        if request.type == Message.FIND_NODE:
            return Message(type=Message.FIND_NODE, closerPeers=closer)
        if request.type == Message.GET_PROVIDERS:
            providers = [_peer_of(contact) for contact in self.records.get(key, now) if contact.peer != peer]
            return Message(type=Message.GET_PROVIDERS, key=key, closerPeers=closer, providerPeers=providers)
        if request.type == Message.ADD_PROVIDER:
            for contact in _contacts(request.providerPeers):
                if contact.peer == peer:
                    self.records.put(key, contact, now)
            return Message(type=Message.ADD_PROVIDER, key=key)
        raise RemoteProtocolError(f"request type {request.type}")

    def _admit(self, peer: PeerId) -> bool:
        allowance = allowance_of(self._asking, peer, REQUESTS_PER_S, REQUESTS_BURST)
        left = allowance.refill(trio.current_time())
        allowance.left = max(0.0, left - 1)
        return left >= 1


def _wire_key(key: bytes) -> bytes:
    if len(key) != KEY_BYTES:
        raise LocalProtocolError(f"a directory key has {KEY_BYTES} bytes, not {len(key)}")
    return _SHA256 + key


def _peer_of(contact: Contact) -> Message.Peer:
    addrs = [Multiaddr(addr).to_bytes() for addr in contact.addrs]
    return Message.Peer(id=ID.from_base58(contact.peer).to_bytes(), addrs=addrs, connection=Message.CAN_CONNECT)


def _contacts(peers: Iterable[Message.Peer]) -> list[Contact]:
    """The well-formed ones among what a peer named, as many as a bucket holds."""
    found: list[Contact] = []
    for stated in islice(peers, BUCKET_PEERS_MAX):
        if (peer := peer_of_bytes(stated.id)) is None:
            continue
        found.append(Contact(peer, addresses.stated(stated.addrs)))
    return found
