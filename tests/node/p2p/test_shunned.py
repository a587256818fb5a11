"""Peers that are turned away, and how often they may come to hear it."""

from __future__ import annotations

import pytest
import trio
import trio.testing

import node.p2p.doorway as doorway
import node.p2p.shunned as shunned
from node.p2p.doorway import BLAME_S, TURN_S, TURNS_PER_S, Doorway
from node.p2p.shunned import Shunned
from protocol.errors import TransportError
from protocol.ids import PeerId
from simnet import runtime
from tests.node.p2p.visits import comer

A, B = PeerId("a"), PeerId("b")
BAD, GOOD = "192.0.2.1", "192.0.2.2"


async def turns(door, address, count):
    """How long each of some that come together waits; None for those that may not."""
    waited = []

    async def one():
        began = trio.current_time()
        visit = door.enter(address)
        try:
            await door.turn(visit)
            waited.append(round(trio.current_time() - began, 3))
        except TransportError:
            waited.append(None)
        finally:
            door.leave(visit)

    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(one)
    return sorted(waited, key=lambda each: -1 if each is None else each)


def test_a_shunned_peer_is_turned_away_until_its_time_is_over():
    async def main():
        book = Shunned(Doorway())
        book.add(A, 10.0)
        book.check(B)
        with pytest.raises(TransportError):
            book.check(A)
        await trio.sleep(10)
        book.check(A)
        assert not book._until

    runtime.run(main, seed=1)


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(shunned, "PEERS_MAX", 2)
    monkeypatch.setattr(doorway, "BLAMED_MAX", 2)

    async def main():
        door = Doorway()
        book = Shunned(door)
        for number in range(5):
            book.add(PeerId(str(number)), 10.0)
            door.blame(f"192.0.2.{number}")
        assert list(book._until) == ["3", "4"]
        assert list(door._blamed) == ["192.0.2.3", "192.0.2.4"]

    runtime.run(main, seed=1)


def test_handshakes_have_turns_only_where_a_shunned_peer_came_again():
    async def main():
        door = Doorway()
        book = Shunned(door)
        book.add(A, 10.0)
        assert await turns(door, BAD, 50) == [0.0] * 50
        with pytest.raises(TransportError):
            book.check(A, BAD)
        assert await turns(door, GOOD, 50) == [0.0] * 50
        waited = await turns(door, BAD, 50)
        served = [each for each in waited if each is not None]
        assert served == [round(number / TURNS_PER_S, 3) for number in range(len(served))]
        assert TURN_S - 1 / TURNS_PER_S <= served[-1] <= TURN_S
        await trio.sleep(BLAME_S)
        assert await turns(door, BAD, 50) == [0.0] * 50
        assert not door._blamed
        assert not door._pending

    runtime.run(main, seed=1)


def test_the_silent_do_not_push_out_who_waits_for_a_turn(monkeypatch):
    monkeypatch.setattr(doorway, "PENDING_PER_ADDRESS_MAX", 2)

    async def main():
        door = Doorway()
        door.blame(BAD)
        await turns(door, BAD, 1)
        gone = []
        visit = comer(door, BAD, gone)
        with trio.fail_after(TURN_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(door.turn, visit)
                await trio.testing.wait_all_tasks_blocked()
                silent = [comer(door, BAD, gone) for _ in range(5)]
        assert gone == silent[:4]
        for each in (visit, *silent):
            door.leave(each)
        assert door._count == door._queued == 0

    runtime.run(main, seed=1)


def test_all_queues_together_have_a_bound(monkeypatch):
    monkeypatch.setattr(doorway, "PENDING_MAX", 3)

    async def main():
        door = Doorway()
        door.blame(BAD)
        assert (await turns(door, BAD, 10)).count(None) == 7
        assert door._queued == 0

    runtime.run(main, seed=1)
