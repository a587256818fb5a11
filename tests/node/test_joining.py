"""Staying joined, on a virtual clock: who is dialled, when again, and who is left alone."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import trio

from node.joining import (
    BESIDE_DIAL_S,
    CHECK_S,
    FOUND_DIAL_S,
    FOUND_MAX,
    RETRY_FIRST_S,
    RETRY_MAX_S,
    Leads,
    join,
    join_found,
    stay_joined,
)
from node.p2p.dht import NEIGHBOURS_ENOUGH
from node.p2p.racing import DIALS_MAX
from protocol.errors import InputError, TransportError
from simnet import runtime
from tests.helpers.adverts import peer

OWN = peer(999)


def at(number, where="10.0.0.1"):
    return f"/ip4/{where}/tcp/4001/p2p/{peer(number)}"


class FakeTransport:
    """Peers in `up` answer; every dial is recorded with its time, and takes `dial_s`."""

    def __init__(self, *up, dial_s=0.0):
        self.peer, self.up, self.dial_s = OWN, set(up), dial_s
        self.live, self.dials = set(), []

    def connected(self):
        return tuple(sorted(self.live))

    async def connect(self, addr, *others):
        self.dials.append((trio.current_time(), addr))
        await trio.sleep(self.dial_s)
        name = addr.rpartition("/p2p/")[2]
        if name not in self.up:
            raise TransportError("silence")
        self.live.add(name)
        return name

    def lose(self, number):
        self.live.discard(peer(number))

    def times(self, number):
        return [when for when, addr in self.dials if addr.endswith(peer(number))]


def during(seconds, transport, leads, script=(), jitter=lambda: 0.0):
    """Run `stay_joined` for a while; `script` is (when, what) in order."""

    async def main():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stay_joined, transport, leads, jitter)
            for when, what in script:
                await trio.sleep_until(when)
                what()
            await trio.sleep_until(seconds)
            nursery.cancel_scope.cancel()

    runtime.run(main, seed=1)


def gaps(times):
    return [round(later - earlier, 6) for earlier, later in pairwise(times)]


def test_a_silent_lead_is_tried_ever_less_often_up_to_a_limit():
    transport = FakeTransport()
    during(200, transport, Leads([at(1)]))
    assert gaps(transport.times(1)) == [0.5, 1, 2, 4, 8, 16, *[RETRY_MAX_S] * 5]


def test_jitter_shortens_each_pause_by_up_to_half():
    first, second = FakeTransport(), FakeTransport()
    draw = random.Random(7)
    during(60, first, Leads([at(1)]), jitter=draw.random)
    during(60, second, Leads([at(1)]), jitter=draw.random)
    assert gaps(first.times(1)) != gaps(second.times(1))
    for pause, full in zip(gaps(first.times(1)), [0.5, 1, 2, 4, 8, 16, 30, 30], strict=False):
        assert full / 2 <= pause <= full


def test_a_lead_that_comes_up_is_joined_and_left_alone():
    transport = FakeTransport()
    during(100, transport, Leads([at(1)]), [(5, lambda: transport.up.add(peer(1)))])
    assert transport.connected() == (peer(1),)
    assert transport.times(1) == [0, 0.5, 1.5, 3.5, 7.5]


def test_a_lost_lead_is_dialled_again_soon_and_from_the_first_pause_on():
    transport = FakeTransport(peer(1))

    def lose():
        transport.lose(1)
        transport.up.clear()

    during(40, transport, Leads([at(1)]), [(22, lose)])
    times = transport.times(1)
    assert times[0] == 0
    assert 22 < times[1] <= 22 + CHECK_S
    assert gaps(times[1:])[:4] == [RETRY_FIRST_S, 1, 2, 4]


def test_a_lead_that_answers_and_hangs_up_is_not_hammered():
    transport = FakeTransport(peer(1))
    real = transport.connect

    async def connect(addr):
        await real(addr)
        transport.lose(1)

    transport.connect = connect
    during(30, transport, Leads([at(1)]))
    assert set(gaps(transport.times(1))) == {CHECK_S}


def test_one_connected_given_lead_is_enough_and_a_strangers_connection_is_not():
    transport = FakeTransport(peer(1))
    transport.live.add(peer(500))  # somebody dialled us: that says nothing about the swarm
    during(60, transport, Leads([at(1), at(2)]))
    assert transport.times(1) == [0]
    assert transport.times(2) == [0]  # in the first round all are tried


def test_a_peer_of_the_local_network_does_not_stand_for_the_given_ones():
    transport = FakeTransport(peer(7))
    leads = Leads([at(1)])
    leads.sighted(peer(7), (at(7),))
    during(20, transport, leads)
    assert transport.connected() == (peer(7),)
    assert len(transport.times(1)) > 4


def test_a_sighting_is_dialled_at_once_also_while_another_backs_off():
    transport, leads = FakeTransport(peer(7)), Leads([at(1)])
    during(30, transport, leads, [(20, lambda: leads.sighted(peer(7), (at(7),)))])
    assert transport.times(7) == [20]
    assert 20 not in transport.times(1)  # a flood of sightings does not defeat the others' pauses


def test_no_more_neighbours_are_sought_than_gossip_needs():
    transport, leads = FakeTransport(*(peer(i) for i in range(1, 30))), Leads()
    for number in range(1, 30):
        leads.sighted(peer(number), (at(number),))
    during(60, transport, leads)
    assert len(transport.connected()) == NEIGHBOURS_ENOUGH
    assert len(transport.dials) == NEIGHBOURS_ENOUGH
    once = FakeTransport(*(peer(i) for i in range(1, 30)))
    runtime.run(lambda: join(once, leads), seed=1)
    assert len(once.dials) == NEIGHBOURS_ENOUGH


def test_found_peers_are_bounded_and_forgotten_when_they_leave():
    leads = Leads()
    for number in range(1, 3 * FOUND_MAX):
        leads.sighted(peer(number), (at(number),))
    wanted = [lead.peer for lead in leads.wanted(OWN, ())]
    assert wanted == [peer(number) for number in range(3 * FOUND_MAX - 1, 2 * FOUND_MAX - 1, -1)]
    for number in range(1, 3 * FOUND_MAX):
        leads.sighted(peer(number), ())
    assert not leads


def test_the_same_sighting_again_wakes_nobody():
    leads = Leads()
    leads.sighted(peer(1), (at(1),))
    changed = leads.changed
    leads.sighted(peer(1), (at(1),))
    assert not changed.is_set()
    leads.sighted(peer(1), (at(1, "10.0.0.2"),))
    assert changed.is_set()


def test_a_node_never_dials_itself_also_when_it_was_named():
    """So every machine may be started with the same command, the first one too."""
    transport, leads = FakeTransport(), Leads([at(999)])
    leads.sighted(OWN, (at(999),))
    during(60, transport, leads)
    assert transport.dials == []


def test_all_addresses_of_a_lead_are_dialled_as_one():
    transport = FakeTransport()

    async def connect(*addrs):
        transport.dials.append(addrs)
        transport.live.add(peer(1))

    transport.connect = connect
    during(10, transport, Leads([at(1), at(2), at(1, "10.0.0.2"), at(1, "10.0.0.3")]))
    assert transport.dials[0] == (at(1), at(1, "10.0.0.2"), at(1, "10.0.0.3"))


def test_peers_are_dialled_side_by_side_a_few_at_a_time():
    async def main():
        some = FakeTransport(peer(1), dial_s=1.0)
        await join(some, Leads([at(number) for number in range(DIALS_MAX + 3, 0, -1)]))
        assert [when for when, _ in some.dials] == [0.0] * DIALS_MAX + [1.0] * 3
        assert some.connected() == (peer(1),)

    runtime.run(main, seed=1)


def test_without_leads_nothing_happens_until_one_is_found():
    transport, leads = FakeTransport(peer(1)), Leads()
    assert not leads
    during(100, transport, leads, [(90, lambda: leads.sighted(peer(1), (at(1),)))])
    assert transport.dials == [(90, at(1))]


def test_a_malformed_address_is_said_at_once():
    for bad in ("", "127.0.0.1:4001", "/ip4/127.0.0.1/tcp/4001", f"/ip4/127.0.0.1/udp/1/p2p/{peer(1)}"):
        with pytest.raises(InputError):
            Leads([bad])


def test_joining_once_tries_all_and_complains_when_none_answers():
    async def main():
        some = FakeTransport(peer(2))
        await join(some, Leads([at(1), at(2), at(3)]))
        assert some.connected() == (peer(2),)
        assert len(some.dials) == 3
        with pytest.raises(TransportError, match="no bootstrap address answers"):
            await join(FakeTransport(), Leads([at(1), at(2)]))
        await join(FakeTransport(), Leads())

    runtime.run(main, seed=1)


def test_given_leads_that_swallow_dials_hold_up_nobody_who_is_in():
    async def main():
        some = FakeTransport(peer(1))
        answer = some.connect

        async def connect(addr, *others):
            some.dial_s = 0.0 if addr == at(1) else 60.0
            return await answer(addr)

        some.connect = connect
        started = trio.current_time()
        await join(some, Leads([at(1), at(2), at(3)]))
        assert some.connected() == (peer(1),)
        assert trio.current_time() - started == BESIDE_DIAL_S

    runtime.run(main, seed=1)


def test_invented_peers_of_the_local_network_cost_a_moment_each():
    """They swallow dials; the honest one, seen first, is dialled last."""
    transport, leads = FakeTransport(peer(1), dial_s=0.02), Leads()
    real = transport.connect

    async def connect(addr, *others):
        if not addr.endswith(peer(1)):
            await trio.sleep_forever()
        return await real(addr)

    transport.connect = connect
    leads.sighted(peer(1), (at(1),))
    for number in range(2, 5):
        leads.sighted(peer(number), tuple(at(number, f"10.0.0.{i}") for i in range(1, 9)))

    async def main():
        with trio.fail_after(10):
            await join_found(transport, leads)
        assert transport.connected() == (peer(1),)
        assert trio.current_time() <= FOUND_DIAL_S + 0.02

    runtime.run(main, seed=1)


def test_the_local_network_is_waited_for_until_somebody_answers():
    transport, leads = FakeTransport(peer(2)), Leads()

    async def main():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(join_found, transport, leads)
            await trio.sleep(3)
            leads.sighted(peer(1), (at(1),))
            await trio.sleep(3)
            leads.sighted(peer(2), (at(2),))
        assert trio.current_time() == 6
        assert transport.connected() == (peer(2),)

    runtime.run(main, seed=1)
