"""What a node remembers of peers, and that no crowd of them makes it forget itself."""

from __future__ import annotations

import pytest
import trio
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.identity.identify.pb.identify_pb2 import Identify
from libp2p.peer.id import ID
from libp2p.utils.varint import encode_varint_prefixed
from multiaddr import Multiaddr

from node.p2p.peerbook import ADDRS_MAX, IDENTIFY_BYTES_MAX, PEERS_FORGOTTEN, PROTOCOLS_MAX, PeerBook
from protocol.errors import TransportError
from tests.conformance.adapters import full_addr, until
from tests.node.p2p.meshes import still_works, two_meshes

PUSH = "/ipfs/id/push/1.0.0"


def ids(count):
    return [ID(i.to_bytes(34)) for i in range(count)]


def book(live=(), most=1000):
    keys = create_new_key_pair(b"k" * 32)
    peers = PeerBook(ID.from_pubkey(keys.public_key), keys, lambda peer: peer in live)
    peers.max_peers = most
    return peers


def addresses(count):
    return [Multiaddr(f"/ip4/192.0.2.1/tcp/{1 + port}") for port in range(count)]


def test_a_crowd_of_peers_pushes_out_neither_this_node_nor_the_connected_ones():
    crowd = ids(3000)
    peers = book(live=crowd[:10])
    for peer in crowd:
        peers.add_addrs(peer, addresses(1), 7200)
        assert len(peers.peer_ids()) <= 1000
    assert peers.privkey(peers._own)
    assert set(crowd[:10]) <= set(peers.peer_ids())
    assert len(peers.peer_ids()) >= 1000 - PEERS_FORGOTTEN


def test_a_peer_has_few_addresses():
    peers = book()
    (peer,) = ids(1)
    peers.add_addrs(peer, addresses(10), 7200)
    peers.add_addrs(peer, addresses(1000), 7200)
    assert peers.addrs(peer) == addresses(ADDRS_MAX)
    peers.clear_addrs(peer)
    peers.add_addrs(peer, addresses(1), 7200)
    assert peers.addrs(peer) == addresses(1)


def test_gossip_outlives_a_crowd():
    async def body(a, b):
        a._host.get_peerstore().max_peers = 1
        for i in range(3):
            a._host.get_peerstore().add_addrs(ids(9)[i], addresses(1), 7200)
        await still_works(b, a)

    two_meshes(body)


def test_what_a_peer_pushes_about_itself_is_cut_to_size():
    message = Identify(
        listen_addrs=[addr.to_bytes() for addr in addresses(100)],
        protocols=["/x" * 100, *(f"/p/{i}" for i in range(200))],
        signedPeerRecord=b"r" * 4000,
    )

    async def body(a, b):
        await b.connect(full_addr(a))
        known = a._host.get_peerstore().peer_data_map
        await until(lambda: b._host.get_id() in known and known[b._host.get_id()].protocols)
        stream = await b.open(a.peer, (), PUSH)
        await stream.send(encode_varint_prefixed(message.SerializeToString()))
        await until(lambda: "/p/0" in known[b._host.get_id()].protocols)
        assert len(known[b._host.get_id()].addrs) == ADDRS_MAX
        assert known[b._host.get_id()].protocols == [f"/p/{i}" for i in range(PROTOCOLS_MAX)]

    two_meshes(body)


def test_bytes_that_are_no_address_are_not_noted():
    """The library would raise later, to whoever asks where the peer can be dialled."""
    message = Identify(listen_addrs=[b"\x04\x7f", b"\xff", addresses(1)[0].to_bytes()], protocols=["/p/new"])

    async def body(a, b):
        await b.connect(full_addr(a))
        known = a._host.get_peerstore().peer_data_map
        await until(lambda: b._host.get_id() in known and known[b._host.get_id()].protocols)
        stream = await b.open(a.peer, (), PUSH)
        await stream.send(encode_varint_prefixed(message.SerializeToString()))
        await until(lambda: "/p/new" in known[b._host.get_id()].protocols)
        assert a.known_addrs(b.peer) == ("/ip4/192.0.2.1/tcp/1",)

    two_meshes(body)


def test_a_push_that_is_too_long_costs_its_stream():
    async def body(a, b):
        await b.connect(full_addr(a))
        stream = await b.open(a.peer, (), PUSH)
        await stream.send(encode_varint_prefixed(b"x" * (IDENTIFY_BYTES_MAX + 1))[:100])
        with pytest.raises(TransportError):
            await stream.receive(1)
        await still_works(a, b)

    two_meshes(body)


def test_publishing_is_best_effort(monkeypatch):
    """The port says so, and a worker's herald relies on it: an error there would end the worker."""

    async def body(a, b):
        await still_works(a, b)
        monkeypatch.setattr(a._host, "get_public_key", lambda: 1 / 0)
        await a.publish("/test/topic/1", b"lost")
        await trio.lowlevel.checkpoint()

    two_meshes(body)
