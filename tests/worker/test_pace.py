"""Messages by the thousand: a peer is slowed down, and nobody else."""

from __future__ import annotations

from contextlib import suppress
from itertools import count

import pytest
import trio

from protocol.capabilities import Right
from protocol.errors import TransportError
from protocol.framing import encode_frame
from protocol.ids import PeerId, SessionId
from protocol.messages import LINK, SESSION, Attach, CloseSession, OpenSession, SessionOpened
from simnet.runtime import run
from tests.helpers.rights import capability
from tests.helpers.workers import HandRoute, Swarm, in_swarm, opened, some_rows
from worker.pace import BURST_S, LINK_MESSAGES_PER_S, MESSAGES_PER_S, PEERS_REMEMBERED, YIELD_EVERY, Pace
from worker.service import OPENING_COST


@pytest.mark.parametrize("per_s", [MESSAGES_PER_S, LINK_MESSAGES_PER_S])
def test_each_peer_has_its_own_pace(per_s: float) -> None:
    async def body() -> None:
        pace, started = Pace(trio.current_time, per_s), trio.current_time()
        for _ in range(int((BURST_S + 3) * per_s)):
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


@pytest.mark.parametrize(("known", "cost"), [(True, OPENING_COST), (False, 1.0)])
def test_who_sends_tickets_has_fewer_messages(known: bool, cost: float) -> None:
    """A ticket takes as long as many other messages, whoever it is from; but only where its session is known."""
    count = round(12_000 / cost)

    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        route = await opened(swarm)
        mallory = await swarm.another("mallory")
        link, before = await mallory.dial(worker, LINK), trio.current_time()
        rubbish = OpenSession(route.session if known else SessionId(b"x" * 16), (b"rubbish",))
        for _ in range(count):
            await link.send(rubbish)
        await link.send(Attach(SessionId(bytes(16))))  # a violation, once it is its turn
        while len(worker.counts.violations) <= known * count:
            await trio.sleep(0.05)
        assert trio.current_time() - before == pytest.approx(12_000 / LINK_MESSAGES_PER_S - BURST_S, rel=0.1)
        assert route.session in worker.service.sessions.live

    in_swarm(1, test)


def test_who_gives_sessions_other_routes_without_end_slows_down_nobody_else() -> None:
    """Its first hop passes on fewer openings than the next one takes from that hop."""
    sessions, seconds = 16, 5

    async def test(swarm: Swarm) -> None:
        first, second = swarm.workers
        await swarm.client.deploy_route(swarm.workers)
        honest = await swarm.client.route(swarm.workers, "honest")
        guest = await swarm.another("guest")
        terms = {"capability": capability(swarm.client, guest.peer, Right.USE), "kv_tokens": 16}
        routes = [await guest.route(swarm.workers, f"{number}", **terms) for number in range(sessions)]
        opened = 0

        async def wander(route: HandRoute) -> None:
            nonlocal opened
            for epoch in count(1):
                await route.open(epoch=epoch, **terms)
                assert isinstance((await route.next(first))[0], SessionOpened)
                opened += 1

        async with trio.open_nursery() as nursery:
            for route in routes:
                nursery.start_soon(wander, route)
            for number in range(seconds):
                await trio.sleep(1)
                before = trio.current_time()
                await honest.do(number, number, some_rows(1))
                assert trio.current_time() - before < 0.5
            nursery.cancel_scope.cancel()
        assert opened * OPENING_COST < seconds * LINK_MESSAGES_PER_S / 3
        assert not second.counts.failed

    in_swarm(2, test, kv_memory_bytes=1 << 19)


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


@pytest.mark.parametrize(("protocol", "per_s"), [(SESSION, MESSAGES_PER_S), (LINK, LINK_MESSAGES_PER_S)])
def test_a_flood_of_messages_is_felt_by_its_sender(protocol: str, per_s: float) -> None:
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
        assert sent < (BURST_S + 5) * per_s + 20_000  # and what the stream's windows hold

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
