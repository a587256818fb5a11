"""Spans that make room for others while clients come back for them, and an engine that is slow to let them go."""

from __future__ import annotations

from collections import Counter
from functools import partial
from itertools import count
from typing import Any

import trio

from protocol.ids import DeploymentId, PeerId, SessionId
from protocol.messages import Attach, LoadSpan, RefusalReason, ReleaseSpan, SessionFailed, SpanLeased, SpanLoaded
from simnet.compute import ToyCompute
from tests.helpers.workers import (
    BLOCK_BYTES,
    DEPLOYMENT,
    KV_TOKEN_BYTES,
    SALT,
    HandRoute,
    Swarm,
    Worker,
    in_swarm,
    lease_of,
    make_manifest,
    some_rows,
)
from worker.admission import UPLOAD_SILENCE_S, SpanState
from worker.outbox import Outbox
from worker.quotas import QueueBook, Room
from worker.service import SWEEP_S
from worker.sessions import ATTACH_LIFE_S

KV_BYTES = 64 * KV_TOKEN_BYTES  # a session over one block
ROOM: Any = {"memory_bytes": 5 * BLOCK_BYTES + KV_BYTES, "kv_memory_bytes": KV_BYTES}
OLDER, LARGE = b"older" + bytes(11), b"large" + bytes(11)


class SlowToLeave(ToyCompute):
    unload_s = 20.0

    async def unload(self, deployment: DeploymentId) -> None:
        await super().unload(deployment)
        await trio.sleep(self.unload_s)


async def two_caches(swarm: Swarm) -> None:
    """Spans that nobody leases: one block, and two of DEPLOYMENT. There is room for two more."""
    (worker,) = swarm.workers
    older = await swarm.client.deploy(worker, 1, 0, 1, OLDER)
    await swarm.client.deploy(worker, 2, 0, 2)
    for deployment in (older, DEPLOYMENT):
        await swarm.client.ask(worker, ReleaseSpan(deployment, False, b""))


async def leased(swarm: Swarm, blocks: int, end: int, salt: bytes, **terms: Any) -> None:
    data, _, _ = make_manifest(swarm.client.identity, blocks, salt)
    with trio.fail_after(200):
        answer = await swarm.client.ask(swarm.workers[0], lease_of(data, 0, end, **terms))
    assert isinstance(answer, SpanLeased), answer


async def loaded(swarm: Swarm) -> None:
    answer = await swarm.client.ask(swarm.workers[0], LoadSpan(DEPLOYMENT))
    assert isinstance(answer, SpanLoaded), answer


async def serves(worker: Worker, route: HandRoute) -> None:
    await route.do(0, 0, some_rows(2))
    assert worker.service.house.spans.leases[DEPLOYMENT].state is SpanState.LOADED
    assert DEPLOYMENT in worker.compute.spans
    assert DEPLOYMENT in worker.store.spans


def test_a_span_that_was_loaded_again_after_its_eviction_stays() -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        await two_caches(swarm)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(leased, swarm, 4, 4, LARGE)
            await trio.sleep(1)
            await leased(swarm, 2, 1, SALT)
            await loaded(swarm)
            route = await swarm.client.route([worker], start=0, end=1)
        await serves(worker, route)

    in_swarm(1, test, compute=lambda _: SlowToLeave(), **ROOM)


def test_who_waited_for_a_span_before_its_eviction_keeps_what_it_loaded_after() -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        save, saving = worker.store.save_span, trio.Event()

        async def slow(deployment: DeploymentId, span: bytes) -> None:
            saving.set()
            await trio.sleep(60)
            await save(deployment, span)

        worker.store.save_span = slow  # type: ignore[method-assign]
        await leased(swarm, 2, 2, SALT, lease_s=1)
        await swarm.client.upload(worker, make_manifest(swarm.client.identity, 2)[2])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(loaded, swarm)
            await saving.wait()
            await trio.sleep(2 * SWEEP_S)
            assert worker.service.house.spans.leases[DEPLOYMENT].idle
            nursery.start_soon(leased, swarm, 2, 1, SALT)
            await trio.sleep(1)
            nursery.start_soon(loaded, swarm)
            await trio.sleep(1)
            await leased(swarm, 4, 4, LARGE)
        await serves(worker, await swarm.client.route([worker], start=0, end=1))

    in_swarm(1, test, **ROOM)


def test_two_who_evict_each_others_spans_do_not_wait_for_ever() -> None:
    """The first one's lease is over before the engine has let the evicted go."""

    async def test(swarm: Swarm) -> None:
        await two_caches(swarm)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(leased, swarm, 4, 4, LARGE, lease_s=1))
            await trio.sleep(2 * SWEEP_S)
            data, _, _ = make_manifest(swarm.client.identity, 2)
            with trio.fail_after(200):
                while not isinstance(await swarm.client.ask(swarm.workers[0], lease_of(data, 0, 2)), SpanLeased):
                    await trio.sleep(1)
        assert list(swarm.workers[0].service.house.spans.leases) == [DEPLOYMENT]

    in_swarm(1, test, compute=lambda _: SlowToLeave(), **ROOM)


def test_what_was_evicted_goes_although_nobody_waits_for_it_any_more() -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        await two_caches(swarm)
        data, _, _ = make_manifest(swarm.client.identity, 4, LARGE)
        with trio.move_on_after(1) as scope:
            await worker.service._control.answer(lease_of(data, 0, 4), swarm.client.peer)
        assert scope.cancelled_caught
        await trio.sleep(60)
        assert not worker.compute.spans
        assert not worker.store.spans

    in_swarm(1, test, compute=lambda _: SlowToLeave(), **ROOM)


def test_few_peers_that_attach_without_end_keep_nobody_from_a_place() -> None:
    async def test(swarm: Swarm) -> None:
        sessions, outbox = swarm.workers[0].service.sessions, Outbox(Room(QueueBook(1 << 30), PeerId("reader")))
        quota = swarm.workers[0].service.house.quota
        quota.total_max, quota.per_peer_max = 9, 3
        for _ in range(3):  # open sessions
            quota.take(PeerId("busy"))
        numbers = count()

        def attached(peer: str) -> bool:
            session = SessionId(next(numbers).to_bytes(16, "big"))
            sessions.attach(Attach(session), PeerId(peer), outbox)
            return session in sessions.live

        assert [attached(peer) for peer in ("one", "two") * 3] == [True] * 6
        oldest = next(iter(sessions.live))
        assert not attached("busy"), "no more than a peer may have"
        assert oldest in sessions.live, "and nobody gives way for it"
        assert attached("honest")
        assert oldest not in sessions.live
        assert not attached("one"), "it has more already than any that gives way"
        assert attached("another")
        assert Counter(each.client for each in sessions.live.values()) == {
            "one": 2,
            "two": 2,
            "honest": 1,
            "another": 1,
        }
        assert [attached(peer) for peer in ("third", "fourth", "fifth")] == [True, True, False], (
            "one each is nobody's most"
        )
        assert quota.taken == 9

    in_swarm(1, test)


def test_the_sweep_waits_for_no_engine() -> None:
    class Stuck(SlowToLeave):
        unload_s = 10_000.0

    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        await leased(swarm, 2, 2, SALT)
        await trio.sleep(UPLOAD_SILENCE_S + 2 * SWEEP_S)
        assert not worker.service.house.spans.leases
        route = HandRoute(swarm.client, [worker], SessionId(b"s" * 16))
        await route.dial()
        await route.attach()
        await trio.sleep(ATTACH_LIFE_S)
        message, _ = await route.next()
        assert isinstance(message, SessionFailed)
        assert message.reason == RefusalReason.UNKNOWN_SESSION, "attached, and not opened in time"

    in_swarm(1, test, compute=lambda _: Stuck())
