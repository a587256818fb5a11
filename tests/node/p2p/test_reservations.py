"""Whom a full relay still takes."""

from __future__ import annotations

import pytest
from libp2p.relay.circuit_v2.pb import circuit_pb2 as pb
from nacl.signing import SigningKey

import node.p2p.relay as relay_module
from node.p2p.relay import Relay
from protocol.ids import peer_id_of
from simnet import runtime
from tests.conformance.adapters import seed_of


class Middle:
    """The node of a relay and its host. A peer is named by its address, and a letter."""

    hidden = False
    addrs = ("/ip4/192.0.2.1/tcp/4001",)

    def __init__(self):
        self.names = {}
        self.peer = self.named("192.0.2.1")

    def named(self, name):
        peer = peer_id_of(SigningKey(seed_of(name)).verify_key.encode())
        self.names[peer] = name
        return peer

    def connected(self):
        return tuple(self.names)

    def observed_ip(self, peer):
        return self.names[peer.to_base58()].rstrip("abcd") or None


@pytest.mark.parametrize(
    ("come", "kept"),
    [
        ("1.1.1.1a 1.1.1.1b 1.1.1.1c 1.1.1.2a", "1.1.1.1a 1.1.1.1b 1.1.1.2a"),
        ("2001:db8::1 2001:db8::2 2001:db8::3 2001:db8:0:1::1", "2001:db8::1 2001:db8::2 2001:db8:0:1::1"),
        ("a b c", "a b"),  # through relays
        ("1.1.1.1a 1.1.1.1b 1.1.1.2a 1.1.1.2b 1.1.1.3a", "1.1.1.1a 1.1.1.2a 1.1.1.2b 1.1.1.3a"),
        ("1.1.1.1a 1.1.1.1b 1.1.1.2a 1.1.1.2b 1.1.1.3a 1.1.1.1b", "1.1.1.1a 1.1.1.2a 1.1.1.2b 1.1.1.3a"),
        ("1.1.1.1a 1.1.1.2a 1.1.1.3a 1.1.1.4a 1.1.1.5a", "1.1.1.1a 1.1.1.2a 1.1.1.3a 1.1.1.4a"),
        ("1.1.1.1a 1.1.1.1b 1.1.1.2a 1.1.1.3a 1.1.1.1a", "1.1.1.1a 1.1.1.1b 1.1.1.2a 1.1.1.3a"),  # a renewal
    ],
)
def test_one_address_takes_so_many_reservations_and_fewer_where_there_is_no_room(monkeypatch, come, kept):
    monkeypatch.setattr(relay_module, "RESERVATIONS_MAX", 4)
    monkeypatch.setattr(relay_module, "RESERVATIONS_PER_ADDRESS_MAX", 2)

    async def main():
        middle = Middle()
        relay = Relay(middle, middle)
        for name in come.split():
            peer = middle.named(name)
            status = relay._reserve(peer).status
            assert status == (pb.OK if peer in relay.reservations else pb.RESERVATION_REFUSED)
        assert [middle.names[peer] for peer in relay.reservations] == kept.split()

    runtime.run(main, seed=1)
