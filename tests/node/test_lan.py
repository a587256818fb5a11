"""The local network: what its records may say, what is made of them, and real multicast on loopback."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from zeroconf import NonUniqueNameException, ServiceStateChange, Zeroconf

from node.lan import ASKED_MAX, HOSTS_MAX, SERVICE, Presence, _Seeker, allowed, on_lan, sighting_of
from protocol.membership import SwarmKey
from tests.helpers.adverts import peer
from tests.helpers.multicast import needs_multicast

SWARM = SwarmKey(b"\7" * 32).swarm
NEAR = ("192.0.2.7",)
WAIT_S = 15.0


def txt(number=1, swarm=SWARM):
    return {b"peer": peer(number).encode(), b"swarm": swarm.hex().encode()}


def test_a_record_becomes_addresses_of_a_named_peer():
    assert sighting_of(txt(), ("192.0.2.7", "2001:db8::7"), 4517, SWARM) == (
        peer(1),
        (f"/ip4/192.0.2.7/tcp/4517/p2p/{peer(1)}", f"/ip6/2001:db8::7/tcp/4517/p2p/{peer(1)}"),
    )


@pytest.mark.parametrize(
    ("record", "hosts", "port"),
    [
        (txt(swarm=bytes(8)), NEAR, 4517),
        ({b"swarm": SWARM.hex().encode()}, NEAR, 4517),
        ({b"peer": peer(1).encode()}, NEAR, 4517),
        ({**txt(), b"peer": None}, NEAR, 4517),
        ({**txt(), b"peer": b"\xff" * 52}, NEAR, 4517),
        ({**txt(), b"peer": b"12D3KooW/p2p/evil"}, NEAR, 4517),
        (txt(), (), 4517),
        (txt(), ("0.0.0.0", "::", "224.0.0.251", "fe80::1", "fe80::1%2", "somewhere", ""), 4517),
        (txt(), NEAR, 0),
        (txt(), NEAR, None),
        (txt(), NEAR, 1 << 16),
    ],
)
def test_nonsense_and_other_swarms_become_nothing(record, hosts, port):
    assert sighting_of(record, hosts, port, SWARM) is None


def test_addresses_are_few():
    found = sighting_of(txt(), [f"10.0.0.{i}" for i in range(1, 200)], 4517, SWARM)
    assert found is not None
    assert len(found[1]) == HOSTS_MAX


@given(
    st.dictionaries(st.sampled_from([b"peer", b"swarm", b"x"]), st.one_of(st.none(), st.binary(max_size=80))),
    st.lists(st.one_of(st.text(max_size=40), st.ip_addresses().map(str)), max_size=6),
    st.one_of(st.none(), st.integers(-1, 1 << 17)),
)
def test_any_record_gives_a_sighting_or_nothing(record, hosts, port):
    assert sighting_of({**record, b"swarm": SWARM.hex().encode()}, hosts, port, SWARM) is None
    for _, addrs in filter(None, [sighting_of({**record, **txt()}, hosts, port, SWARM)]):
        assert all(addr.endswith(f"/p2p/{peer(1)}") and len(addr) < 128 for addr in addrs)


@dataclass
class Cache:
    """What stands in zeroconf's cache, by service name: (TXT, hosts, port). It counts questions."""

    known: dict[str, tuple[Any, Any, Any]] = field(default_factory=dict)
    asked: int = 0


class FakeInfo:
    def __init__(self, service_type, name):
        self.name = name

    def load_from_cache(self, cache):
        if self.name not in cache.known:
            return False
        self.properties, self.hosts, self.port = cache.known[self.name]
        return True

    def request(self, cache, timeout):
        cache.asked += 1
        return False

    def parsed_addresses(self):
        return self.hosts


@pytest.fixture
def seeker(monkeypatch):
    monkeypatch.setattr("node.lan.ServiceInfo", FakeInfo)
    seen = []
    made = _Seeker(SWARM, peer(99), lambda who, addrs: seen.append((who, addrs)))
    return made, Cache(), seen


def name(number):
    return f"{peer(number)}.{SERVICE}"


def test_services_come_and_go(seeker):
    seek, cache, seen = seeker
    cache.known[name(1)] = (txt(1), NEAR, 4517)
    seek(cache, SERVICE, name(1), ServiceStateChange.Added)
    seek(cache, SERVICE, name(1), ServiceStateChange.Removed)
    assert seen == [(peer(1), (f"/ip4/192.0.2.7/tcp/4517/p2p/{peer(1)}",)), (peer(1), ())]


def test_a_service_speaks_for_the_peer_of_its_name_only_and_never_for_us(seeker):
    seek, cache, seen = seeker
    cache.known = {
        name(1): (txt(2), NEAR, 4517),
        name(99): (txt(99), NEAR, 4517),
        f"printer.{SERVICE}": (txt(1), NEAR, 631),
    }
    for service in cache.known:
        seek(cache, SERVICE, service, ServiceStateChange.Added)
        seek(cache, SERVICE, service, ServiceStateChange.Updated)
    seek(cache, SERVICE, name(99), ServiceStateChange.Removed)
    assert seen == []


@pytest.mark.parametrize("suffix", ["_other._tcp.local.", "local.", f"x.{SERVICE}", ""])
def test_a_pointer_to_something_else_is_nothing_to_us(suffix):
    """What is raised here ends the thread that looks around."""
    seen = []
    seek = _Seeker(SWARM, peer(99), lambda who, addrs: seen.append((who, addrs)))
    for change in (ServiceStateChange.Added, ServiceStateChange.Removed):
        seek(Cache(), SERVICE, f"{peer(1)}.{suffix}", change)
    assert seen == []


def test_a_flood_of_names_is_asked_about_a_bounded_number_of_times(seeker):
    seek, cache, seen = seeker
    for number in range(3 * ASKED_MAX):
        seek(cache, SERVICE, name(1000 + number), ServiceStateChange.Added)
        seek(cache, SERVICE, name(1000 + number), ServiceStateChange.Updated)
    assert cache.asked == ASKED_MAX
    cache.known[name(1)] = (txt(1), NEAR, 4517)
    seek(cache, SERVICE, name(1), ServiceStateChange.Added)
    assert [who for who, _ in seen] == [peer(1)]


@pytest.mark.parametrize("error", [OSError("no such device"), NonUniqueNameException(), RuntimeError("no adapter")])
def test_without_multicast_one_line_says_so_and_all_else_goes_on(error, caplog):
    def broken(**_):
        raise error

    async def main():
        async with on_lan(SWARM, None, lambda *_: None, broken) as lan:
            assert "multicast" in lan.trouble

    trio.run(main)
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_the_switch(monkeypatch):
    for value, on in (("0", False), ("off", False), ("No", False), ("1", True), ("", True)):
        monkeypatch.setenv("SOTTO_LAN", value)
        assert allowed() is on
    monkeypatch.delenv("SOTTO_LAN")
    assert allowed()


@needs_multicast
def test_two_nodes_find_each_other_over_real_multicast_and_see_goodbyes():
    async def main():
        near, far, other = [], [], []
        ours, theirs = os.urandom(8), os.urandom(8)  # whoever else tests, or serves, on this machine is heard too
        here = [Presence(peer(number), (f"/ip4/127.0.0.1/tcp/{4000 + number}",)) for number in (1, 2, 3)]
        with trio.fail_after(WAIT_S):
            async with on_lan(ours, here[0], lambda *seen: near.append(seen)):
                async with (
                    on_lan(ours, here[1], lambda *seen: far.append(seen)),
                    on_lan(theirs, here[2], lambda *seen: other.append(seen)),
                ):
                    while not (near and far):
                        await trio.sleep(0.02)
                while len(near) < 2 or near[-1][1]:
                    await trio.sleep(0.02)
        assert near[0] == (peer(2), (f"/ip4/127.0.0.1/tcp/4002/p2p/{peer(2)}",))
        assert near[-1][1] == ()
        assert far[0] == (peer(1), (f"/ip4/127.0.0.1/tcp/4001/p2p/{peer(1)}",))
        assert {who for who, addrs in near + far if addrs} == {peer(1), peer(2)}
        assert [seen for seen in other if seen[1]] == []  # another swarm's

    trio.run(main)


class Watched(Zeroconf):
    """The real thing; it notes what was called, and in which thread."""

    def __init__(self, **options):
        self.calls = [("made", threading.get_ident())]
        super().__init__(**options)

    def register_service(self, *args, **options):
        self.calls.append(("announced", threading.get_ident()))
        super().register_service(*args, **options)

    def close(self):
        self.calls.append(("closed", threading.get_ident()))
        super().close()


@needs_multicast
def test_what_waits_for_the_network_is_not_done_on_the_event_loop():
    made = []

    def make(**options):
        made.append(Watched(**options))
        return made[0]

    async def main():
        async with on_lan(SWARM, Presence(peer(1), ("/ip4/127.0.0.1/tcp/4001",)), lambda *_: None, make):
            pass

    trio.run(main)
    assert [what for what, _ in made[0].calls] == ["made", "announced", "closed"]
    assert threading.get_ident() not in {thread for _, thread in made[0].calls}


@needs_multicast
def test_a_responder_that_cannot_announce_is_closed():
    made = []

    class Mute(Watched):
        def register_service(self, *args, **options):
            raise OSError("network is unreachable")

    def make(**options):
        made.append(Mute(**options))
        return made[0]

    async def main():
        async with on_lan(SWARM, Presence(peer(1), ("/ip4/127.0.0.1/tcp/4001",)), lambda *_: None, make) as lan:
            assert "unreachable" in lan.trouble

    trio.run(main)
    assert [what for what, _ in made[0].calls] == ["made", "closed"]
