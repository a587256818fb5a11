"""Who has to go when the doorway is full, and how addresses race."""

from __future__ import annotations

import pytest
import trio
from multiaddr import Multiaddr

import node.p2p.doorway as doorway
from node.p2p.doorway import Doorway, source_of
from node.p2p.racing import race
from protocol.errors import TransportError
from simnet import runtime
from tests.node.p2p.visits import comer


def test_the_one_that_waited_longest_at_its_address_goes(monkeypatch):
    monkeypatch.setattr(doorway, "PENDING_PER_ADDRESS_MAX", 2)
    door = Doorway()
    gone = []
    comer(door, "192.0.2.1", gone)
    visits = [comer(door, "192.0.2.2", gone) for _ in range(4)]
    assert gone == visits[:2]
    assert door._count == 3


def test_when_all_places_are_taken_the_address_with_the_most_loses_one(monkeypatch):
    monkeypatch.setattr(doorway, "PENDING_MAX", 4)
    door = Doorway()
    gone = []
    crowd = [comer(door, "192.0.2.2", gone) for _ in range(3)]
    for i in range(2):
        comer(door, f"198.51.100.{i}", gone)
    assert gone == crowd[:1]
    assert door._count == 4


def test_who_was_admitted_is_never_asked_to_go(monkeypatch):
    monkeypatch.setattr(doorway, "PENDING_PER_ADDRESS_MAX", 1)
    door = Doorway()
    gone = []
    admitted = comer(door, "192.0.2.1", gone)
    door.leave(admitted)
    door.leave(admitted)
    later = [comer(door, "192.0.2.1", gone) for _ in range(2)]
    assert gone == later[:1]
    door.leave(later[1])
    assert door._count == 0
    assert door._pending == {}


@pytest.mark.parametrize(
    ("address", "source"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
    ],
)
def test_neighbouring_addresses_of_one_customer_count_as_one(address, source):
    assert source_of(address) == source


ADDRS = [Multiaddr(f"/ip4/192.0.2.{i}/tcp/1") for i in range(3)]


def test_the_next_address_starts_when_one_fails_or_is_slow_and_the_losers_are_cancelled():
    started = []

    async def attempt(maddr):
        started.append((maddr, trio.current_time()))
        if maddr == ADDRS[0]:
            raise TransportError("refused")
        await trio.sleep(10 if maddr == ADDRS[1] else 0.1)
        return maddr

    async def main():
        began = trio.current_time()
        assert await race(ADDRS, attempt, pytest.fail) == ADDRS[2]
        assert [(maddr, round(at - began, 3)) for maddr, at in started] == [
            (ADDRS[0], 0),
            (ADDRS[1], 0),
            (ADDRS[2], 0.25),
        ]
        assert round(trio.current_time() - began, 3) == 0.35

    runtime.run(main, seed=1)


def test_what_a_loser_still_brings_is_discarded_and_a_late_winner_is_not_lost():
    discarded = []

    async def stubborn(maddr):
        with trio.CancelScope(shield=True):
            await trio.sleep(1 if maddr == ADDRS[0] else 2)
        return maddr

    async def main():
        assert await race(ADDRS[:2], stubborn, discarded.append) == ADDRS[0]
        assert discarded == [ADDRS[1]]
        with trio.move_on_after(0.5):
            discarded.append(await race(ADDRS[:1], stubborn, discarded.append))
        assert discarded == [ADDRS[1], ADDRS[0]]  # the caller has it: it is the caller's to close

    runtime.run(main, seed=1)


def test_when_all_fail_the_first_reason_is_told():
    async def attempt(maddr):
        raise TransportError(str(maddr))

    async def main():
        with pytest.raises(TransportError, match=r"192\.0\.2\.0"):
            await race(ADDRS, attempt, pytest.fail)
        with pytest.raises(TransportError, match="no usable address"):
            await race([], attempt, pytest.fail)

    runtime.run(main, seed=1)
