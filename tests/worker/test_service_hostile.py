"""What hostile clients and hops can send, and that it costs nobody else anything."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import trio

from protocol import limits
from protocol.channel import Channel
from protocol.errors import TransportError
from protocol.ids import SessionId, ShardDigest
from protocol.messages import (
    CONTROL,
    LINK,
    SESSION,
    SHARD,
    Attach,
    Attached,
    CloseSession,
    Message,
    OpenSession,
    Ping,
    Pong,
    RefusalReason,
    SessionFailed,
    SessionOpened,
    ShardPiece,
)
from protocol.tickets import issue_ticket
from simnet.compute import CostModel, ToyCompute, toy_answer
from tests.helpers.workers import HandRoute, Swarm, attached, in_swarm, make_manifest, opened, some_rows
from worker import inbox, service, sessions
from worker.config import Quotas

ROWS = some_rows(3)


async def refused(route: HandRoute, worker: int = 0) -> str:
    """Why the next message of the hop says that the session failed; all of it must be free soon after."""
    message, _ = await route.next(route.workers[worker])
    assert isinstance(message, SessionFailed), message
    await trio.sleep(1)
    route.workers[worker].assert_idle()
    return message.reason


@pytest.mark.parametrize(
    "forge",
    [
        {"expires_ms": 1},
        {"expires_ms": 1 << 52},
        {"session": b"x" * 16},
        {"predecessor": "W"},
        {"worker": "W"},
        {"successor": "W"},
    ],
    ids=lambda terms: next(iter(terms)),
)
def test_a_ticket_that_does_not_hold_fails_the_session(forge: dict[str, Any]) -> None:
    async def test(swarm: Swarm) -> None:
        route = await attached(swarm)
        (ticket,) = route.tickets()
        forged = replace(
            ticket, **{key: swarm.workers[1].peer if value == "W" else value for key, value in forge.items()}
        )
        await route.send(OpenSession(route.session, route.boxes([forged])))
        assert await refused(route) == RefusalReason.BAD_TICKET
        assert swarm.workers[0].counts.violations == [(swarm.client.peer, SESSION)]

    in_swarm(2, test)


def test_a_ticket_signed_by_another_than_its_client_is_refused() -> None:
    async def test(swarm: Swarm) -> None:
        route = await attached(swarm)
        mallory = await swarm.another("mallory")
        box = issue_ticket(route.tickets()[0], mallory.identity)
        await route.send(OpenSession(route.session, (box,)))
        assert await refused(route) == RefusalReason.BAD_TICKET

    in_swarm(1, test)


def test_a_replayed_ticket_is_refused() -> None:
    async def test(swarm: Swarm) -> None:
        route = await attached(swarm)
        boxes = route.boxes(route.tickets())
        for expected in (SessionOpened, SessionFailed):
            await route.send(OpenSession(route.session, boxes))
            message, _ = await route.next()
            assert isinstance(message, expected)
        assert isinstance(message, SessionFailed)
        assert message.reason == RefusalReason.BAD_TICKET

    in_swarm(1, test)


@pytest.mark.parametrize(
    ("terms", "reason"),
    [
        ({"deployment": b"another deployed"}, RefusalReason.UNKNOWN_DEPLOYMENT),
        ({"start": 1}, RefusalReason.UNKNOWN_DEPLOYMENT),
        ({"kv_tokens": 513}, RefusalReason.UNSUPPORTED),
        ({"kv_tokens": 512}, RefusalReason.KV_MEMORY),
    ],
)
def test_what_a_good_ticket_cannot_have(terms: dict[str, Any], reason: str) -> None:
    async def test(swarm: Swarm) -> None:
        route = await attached(swarm)
        await route.open(**terms)
        assert await refused(route) == reason

    in_swarm(1, test, kv_memory_bytes=1 << 14)


def test_another_clients_deployment_is_forbidden() -> None:
    async def test(swarm: Swarm) -> None:
        await swarm.client.deploy_route(swarm.workers)
        route = HandRoute(await swarm.another("mallory"), swarm.workers, SessionId(b"m" * 16))
        await route.dial()
        await route.attach()
        await route.open()
        assert await refused(route) == RefusalReason.FORBIDDEN

    in_swarm(1, test)


def test_a_client_that_attached_anothers_session_gets_nothing() -> None:
    async def test(swarm: Swarm) -> None:
        await swarm.client.deploy_route(swarm.workers)
        session = SessionId(b"s" * 16)
        mallory = HandRoute(await swarm.another("mallory"), swarm.workers, session)
        await mallory.dial()
        await mallory.attach()
        honest = HandRoute(swarm.client, swarm.workers, session)
        await honest.dial()
        await honest.send(Attach(session))
        assert await honest.next() == (
            SessionFailed(session, "forbidden", "the session is attached to another stream"),
            b"",
        )
        # the honest ticket, sent on by the client itself, must not make Mallory's stream the one that is answered
        await honest.open()
        assert await refused(mallory) == RefusalReason.BAD_TICKET

    in_swarm(1, test)


def test_strangers_cannot_touch_an_open_session() -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        route = await opened(swarm)
        mallory = await swarm.another("mallory")
        link = await mallory.dial(worker, LINK)
        step, body = route.step(0, 0, ROWS)
        await link.send(step, body)
        await link.send(CloseSession(route.session))
        await link.send(OpenSession(route.session, (b"rubbish",)))
        await link.send(OpenSession(route.session, route.boxes(route.tickets(epoch=1))))
        own = replace(route.tickets(epoch=1)[0], client=mallory.peer, predecessor=mallory.peer)
        await link.send(OpenSession(route.session, (issue_ticket(own, mallory.identity),)))
        await link.send(Attach(route.session))
        await trio.sleep(1)
        assert worker.counts.violations == [(mallory.peer, LINK)] * 6
        np.testing.assert_array_equal(await route.do(0, 0, ROWS), toy_answer(range(2), ROWS)[-1:])

    in_swarm(1, test)


def test_a_step_from_another_than_the_predecessor_is_dropped() -> None:
    async def test(swarm: Swarm) -> None:
        first, second = swarm.workers
        await swarm.client.deploy_route(swarm.workers)
        route = await swarm.client.route(swarm.workers)
        await route.send(*route.step(0, 0, ROWS), to=second)  # the client itself, past the first hop
        assert await route.ended(second)
        assert second.counts.violations == [(swarm.client.peer, SESSION)]
        assert second.counts.computed == 0
        await trio.sleep(1)
        second.assert_idle()
        assert first.service.sessions.live

    in_swarm(2, test)


@pytest.mark.parametrize(
    ("number", "position", "count", "epoch"),
    [(2, 5, 1, 0), (2, 4, 61, 0), (2, 4, 1, 1), (0, 0, 1, 0)],
    ids=["beyond what is held", "beyond the reservation", "future epoch", "answered and acknowledged"],
)
def test_a_step_that_no_client_could_mean_fails_its_session(number: int, position: int, count: int, epoch: int) -> None:
    async def test(swarm: Swarm) -> None:
        route = await opened(swarm)
        await route.do(0, 0, ROWS)
        await route.do(1, 3, ROWS[:1], acked=1)
        await route.send(*route.step(number, position, some_rows(count), epoch=epoch))
        assert await refused(route) == RefusalReason.BAD_STEP
        await route.attach()  # the stream goes on

    in_swarm(1, test)


@pytest.mark.parametrize("bound", ["count", "bytes"])
def test_overflow_fails_that_session_only(bound: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if bound == "count":
        monkeypatch.setattr(inbox, "INBOX_MAX", 4)
    else:
        monkeypatch.setattr(limits, "STEP_BYTES_WAITING_MAX", 4 * ROWS[:1].nbytes)

    async def test(swarm: Swarm) -> None:
        last = swarm.workers[-1]
        await swarm.client.deploy_route(swarm.workers)
        calm = await swarm.client.route(swarm.workers)
        greedy = await swarm.client.route(swarm.workers, "greedy")
        for index in range(8):
            await greedy.send(*greedy.step(index, index, some_rows(1)))
        message, _ = await greedy.next(swarm.workers[0])
        assert isinstance(message, SessionFailed)
        assert message.reason == RefusalReason.BAD_STEP
        np.testing.assert_array_equal(await calm.do(0, 0, ROWS), toy_answer(range(4), ROWS)[-1:])
        assert not last.counts.failed

    in_swarm(2, test, compute=lambda _: ToyCompute(CostModel(step_s=2.0)))


def test_a_client_that_does_not_read_holds_up_nobody() -> None:
    rows = some_rows(60)

    async def test(swarm: Swarm) -> None:
        await swarm.client.deploy_route(swarm.workers)
        deaf = await swarm.client.route(swarm.workers, "deaf", returns="float32", kv_tokens=64)
        for index in range(60):  # copies from the first hop and answers from the last, all unread
            await deaf.send(*deaf.step(index, index, rows[index : index + 1], acked=index))
        other = await swarm.client.route(swarm.workers, "other", kv_tokens=64)
        np.testing.assert_array_equal(await other.do(0, 0, ROWS), toy_answer(range(4), ROWS)[-1:])

    in_swarm(2, test)


def test_an_id_cannot_be_used_again_while_the_engine_holds_it() -> None:
    """Two sessions of one id would free each other's memory, and break the link that the second comes by."""

    async def test(swarm: Swarm) -> None:
        first, second = swarm.workers
        await swarm.client.deploy_route(swarm.workers)
        calm = await swarm.client.route(swarm.workers)
        route = await swarm.client.route(swarm.workers, "twice")
        await route.send(*route.step(0, 0, ROWS))
        await trio.sleep(3)
        await route.send(CloseSession(route.session), to=second)
        await route.send(Attach(route.session), to=second)
        message, _ = await route.next(second)
        assert isinstance(message, SessionFailed)
        assert message.reason == RefusalReason.FORBIDDEN
        await route.open(epoch=1)
        np.testing.assert_array_equal(await calm.do(0, 0, ROWS), toy_answer(range(4), ROWS)[-1:])
        await route.send(Attach(route.session), to=second)
        assert await route.next(second) == (Attached(route.session), b""), "free again"
        assert not second.counts.violations
        assert calm.session in first.service.sessions.live

    in_swarm(2, test, compute=lambda _: ToyCompute(CostModel(step_s=2.0)))


def test_an_attachment_that_nobody_opens_is_dropped() -> None:
    async def test(swarm: Swarm) -> None:
        route = await attached(swarm)
        before = trio.current_time()
        await trio.sleep(sessions.ATTACH_LIFE_S - 20)
        assert await refused(route) == RefusalReason.UNKNOWN_SESSION
        assert sessions.ATTACH_LIFE_S <= trio.current_time() - before < sessions.ATTACH_LIFE_S + 10

    in_swarm(1, test)


def test_attachments_are_bounded_per_client() -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        channel = await swarm.client.dial(worker, SESSION)
        names = [SessionId(number.to_bytes(16, "big")) for number in range(limits.SESSIONS_PER_PEER_MAX + 1)]
        for name in names[:-1]:
            assert await channel.call(Attach(name)) == Attached(name)
        message = await channel.call(Attach(names[-1]))
        assert isinstance(message, SessionFailed)
        assert message.reason == RefusalReason.SESSIONS
        other = await (await swarm.another("bob")).dial(worker, SESSION)
        assert await other.call(Attach(names[-1])) == Attached(names[-1])
        await channel.aclose()
        await other.aclose()
        await trio.sleep(1)
        worker.assert_idle()

    in_swarm(1, test)


def test_messages_of_unknown_sessions_are_answered_to_clients_and_dropped_on_links() -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        route = HandRoute(swarm.client, swarm.workers, SessionId(b"s" * 16))
        await route.dial()
        for message, body in (route.step(0, 0, ROWS), (OpenSession(route.session, (b"x",)), b"")):
            await route.send(message, body)
            answer, _ = await route.next()
            assert isinstance(answer, SessionFailed)
            assert answer.reason == RefusalReason.UNKNOWN_SESSION
        link = await swarm.client.dial(worker, LINK)
        await link.send(*route.step(0, 0, ROWS))
        await link.send(CloseSession(route.session))
        await trio.sleep(1)
        assert not worker.counts.violations

    in_swarm(1, test)


WRONG: list[tuple[str, Message, bytes]] = [
    (CONTROL, Attach(SessionId(b"s" * 16)), b""),
    (CONTROL, Pong(bytes(8)), b""),
    (SHARD, ShardPiece(ShardDigest(bytes(32)), 0), b"piece"),
    (SHARD, Ping(bytes(8)), b""),
    (SESSION, Ping(bytes(8)), b""),
    (SESSION, ShardPiece(ShardDigest(bytes(32)), 0), b"piece"),
    (SESSION, Attached(SessionId(b"s" * 16)), b""),
]


@pytest.mark.parametrize(("protocol", "message", "body"), WRONG)
def test_a_message_out_of_place_closes_the_stream_and_is_counted(protocol: str, message: Message, body: bytes) -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        channel = await swarm.client.dial(worker, protocol)
        await channel.send(message, body)
        assert await channel.receive() is None
        assert worker.counts.violations == [(swarm.client.peer, protocol)]
        assert await swarm.client.ask(worker, Ping(bytes(8))) == Pong(bytes(8)), "the node lives"

    in_swarm(1, test)


@pytest.mark.parametrize("protocol", [CONTROL, SHARD, SESSION, LINK])
@pytest.mark.parametrize(
    "data",
    [b"\xff" * 8, bytes.fromhex("00000008 00000004 9163ffff"), bytes.fromhex("00000006 00000002 91cd"), b"\0" * 64],
    ids=["oversized", "unknown message", "truncated msgpack", "zeros"],
)
def test_rubbish_closes_the_stream_and_is_counted(protocol: str, data: bytes) -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        stream = await swarm.client.endpoint.open(worker.peer, worker.endpoint.addrs, protocol)
        await stream.send(data)
        assert await Channel(stream, protocol).receive() is None
        assert worker.counts.violations == [(swarm.client.peer, protocol)]
        assert await swarm.client.ask(worker, Ping(bytes(8))) == Pong(bytes(8)), "the node lives"

    in_swarm(1, test)


def test_who_breaks_the_protocol_again_and_again_is_shunned_for_a_while() -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        mallory = await swarm.another("mallory")

        async def violate() -> None:
            stream = await mallory.endpoint.open(worker.peer, worker.endpoint.addrs, CONTROL)
            await stream.send(b"\xff" * 8)
            with suppress(TransportError):
                await stream.receive(1)
            await stream.aclose()

        link = await swarm.client.dial(worker, LINK)
        for _ in range(20):  # which a hop may forward for a client that is no better
            await link.send(OpenSession(SessionId(b"s" * 16), (b"rubbish",)))
        for _ in range(20):
            with suppress(TransportError):
                await violate()
        assert 8 <= worker.counts.violations.count((mallory.peer, CONTROL)) <= 12
        assert worker.endpoint.shuns(mallory.peer)
        assert not worker.endpoint.shuns(swarm.client.peer)
        assert await swarm.client.ask(worker, Ping(bytes(8))) == Pong(bytes(8)), "others are served"
        await trio.sleep(service.SHUN_S)
        assert await mallory.ask(worker, Ping(bytes(8))) == Pong(bytes(8)), "and so is it, later"

    in_swarm(1, test)


def test_attaching_twice_over_one_stream_is_a_violation() -> None:
    async def test(swarm: Swarm) -> None:
        route = await attached(swarm)
        await route.send(Attach(route.session))
        assert await route.ended(swarm.workers[0])
        await trio.sleep(1)
        swarm.workers[0].assert_idle()

    in_swarm(1, test)


def test_a_hop_that_speaks_on_a_link_loses_it() -> None:
    async def test(swarm: Swarm) -> None:
        first, second = swarm.workers
        await swarm.client.deploy_route([first])
        route = HandRoute(swarm.client, [first], SessionId(b"s" * 16))
        await route.dial()
        await route.attach()

        async def chatty(stream: Any) -> None:
            await Channel(stream, LINK).send(Attach(route.session))
            await trio.sleep_forever()

        second.endpoint.handle(LINK, chatty)
        tickets = route.tickets(workers=swarm.workers)
        await route.send(OpenSession(route.session, route.boxes(tickets)))
        seen = [(await route.next(first))[0], (await route.next(first))[0]][-1]
        assert isinstance(seen, SessionFailed)
        assert seen.reason == RefusalReason.HOP_LOST

    in_swarm(2, test)


def test_a_bug_in_the_engine_costs_one_session() -> None:
    class Broken(ToyCompute):
        async def step(self, work: Any) -> Any:
            if work.position == 0:
                raise ZeroDivisionError("a bug")
            return await super().step(work)

    async def test(swarm: Swarm) -> None:
        route = await opened(swarm)
        await route.send(*route.step(0, 0, ROWS))
        assert await refused(route) == RefusalReason.INTERNAL
        await route.attach()

    in_swarm(1, test, compute=lambda _: Broken())


def test_what_waits_is_bounded_for_each_client_and_comes_back() -> None:
    """Many sessions of one client fill its part of the queues; another client's steps still pass."""

    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        await swarm.client.deploy(worker, 2, 0, 2)
        bob = await swarm.another("bob")
        theirs = await bob.deploy(worker, 2, 0, 2)
        routes = [await swarm.client.route([worker], f"session {number}") for number in range(3)]
        honest = await bob.route([worker], "honest", deployment=theirs)
        for route in routes:
            await route.send(*route.step(0, 0, some_rows(48)))
        await trio.sleep(0.5)
        book = worker.service.house.queues
        assert book.used_bytes == 2 * 48 * 8 * 4
        message, _ = await routes[2].next()
        assert isinstance(message, SessionFailed)
        assert message.reason == RefusalReason.MEMORY
        await honest.do(0, 0, some_rows(2))
        for route in [*routes, honest]:
            await route.aclose()
        await trio.sleep(20)
        worker.assert_idle()

    in_swarm(1, test, queue_memory_bytes=8192, compute=lambda _: ToyCompute(CostModel(step_s=3.0)))


def test_bytes_are_slowed_down_and_nothing_is_lost() -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        started = trio.current_time()
        await swarm.client.deploy(worker, 2, 0, 2)
        route = await swarm.client.route([worker])
        for number in range(4):
            await route.do(number, number * 8, some_rows(8), acked=number)
        took = trio.current_time() - started
        _, _, shards = make_manifest(swarm.client.identity, 2)
        assert took > (sum(map(len, shards)) - 4 * 500) / 500
        await route.aclose()
        await trio.sleep(30)
        worker.assert_idle()

    in_swarm(1, test, quotas=Quotas(peer_bandwidth=500))
