"""Connections that have said nothing yet: what they cost, who gets in, who is turned away."""

from __future__ import annotations

import errno
import os
import socket
from contextlib import asynccontextmanager
from itertools import pairwise

import pytest
import trio
import trio.testing

import node.p2p.accepting as accepting
import node.p2p.doorway as doorway
from node.p2p.accepting import MULTISTREAM, Acceptor
from node.p2p.doorway import Doorway
from node.p2p.records import MAGIC
from tests.conformance.adapters import until
from tests.node.p2p.meshes import guarded

GUARD_S = 10.0


class Door:
    """An acceptor on loopback; `inside` has what each connection said that got in."""

    def __init__(self):
        self.doorway, self.inside, self.visits = Doorway(), [], []
        self.listening = socket.create_server(("127.0.0.1", 0), backlog=200)
        self.listening.setblocking(False)
        self.acceptor = Acceptor([self.listening], self.doorway, self._greeted)

    def _greeted(self, sock, said, visit):
        self.inside.append((sock, said))
        self.visits.append(visit)

    async def connect(self):
        return await trio.open_tcp_stream(*self.listening.getsockname())


@asynccontextmanager
async def door():
    at = Door()
    with at.listening:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(at.acceptor.run)
            yield at
            nursery.cancel_scope.cancel()
    for sock, _ in at.inside:
        sock.close()


def run(body):
    guarded(body, door(), guard_s=GUARD_S)


def test_the_silent_have_no_tasks_and_go_with_the_node():
    async def main():
        async with door() as at:
            tasks = trio.lowlevel.current_statistics().tasks_living
            streams = [await at.connect() for _ in range(50)]
            await until(lambda: at.doorway._count == 50)
            assert trio.lowlevel.current_statistics().tasks_living == tasks
        assert at.doorway._count == 0
        for stream in streams:
            with pytest.raises(trio.BrokenResourceError):
                await stream.receive_some(1)

    trio.run(main)


@pytest.mark.parametrize("greeting", [MAGIC, MULTISTREAM])
def test_a_greeting_may_come_in_parts_and_is_handed_over_with_what_follows(greeting):
    async def body(at):
        stream = await at.connect()
        for byte in greeting[:-1]:
            await stream.send_all(bytes([byte]))
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert not at.inside
        await stream.send_all(greeting[-1:] + b"more")
        await until(lambda: at.inside)
        assert at.inside[0][1] == greeting + b"more"
        assert not at.acceptor._silent
        assert at.doorway._count == 1  # it keeps its place until it has proven who it is
        at.doorway.leave(at.visits[0])

    run(body)


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\n", MAGIC[:4] + b"x", b"\x13/multistream/2", b"\x00"])
def test_who_says_anything_else_is_gone_at_once(said):
    async def body(at):
        stream = await at.connect()
        await stream.send_all(said)
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some(1)
        assert not at.inside
        assert at.doorway._count == 0

    run(body)


def test_who_leaves_gives_the_place_back(monkeypatch):
    monkeypatch.setattr(accepting, "FIRST_BYTES_S", 60.0)

    async def body(at):
        for said in (b"", MAGIC[:3]):
            stream = await at.connect()
            await stream.send_all(said)
            await until(lambda: at.doorway._count == 1)
            await stream.aclose()
            await until(lambda: at.doorway._count == 0)

    run(body)


def test_who_stays_silent_goes_and_who_greeted_stays(monkeypatch):
    monkeypatch.setattr(accepting, "FIRST_BYTES_S", 0.2)

    async def body(at):
        stream, silent = await at.connect(), await at.connect()
        await stream.send_all(MAGIC)
        with pytest.raises(trio.BrokenResourceError):
            await silent.receive_some(1)
        (sock, _), (visit,) = at.inside[0], at.visits
        sock.sendall(b"here")
        assert await stream.receive_some(4) == b"here"
        at.doorway.leave(visit)

    run(body)


def test_a_crowd_takes_the_places_of_its_oldest_and_leaves_others_their_turns(monkeypatch):
    monkeypatch.setattr(doorway, "PENDING_PER_ADDRESS_MAX", 20)

    async def main():
        at = Door()
        entered, seen = [], []
        enter = at.doorway.enter
        at.doorway.enter = lambda address: entered.append(address) or enter(address)
        crowd = [await at.connect() for _ in range(100)]

        async def other_work():
            while len(entered) < 100:
                seen.append(len(entered))
                await trio.lowlevel.checkpoint()
            seen.append(len(entered))

        with trio.fail_after(GUARD_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(at.acceptor.run)
                await other_work()
                nursery.cancel_scope.cancel()
        at.listening.close()
        most = max(later - earlier for earlier, later in pairwise(seen))
        assert most <= 2 * 8  # trio shuffles who goes first in each turn
        for stream in crowd[:80]:
            with pytest.raises(trio.BrokenResourceError):
                await stream.receive_some(1)

    trio.run(main)


def test_without_room_for_another_the_longest_silent_goes():
    class Full:
        def accept(self):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    async def body(at):
        first, second = await at.connect(), await at.connect()
        await until(lambda: at.doorway._count == 2)
        at.acceptor._accept(Full())
        with pytest.raises(trio.BrokenResourceError):
            await first.receive_some(1)
        assert at.doorway._count == 1
        await second.send_all(MAGIC)
        await until(lambda: at.inside)  # it goes on after a pause
        at.doorway.leave(at.visits[0])

    run(body)
