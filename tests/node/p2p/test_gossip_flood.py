"""Many who flood at once, and what is left for those who do not."""

from __future__ import annotations

from collections import Counter, OrderedDict
from itertools import count

import pytest
import trio
from libp2p.peer.id import ID
from libp2p.pubsub.pb import rpc_pb2

from node.p2p.allowance import Shared
from node.p2p.gossip import FORWARDED_PER_S, RECEIVED_BURST, RECEIVED_PER_S, GuardedPubsub
from protocol.limits import ADVERT_INTERVAL_MAX_S
from simnet import runtime
from tests.helpers.adverts import peer
from tests.node.p2p.meshes import TOPIC, two_meshes

SECONDS = 60


class Guard(GuardedPubsub):
    """The guard without the service: it takes messages from neighbours `at` addresses, None for a relayed one."""

    def __init__(self, at):
        self._forwarding = OrderedDict()
        self._received = Shared(RECEIVED_PER_S, RECEIVED_BURST, trio.current_time())
        self._address_of = {ID.from_base58(peer(number)): address for number, address in at.items()}.get
        self.seen = set()

    def _is_msg_seen(self, msg):
        return msg.data in self.seen


def taken(at, per_s, seen=False):
    """How many messages a second are taken from each neighbour that forwards so many, after the first bursts."""

    async def main():
        guard, numbers, got = Guard(at), count(), Counter()

        async def forward(number, rate):
            while True:
                message = rpc_pb2.Message(data=next(numbers).to_bytes(4, "big"))
                if seen:
                    guard.seen.add(message.data)
                if guard._admit(ID.from_base58(peer(number)), message) and trio.current_time() > SECONDS / 2:
                    got[number] += 1
                await trio.sleep(1 / rate)

        with trio.move_on_after(SECONDS):
            async with trio.open_nursery() as nursery:
                for number, rate in per_s.items():
                    nursery.start_soon(forward, number, rate)
        return {number: got[number] / (SECONDS / 2) for number in per_s}

    return runtime.run(main, seed=1)


FLOODERS = range(10, 15)


@pytest.mark.parametrize("address", ["192.0.2.66", None])
def test_one_host_with_many_identities_cannot_use_up_the_others_part(address):
    honest = {1: 5.0, 2: 3.0, 3: 0.5}
    at = {1: "192.0.2.1", 2: "192.0.2.2", 3: "2001:db8::1"} | dict.fromkeys(FLOODERS, address)
    got = taken(at, honest | dict.fromkeys(FLOODERS, 50.0))
    assert {number: got[number] for number in honest} == pytest.approx(honest, abs=0.07)
    assert sum(got.values()) <= RECEIVED_PER_S * 1.02
    assert sum(got[number] for number in FLOODERS) >= 0.9 * (RECEIVED_PER_S - sum(honest.values())), "it has the rest"


def test_a_flood_from_many_addresses_leaves_each_other_an_equal_part():
    at = {1: "192.0.2.1", 2: "192.0.2.2"} | {number: f"198.51.100.{number}" for number in FLOODERS}
    got = taken(at, {1: 5.0, 2: 12.0} | dict.fromkeys(FLOODERS, 50.0))
    assert got[1] >= 4.7, "less than its part"
    assert got[2] >= 0.8 * RECEIVED_PER_S / 7, "more than its part"
    assert sum(got.values()) <= RECEIVED_PER_S * 1.02


def test_who_is_alone_has_all_that_a_neighbour_may_forward():
    assert taken({1: "192.0.2.1"}, {1: 100.0})[1] == pytest.approx(FORWARDED_PER_S, rel=0.02)


def test_an_honest_swarm_of_3000_is_heard_whole():
    per_s = 1.1 * 3000 / ADVERT_INTERVAL_MAX_S  # and what changes meanwhile
    at = {number: f"192.0.2.{number}" for number in range(1, 7)}
    assert sum(taken(at, dict.fromkeys(at, per_s / 6)).values()) == pytest.approx(per_s, rel=0.02)


def test_what_was_seen_before_is_not_rationed():
    at = {number: f"192.0.2.{number}" for number in range(1, 13)}
    assert sum(taken(at, dict.fromkeys(at, 17.0), seen=True).values()) == pytest.approx(12 * 17.0, rel=0.02)


@pytest.mark.parametrize("valid", [True, False])
def test_one_message_of_several_neighbours_is_rationed_once(valid, monkeypatch):
    async def body(a, b):
        calls, sent = [], []

        def validate(message):
            calls.append(message.data)
            return valid

        async def keep(_, message):
            sent.append(message)

        await a.subscribe(TOPIC, validate)
        monkeypatch.setattr(b._pubsub, "push_msg", keep)
        await b.publish(TOPIC, b"new")
        forged = rpc_pb2.Message()
        forged.CopyFrom(sent[0])
        forged.data = b"of its number, to be taken for it"
        for number, message in enumerate([forged, *5 * sent], start=1):
            neighbour = ID.from_base58(peer(number))
            if a._pubsub._admit(neighbour, message):
                await a._pubsub.push_msg(neighbour, message)
        assert calls == [b"new"]
        assert a._pubsub._received._had.total() == 2, "the forged one, and the right one once"

    two_meshes(body)


def test_a_newcomer_may_catch_up_at_once():
    shared = Shared(RECEIVED_PER_S, RECEIVED_BURST, 0.0)
    assert all(shared.take("hub", 0.0) for _ in range(200))
    assert not all(shared.take("hub", 0.0) for _ in range(10))
    assert all(shared.take(f"other {number}", 0.0) for number in range(100))
    assert shared.take("hub", 100.0), "long ago"
