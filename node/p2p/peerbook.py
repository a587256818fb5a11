"""What this node remembers of other peers, bounded: the library's peerstore, and what identify may put into it.

py-libp2p forgets the peer without addresses first when it knows more than 1,000: that is this node itself, whose keys
are gone then, and with them all gossip. It believes 1,000 addresses and a megabyte of protocol names of every peer, and
takes 60 ms of the event loop to parse 10 KiB of addresses.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import trio
from libp2p.abc import INetStream, IPeerStore
from libp2p.crypto.keys import KeyPair
from libp2p.custom_types import StreamHandlerFn
from libp2p.identity.identify.pb.identify_pb2 import Identify
from libp2p.identity.update import update_peerstore_from_identify
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStore
from libp2p.utils.varint import read_varint_prefixed_bytes_limited
from multiaddr import Multiaddr
from multiaddr.exceptions import Error as MultiaddrError

log = logging.getLogger(__name__)

PEERS_MAX = 4096  # above the limit of connections, so that no connected peer needs to go
PEERS_FORGOTTEN = 256  # at once: choosing them takes a look at all
ADDRS_MAX = 16
PROTOCOLS_MAX = 64
PROTOCOL_CHARS_MAX = 128
IDENTIFY_BYTES_MAX = 8192  # as go-libp2p
RECORD_BYTES_MAX = 1024  # a signed record of 16 addresses
IDENTIFY_S = 10.0


class PeerBook(PeerStore):
    """The library's peerstore with bounds. `is_live` says whether there is a connection to a peer: it is not forgotten,
    nor is this node itself."""

    def __init__(self, own: ID, keys: KeyPair, is_live: Callable[[ID], bool]) -> None:
        super().__init__(max_peers=PEERS_MAX)
        self._own = own
        self._is_live = is_live
        self.add_key_pair(own, keys)

    def add_addrs(self, peer_id: ID, addrs: Sequence[Multiaddr], ttl: int = 0) -> None:
        """At most ADDRS_MAX in all; later ones are not believed until the library clears them. Bytes that are no
        address are left out: the library parses them when somebody asks for text, far from here."""
        known = self.peer_data_map[peer_id].addrs if peer_id in self.peer_data_map else []
        new = [addr for addr in addrs if addr not in known and _is_whole(addr)]
        super().add_addrs(peer_id, new[: max(0, ADDRS_MAX - len(known))], ttl)

    def _enforce_peer_limit(self) -> None:
        if len(self.peer_data_map) <= self.max_peers:
            return
        away = [peer for peer in self.peer_data_map if peer != self._own and not self._is_live(peer)]
        for peer in away[: max(PEERS_FORGOTTEN, len(self.peer_data_map) - self.max_peers)]:
            self.clear_peerdata(peer)


def _is_whole(addr: Multiaddr) -> bool:
    try:
        return bool(str(addr))
    except (MultiaddrError, ValueError):
        return False


async def learn(book: IPeerStore, stream: INetStream) -> None:
    """Read one identify message and note what it says of its sender. Raises what libp2p raises."""
    with trio.fail_after(IDENTIFY_S):
        message = Identify.FromString(await read_varint_prefixed_bytes_limited(stream, IDENTIFY_BYTES_MAX))
    del message.listen_addrs[ADDRS_MAX:]
    named = [name for name in message.protocols if isinstance(name, str)]  # others come as bytes
    protocols = [name for name in named if len(name) <= PROTOCOL_CHARS_MAX]
    del message.protocols[:]
    message.protocols.extend(protocols[:PROTOCOLS_MAX])
    if len(message.signedPeerRecord) > RECORD_BYTES_MAX:
        message.ClearField("signedPeerRecord")
    await update_peerstore_from_identify(book, stream.muxed_conn.peer_id, message)


def push_handler(book: IPeerStore) -> StreamHandlerFn:
    """In the place of the library's handler of /ipfs/id/push/1.0.0."""

    async def handle(stream: INetStream) -> None:
        try:
            await learn(book, stream)
        finally:
            await stream.reset()

    return handle
