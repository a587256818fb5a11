"""Messages by the thousand: a peer is slowed down, and nobody else."""

from __future__ import annotations

from contextlib import suppress
from itertools import count

import pytest
import trio

from protocol.errors import TransportError
from protocol.framing import encode_frame
from protocol.ids import PeerId, SessionId
from protocol.messages import LINK, SESSION, Attach, CloseSession, OpenSession
from simnet.runtime import run
from tests.helpers.workers import Swarm, in_swarm, opened, some_rows
from worker.pace import BURST, MESSAGES_PER_S, PEERS_REMEMBERED, YIELD_EVERY, Pace
from worker.service import OPENING_COST


def test_each_peer_has_its_own_pace() -> None:
    async def body() -> None:
        pace, started = Pace(trio.current_time), trio.current_time()
        for _ in range(int(BURST + 3 * MESSAGES_PER_S)):
            await pace.take(PeerId("flood"), 1)
        assert trio.current_time() - started == pytest.approx(3.0, rel=0.01)
        now = trio.current_time()
        for _ in range(100):
            await pace.take(PeerId("honest"), 1)
        assert trio.current_time() == now
        for number in range(2 * PEERS_REMEMBERED):
            await pace.take(PeerId(str(number)), 1)
        assert len(pace._peers) == PEERS_REMEMBERED

    run(body, 1)


def test_who_sends_tickets_has_fewer_messages() -> None:
    """A ticket takes as long as many other messages, and whoever it is from need have no session."""
    count, costs = 600, 600 * OPENING_COST

    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        mallory = await swarm.another("mallory")
        link, before = await mallory.dial(worker, LINK), trio.current_time()
        for number in range(count):
            await link.send(OpenSession(SessionId(number.to_bytes(16)), (b"rubbish",)))
        await link.send(Attach(SessionId(bytes(16))))  # a violation, once it is its turn
        while not worker.counts.violations:
            await trio.sleep(0.1)
        assert trio.current_time() - before == pytest.approx((costs - BURST) / MESSAGES_PER_S, rel=0.1)

    in_swarm(1, test)


class Others:
    """What else the loop has to do: it counts its turns."""

    turns = 0

    async def run(self) -> None:
        while True:
            self.turns += 1
            await trio.lowlevel.checkpoint()


def test_a_burst_lets_others_run() -> None:
    async def body() -> None:
        pace, others = Pace(trio.current_time), Others()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(others.run)
            for number in range(10 * YIELD_EVERY):
                await pace.take(PeerId("burst"), number + 1)
            nursery.cancel_scope.cancel()
        assert others.turns >= 10

    run(body, 1)


def test_what_one_read_brings_is_not_parted_but_for_what_costs_much() -> None:
    async def body() -> None:
        pace, others = Pace(trio.current_time), Others()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(others.run)
            for _ in range(5):
                for number in range(1, YIELD_EVERY):
                    await pace.take(PeerId("burst"), number)
            assert others.turns == 0
            for number in range(1, 6):
                await pace.take(PeerId("burst"), number, OPENING_COST)
                assert abs(others.turns - number) <= 1
            nursery.cancel_scope.cancel()

    run(body, 1)


@pytest.mark.parametrize("protocol", [SESSION, LINK])
def test_a_flood_of_messages_is_felt_by_its_sender(protocol: str) -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        route = await opened(swarm)
        mallory = await swarm.another("mallory")
        stream = await mallory.endpoint.open(worker.peer, worker.endpoint.addrs, protocol)
        data = encode_frame(CloseSession(SessionId(b"x" * 16))) * 1000
        sent = 0

        async def flood() -> None:
            nonlocal sent
            while True:
                await stream.send(data)
                sent += 1000

        async with trio.open_nursery() as nursery:
            nursery.start_soon(flood)
            for number in range(3):
                await trio.sleep(1)
                before = trio.current_time()
                await route.do(number, 3 * number, some_rows(3))
                assert trio.current_time() - before < 0.5
            nursery.cancel_scope.cancel()
        assert sent < BURST + 5 * MESSAGES_PER_S + 20_000  # and what the stream's windows hold

    in_swarm(1, test)


def test_attaching_without_end_leaves_nothing() -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        mallory = await swarm.another("mallory")
        stream = await mallory.endpoint.open(worker.peer, worker.endpoint.addrs, SESSION)
        with trio.move_on_after(5), suppress(TransportError):  # who does not hear the answers loses its stream
            for number in count(0, 100):
                ids = (SessionId((number + i).to_bytes(16)) for i in range(100))
                await stream.send(b"".join(encode_frame(Attach(each)) for each in ids))
        await stream.aclose()
        await trio.sleep(5)
        worker.assert_idle()
        assert not worker.service._outboxes

    in_swarm(1, test)
