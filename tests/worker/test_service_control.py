"""Spans prepared, uploaded, loaded and released over real services."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from math import inf
from typing import TypeVar

import pytest
import trio

from protocol import limits
from protocol.ids import ShardDigest
from protocol.messages import (
    CONTROL,
    LeaseSpan,
    LoadSpan,
    Message,
    Refusal,
    RefusalReason,
    ReleaseSpan,
    SpanLeased,
    SpanLoaded,
    SpanReleased,
)
from protocol.ports import LoadedSpan, SpanSpec
from simnet.compute import CostModel, ToyCompute
from tests.helpers.rights import reason
from tests.helpers.workers import (
    BLOCK_BYTES,
    DEPLOYMENT,
    HandClient,
    Swarm,
    Worker,
    identity,
    in_swarm,
    lease_of,
    make_manifest,
)
from worker import control
from worker.config import Quotas

T = TypeVar("T")


async def missing(client: HandClient, worker: Worker, request: LeaseSpan) -> tuple[ShardDigest, ...]:
    answer = await client.ask(worker, request)
    assert isinstance(answer, SpanLeased), answer
    return answer.missing


def test_only_missing_shards_are_asked_for() -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        data, manifest, shards = make_manifest(swarm.client.identity, 3)
        digests = tuple(block.digest for block in manifest.blocks)
        prepare = lease_of(data, 0, 3)
        assert await missing(swarm.client, worker, prepare) == digests
        assert reason(await swarm.client.ask(worker, LoadSpan(DEPLOYMENT))) == RefusalReason.MISSING_SHARDS
        await swarm.client.upload(worker, [shards[1]])
        assert await missing(swarm.client, worker, prepare) == (digests[0], digests[2])
        await swarm.client.upload(worker, shards)  # the second is there: nothing of it is sent
        assert await missing(swarm.client, worker, prepare) == ()
        loaded = SpanLoaded(3 * BLOCK_BYTES, 100)
        assert await swarm.client.ask(worker, LoadSpan(DEPLOYMENT)) == loaded
        assert await swarm.client.ask(worker, LoadSpan(DEPLOYMENT)) == loaded
        assert worker.counts.weight_bytes == 3 * BLOCK_BYTES
        for _ in range(2):
            assert await swarm.client.ask(worker, ReleaseSpan(DEPLOYMENT, True, b"")) == SpanReleased()
        assert worker.counts.weight_bytes == 0
        assert not worker.store.spans
        assert await missing(swarm.client, worker, prepare) == (), "shards stay when their span goes"

    in_swarm(1, test)


def test_refusals_of_control() -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        mallory = await swarm.another("mallory")
        data, _, _ = make_manifest(swarm.client.identity, 2)
        tampered = data[:-1] + bytes([data[-1] ^ 1])
        assert reason(await swarm.client.ask(worker, lease_of(tampered, 0, 1))) == RefusalReason.BAD_MANIFEST
        assert reason(await swarm.client.ask(worker, lease_of(data, 0, 3))) == RefusalReason.BAD_MANIFEST
        assert reason(await swarm.client.ask(worker, LoadSpan(DEPLOYMENT))) == RefusalReason.UNKNOWN_DEPLOYMENT
        assert reason(await mallory.ask(worker, lease_of(data, 0, 1))) == RefusalReason.FORBIDDEN
        await swarm.client.ask(worker, lease_of(data, 0, 1))
        assert reason(await mallory.ask(worker, LoadSpan(DEPLOYMENT))) == RefusalReason.UNKNOWN_LEASE
        assert reason(await mallory.ask(worker, ReleaseSpan(DEPLOYMENT, True, b""))) == RefusalReason.FORBIDDEN
        big, _, _ = make_manifest(swarm.client.identity, 9, b"B" * 16)
        refusal = await swarm.client.ask(worker, lease_of(big, 0, 9))
        assert reason(refusal) == RefusalReason.MEMORY
        assert isinstance(refusal, Refusal)
        assert f"{6 * BLOCK_BYTES} bytes are missing" in refusal.detail
        assert not worker.counts.violations
        assert len(worker.counts.refused) == 7

    in_swarm(1, test, memory_bytes=4 * BLOCK_BYTES + 1, kv_memory_bytes=1)


def test_an_idle_deployment_makes_room() -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        await swarm.client.deploy(worker, 2, 0, 2)
        bob = await swarm.another("bob")
        assert reason(await bob.ask(worker, lease_of(make_manifest(bob.identity, 2)[0], 0, 2))) == RefusalReason.MEMORY
        await swarm.client.ask(worker, ReleaseSpan(DEPLOYMENT, False, b""))
        assert list(worker.compute.spans) == [DEPLOYMENT], "it stays as a cache"
        assert list(worker.compute.spans) != [await bob.deploy(worker, 2, 0, 2)] == list(worker.compute.spans)
        assert list(worker.store.spans) == list(worker.compute.spans)
        assert reason(await swarm.client.ask(worker, LoadSpan(DEPLOYMENT))) == RefusalReason.UNKNOWN_DEPLOYMENT

    in_swarm(1, test, memory_bytes=3 * BLOCK_BYTES + 1, kv_memory_bytes=1)


def test_another_range_of_the_same_deployment_replaces_the_first() -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        await swarm.client.deploy(worker, 3, 0, 2)
        await swarm.client.deploy(worker, 3, 1, 3)
        assert worker.compute.spans[DEPLOYMENT].start == 1

    in_swarm(1, test)


@pytest.mark.parametrize("gone", [False, True], ids=["client waits", "client gone"])
def test_loading_is_not_lost_with_its_asker(gone: bool) -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        data, _, shards = make_manifest(swarm.client.identity, 2)
        await swarm.client.ask(worker, lease_of(data, 0, 2))
        await swarm.client.upload(worker, shards)
        if gone:
            with trio.move_on_after(1):
                await swarm.client.ask(worker, LoadSpan(DEPLOYMENT))
        assert await swarm.client.ask(worker, LoadSpan(DEPLOYMENT)) == SpanLoaded(2 * BLOCK_BYTES, 100)
        route = await swarm.client.route(swarm.workers)
        await route.aclose()
        await swarm.client.ask(worker, ReleaseSpan(DEPLOYMENT, True, b""))
        worker.assert_idle()
        assert not worker.compute.spans

    in_swarm(1, test, compute=lambda _: ToyCompute(CostModel(load_s=5.0)))


@pytest.mark.parametrize(("in_use", "least_s"), [(True, 30), (False, 20)])
def test_loading_again_and_again_leaves_others_half_of_the_time(in_use: bool, least_s: float) -> None:
    """A load takes the engine from all sessions."""

    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        await swarm.client.deploy(worker, 2, 0, 2)
        if in_use:
            await swarm.client.route([worker])
        mallory = await swarm.another("mallory")
        data, manifest, shards = make_manifest(mallory.identity, 2)
        await mallory.ask(worker, lease_of(data, 0, 2))
        await mallory.upload(worker, shards)
        await trio.sleep(60)
        began = trio.current_time()
        for _ in range(2):
            assert isinstance(await mallory.ask(worker, lease_of(data, 0, 2)), SpanLeased)
            assert isinstance(await mallory.ask(worker, LoadSpan(manifest.deployment)), SpanLoaded)
            took = trio.current_time() - began
            assert await mallory.ask(worker, ReleaseSpan(manifest.deployment, True, b"")) == SpanReleased()
        assert least_s <= took < least_s + 2

    in_swarm(1, test, compute=lambda _: ToyCompute(CostModel(load_s=10.0)))


def test_one_manifest_is_read_at_a_time_and_one_peers_keep_no_other_waiting() -> None:
    reading, most = 0, 0

    async def slowly(function: Callable[[], T]) -> T:
        nonlocal reading, most
        reading += 1
        most = max(most, reading)
        await trio.sleep(0.1)
        reading -= 1
        return function()

    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        mallory = await swarm.another("mallory")
        data, _, _ = make_manifest(swarm.client.identity, 2)
        async with trio.open_nursery() as nursery:
            for _ in range(40):
                nursery.start_soon(mallory.ask, worker, lease_of(b"rubbish", 0, 2))
            await trio.sleep(1)
            began = trio.current_time()
            assert isinstance(await swarm.client.ask(worker, lease_of(data, 0, 2)), SpanLeased)
            assert trio.current_time() - began < 1
        assert most == 1

    in_swarm(1, test, run_sync=slowly)


def test_who_sends_large_manifests_is_soon_told_to_wait() -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        stream = await swarm.client.dial(worker, CONTROL)
        large = lease_of(bytes(limits.MANIFEST_BYTES_MAX), 0, 1)
        reasons = [reason(await stream.call(large)) for _ in range(20)]
        assert reasons[0] == RefusalReason.BAD_MANIFEST
        assert reasons.count(RefusalReason.BAD_MANIFEST) < 8
        assert set(reasons) == {RefusalReason.BAD_MANIFEST, RefusalReason.RATE}

    in_swarm(1, test)


def answers(many: list[Message]) -> dict[str, int]:
    return dict(Counter(each.reason if isinstance(each, Refusal) else type(each).__name__ for each in many))


def test_manifests_that_wait_to_be_read_are_bounded_and_leave_others_room() -> None:
    async def slowly(function: Callable[[], T]) -> T:
        await trio.sleep(10)
        return function()

    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        data, _, _ = make_manifest(swarm.client.identity, 2)
        large = lease_of(bytes(limits.MANIFEST_BYTES_MAX), 0, 1)
        told: list[Message] = []

        async def tell(client: HandClient, request: LeaseSpan) -> None:
            told.append(await client.ask(worker, request))

        async with trio.open_nursery() as nursery:
            for name in ("mallory", "trudy", "eve"):
                crowd = await swarm.another(name)
                for _ in range(20):
                    nursery.start_soon(tell, crowd, large)
                await trio.sleep(1)
            assert answers(told) == {RefusalReason.RATE: 46}
            assert "come again in" in "".join(each.detail for each in told if isinstance(each, Refusal))
            for _ in range(8):
                nursery.start_soon(tell, swarm.client, lease_of(data, 0, 2))
        assert answers(told) == {RefusalReason.RATE: 46, RefusalReason.BAD_MANIFEST: 14, "SpanLeased": 8}
        book = worker.service._control._unread_manifests
        assert book.used_bytes == 0

    in_swarm(1, test, run_sync=slowly, quotas=Quotas(requests=inf, peer_requests=inf))


def test_manifests_that_wait_for_their_deployment_are_bounded_for_each_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        bob = await swarm.another("bob")
        data, manifest, shards = make_manifest(swarm.client.identity, 2)
        assert await missing(swarm.client, worker, lease_of(data, 0, 2))
        await swarm.client.upload(worker, shards)
        told: list[Message] = []

        async def tell(request: Message) -> None:
            told.append(await swarm.client.ask(worker, request))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(tell, LoadSpan(manifest.deployment))
            await trio.sleep(1)
            for _ in range(10):
                nursery.start_soon(tell, lease_of(data, 0, 2))
            await trio.sleep(1)
            assert answers(told) == {RefusalReason.RATE: 6}
            assert reason(await bob.ask(worker, lease_of(data, 0, 2))) == RefusalReason.FORBIDDEN, "it does not wait"
            own = lease_of(make_manifest(bob.identity, 2)[0], 0, 2)
            assert isinstance(await bob.ask(worker, own), SpanLeased)
        assert answers(told) == {RefusalReason.RATE: 6, "SpanLeased": 4, "SpanLoaded": 1}
        assert worker.service._control._read_manifests.used_bytes == 0

    size = len(make_manifest(identity("client"), 2)[0])
    monkeypatch.setattr(control, "MANIFEST_BYTES_WAITING_MAX", 8 * size)
    in_swarm(1, test, compute=lambda _: ToyCompute(CostModel(load_s=10.0)))


def test_a_stream_that_waits_for_its_next_message_holds_none_before() -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        streams = [await swarm.client.dial(worker, CONTROL) for _ in range(4)]
        for stream in streams:
            assert isinstance(await stream.call(lease_of(b"held" * 1000, 0, 1)), Refusal)
        gc.collect()
        requests = [each for each in gc.get_objects() if type(each) is LeaseSpan]
        assert not [each for each in requests if each.manifest == b"held" * 1000]

    in_swarm(1, test)


def test_spans_are_loaded_one_at_a_time() -> None:
    class Counting(ToyCompute):
        loading = most = 0

        async def load(self, span: SpanSpec) -> LoadedSpan:
            self.loading += 1
            self.most = max(self.most, self.loading)
            try:
                return await super().load(span)
            finally:
                self.loading -= 1

    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        clients = [await swarm.another(name) for name in ("ann", "bob", "carl")]
        async with trio.open_nursery() as nursery:
            for client in clients:
                nursery.start_soon(client.deploy, worker, 2, 0, 2)
        assert len(worker.compute.spans) == 3
        assert worker.compute.most == 1

    in_swarm(1, test, compute=lambda _: Counting(CostModel(load_s=10.0)))
