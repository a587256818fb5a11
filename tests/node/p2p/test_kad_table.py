"""What a Kademlia node remembers is bounded, and in Kademlia's order."""

from __future__ import annotations

import hashlib

from nacl.signing import SigningKey

from node.p2p import kad_table
from node.p2p.kad_table import BUCKET_PEERS_MAX, Contact, ProviderRecords, RoutingTable, peer_place, place_of
from protocol.ids import peer_id_of
from protocol.limits import PROVIDER_LIFE_S, PROVIDERS_MAX


def peer(number):
    return peer_id_of(SigningKey(hashlib.sha256(str(number).encode()).digest()).verify_key.encode())


PEERS = [peer(number) for number in range(200)]


def test_the_closest_are_the_closest_by_the_xor_of_sha256():
    table = RoutingTable(peer("own"))
    for each in PEERS:
        table.add(Contact(each))
    known = [each for each in PEERS if each in table]
    for name in (b"a", b"b"):
        target = place_of(name)
        expected = sorted(known, key=lambda each: peer_place(each) ^ target)[:20]
        assert [contact.peer for contact in table.closest(target)] == expected


def test_a_full_bucket_keeps_whom_it_knows():
    table = RoutingTable(peer("own"))
    far = [each for each in PEERS if (peer_place(each) ^ peer_place(peer("own"))).bit_length() == 256]
    for each in far:
        table.add(Contact(each, ("/ip4/1.2.3.4/tcp/1",)))
    assert [each in table for each in far[:BUCKET_PEERS_MAX]] == [True] * BUCKET_PEERS_MAX
    assert far[BUCKET_PEERS_MAX] not in table
    table.remove(far[0])
    table.add(Contact(far[-1]))
    assert far[-1] in table
    assert len(table) == BUCKET_PEERS_MAX


def test_a_node_is_not_in_its_own_table_and_addresses_are_not_forgotten():
    table = RoutingTable(PEERS[0])
    table.add(Contact(PEERS[0]))
    table.add(Contact(PEERS[1], ("/ip4/1.2.3.4/tcp/1",)))
    table.add(Contact(PEERS[1]))
    assert table.closest(0) == [Contact(PEERS[1], ("/ip4/1.2.3.4/tcp/1",))]


def test_records_expire_and_the_latest_come_first():
    records = ProviderRecords()
    for at, each in enumerate(PEERS[: PROVIDERS_MAX + 5]):
        records.put(b"key", Contact(each), float(at))
    found = records.get(b"key", 30.0)
    assert [contact.peer for contact in found] == PEERS[5 : PROVIDERS_MAX + 5][::-1]
    assert len(records.get(b"key", PROVIDER_LIFE_S + 20)) == 4
    assert records.get(b"key", 2 * PROVIDER_LIFE_S) == []
    assert len(records) == 0
    assert records == ProviderRecords(), "nothing is left behind"


def test_a_flood_of_records_takes_bounded_room(monkeypatch):
    monkeypatch.setattr(kad_table, "RECORDS_PER_PEER_MAX", 10)
    monkeypatch.setattr(kad_table, "RECORDS_MAX", 50)
    records = ProviderRecords()
    records.put(b"honest", Contact(PEERS[0]), 0.0)
    for number in range(1000):
        records.put(number.to_bytes(2, "big"), Contact(PEERS[1]), 1.0)
    assert len(records) == 11
    assert [contact.peer for contact in records.get(b"honest", 1.0)] == [PEERS[0]], "one peer displaces itself only"
    for number in range(1000):
        records.put(number.to_bytes(2, "big"), Contact(PEERS[number % 100]), 2.0)
    assert len(records) == 50
    sizes = [sum(map(len, records._holders.values())), sum(map(len, records._held.values()))]
    assert sizes == [50, 50]
