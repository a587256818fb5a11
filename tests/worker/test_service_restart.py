"""A worker that comes back serves what its store holds, and forgets what does not hold."""

from __future__ import annotations

import pytest
import trio

from protocol.capabilities import Right
from protocol.codec import encode
from protocol.errors import Refused
from protocol.ids import DeploymentId
from protocol.messages import (
    CapabilityRevoked,
    LoadSpan,
    Refusal,
    RefusalReason,
    ReleaseSpan,
    RevokeCapability,
    SpanLeased,
    SpanLoaded,
    SpanReleased,
)
from protocol.ports import LoadedSpan, SpanSpec
from simnet.compute import CostModel, ToyCompute
from simnet.store import MemoryStore
from tests.helpers.rights import SERIAL, capability, reason
from tests.helpers.workers import BLOCK_BYTES, DEPLOYMENT, Swarm, in_swarm, lease_of, make_manifest
from worker.admission import SpanLease, SpanLedger
from worker.saved import SavedSpan, read_saved
from worker.spans import SpanRequest


def test_a_worker_that_restarts_serves_from_its_store() -> None:
    async def test(swarm: Swarm) -> None:
        await swarm.client.deploy(swarm.workers[0], 2, 0, 2)
        worker = await swarm.restart(0)
        await trio.sleep(5)
        (held,) = worker.service.herald._held()
        assert (held.deployment, held.start, held.end) == (DEPLOYMENT, 0, 2)
        route = await swarm.client.route(swarm.workers)
        await route.aclose()
        await trio.sleep(5)
        worker.assert_idle()
        data, _, _ = make_manifest(swarm.client.identity, 2)
        assert not worker.service.house.spans.leased(), "a cache, until somebody leases it"
        leased = await swarm.client.ask(worker, lease_of(data, 0, 2))
        assert isinstance(leased, SpanLeased)
        assert leased.missing == ()
        assert isinstance(await swarm.client.ask(worker, LoadSpan(DEPLOYMENT)), SpanLoaded)

    in_swarm(1, test)


def test_what_was_released_or_replaced_does_not_come_back() -> None:
    async def test(swarm: Swarm) -> None:
        await swarm.client.deploy(swarm.workers[0], 3, 0, 2)
        await swarm.client.deploy(swarm.workers[0], 3, 1, 3)
        released = await swarm.client.deploy(swarm.workers[0], 2, 0, 2, b"R" * 16)
        await swarm.client.ask(swarm.workers[0], ReleaseSpan(released, True, b""))
        worker = await swarm.restart(0)
        await trio.sleep(5)
        assert [(held.deployment, held.start) for held in worker.service.herald._held()] == [(DEPLOYMENT, 1)]

    in_swarm(1, test)


def test_the_newest_spans_come_back_as_far_as_they_fit() -> None:
    async def test(swarm: Swarm) -> None:
        deployments = []
        for letter in b"ABC":
            deployments.append(await swarm.client.deploy(swarm.workers[0], 2, 0, 2, bytes([letter]) * 16))
            await swarm.client.ask(swarm.workers[0], ReleaseSpan(deployments[-1], False, b""))
        worker = await swarm.restart(0)
        await trio.sleep(5)
        assert {held.deployment for held in worker.service.herald._held()} == set(deployments[1:])

    in_swarm(1, test, memory_bytes=4 * BLOCK_BYTES + 1, kv_memory_bytes=1)


def test_a_span_for_which_its_owner_has_no_share_left_now_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its owner was sooner than the disk, and uses other spans by then."""

    async def test(swarm: Swarm) -> None:
        kept = await swarm.client.deploy(swarm.workers[0], 2, 0, 2)
        late = await swarm.client.deploy(swarm.workers[0], 2, 0, 2, b"X" * 16)
        require = SpanLedger._require_share

        def used_up(ledger: SpanLedger, request: SpanRequest, replaced: SpanLease | None) -> None:
            if request.deployment == late:
                raise Refused(RefusalReason.MEMORY, "one owner may use less")
            require(ledger, request, replaced)

        monkeypatch.setattr(SpanLedger, "_require_share", used_up)
        worker = await swarm.restart(0)
        await trio.sleep(5)
        assert [held.deployment for held in worker.service.herald._held()] == [kept]
        assert set(worker.store.spans) == {kept, late}

    in_swarm(1, test)


@pytest.mark.parametrize("reason", [RefusalReason.MEMORY, RefusalReason.DISK])
def test_a_span_for_which_the_machine_has_no_memory_or_disk_now_comes_back_later(
    reason: RefusalReason, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(swarm: Swarm) -> None:
        kept = await swarm.client.deploy(swarm.workers[0], 2, 0, 2)
        late = await swarm.client.deploy(swarm.workers[0], 2, 0, 2, b"X" * 16)
        load, full = ToyCompute.load, True

        async def refuse(compute: ToyCompute, span: SpanSpec) -> LoadedSpan:
            if full and span.manifest.deployment == late:
                raise Refused(reason, "the machine has less free, or its disk fails")
            return await load(compute, span)

        monkeypatch.setattr(ToyCompute, "load", refuse)
        worker = await swarm.restart(0)
        await trio.sleep(5)
        assert [held.deployment for held in worker.service.herald._held()] == [kept]
        assert list(worker.service.house.spans.leases) == [kept], "it takes no room"
        assert set(worker.store.spans) == {kept, late}
        full = False
        worker = await swarm.restart(0)
        await trio.sleep(5)
        assert {held.deployment for held in worker.service.herald._held()} == {kept, late}

    in_swarm(1, test)


@pytest.mark.parametrize("who", ["owner", "stranger"])
def test_what_is_released_before_it_is_loaded_again_does_not_come_back(
    who: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = list[DeploymentId]()

    def noted(deployment: DeploymentId, data: bytes) -> SpanRequest:
        read.append(deployment)
        return read_saved(deployment, data)

    monkeypatch.setattr("worker.control.read_saved", noted)

    async def test(swarm: Swarm) -> None:
        late = await swarm.client.deploy(swarm.workers[0], 2, 0, 2)
        first = await swarm.client.deploy(swarm.workers[0], 2, 0, 2, b"X" * 16)
        worker = await swarm.restart(0)
        await trio.sleep(5)  # the newest is loading
        assert not worker.service.herald._held()
        peer = swarm.client if who == "owner" else await swarm.another("stranger")
        answers = [await peer.ask(worker, ReleaseSpan(late, True, b"")) for _ in range(3)]
        assert read == [first, late], "however often it is asked for"
        answer = answers[0]
        assert answers == [answer] * 3
        if who == "owner":
            assert answer == SpanReleased()
        else:
            assert isinstance(answer, Refusal)
            assert answer.reason == RefusalReason.FORBIDDEN
        await trio.sleep(60)
        expected = {first} if who == "owner" else {first, late}
        assert {held.deployment for held in worker.service.herald._held()} == expected
        assert set(worker.store.spans) == expected

    in_swarm(1, test, compute=lambda _: ToyCompute(CostModel(load_s=10.0)))


def test_what_is_revoked_before_a_span_is_loaded_again_is_refused_then() -> None:
    async def test(swarm: Swarm) -> None:
        late = await swarm.client.deploy(swarm.workers[0], 2, 0, 2)
        await swarm.client.deploy(swarm.workers[0], 2, 0, 2, b"X" * 16)
        bob = await swarm.another("bob")
        shown = capability(swarm.client, bob.peer, Right.USE)
        worker = await swarm.restart(0)
        await trio.sleep(5)  # the newest is loading
        assert late not in worker.service.house.spans.leases
        revoke = RevokeCapability(late, SERIAL, b"")
        assert reason(await bob.ask(worker, revoke)) == RefusalReason.FORBIDDEN
        assert not worker.service.house.rights.gate.revoked
        assert await swarm.client.ask(worker, revoke) == CapabilityRevoked()
        await trio.sleep(60)
        assert late in worker.service.house.spans.leases
        with pytest.raises(AssertionError, match="revoked"):
            await bob.route(swarm.workers, capability=shown)

    in_swarm(1, test, compute=lambda _: ToyCompute(CostModel(load_s=10.0)))


@pytest.mark.parametrize("damage", ["cut short", "no manifest"])
def test_a_damaged_span_of_an_earlier_run_is_not_held_against_who_revokes(damage: str) -> None:
    async def test(swarm: Swarm) -> None:
        late = await swarm.client.deploy(swarm.workers[0], 2, 0, 2)
        await swarm.client.deploy(swarm.workers[0], 2, 0, 2, b"X" * 16)
        saved = swarm.workers[0].store.spans[late]
        swarm.workers[0].store.spans[late] = saved[:-1] if damage == "cut short" else encode(SavedSpan(b"?", 0, 2))
        worker = await swarm.restart(0)
        await trio.sleep(5)
        assert isinstance(await swarm.client.ask(worker, RevokeCapability(late, SERIAL, b"")), Refusal)

    in_swarm(1, test, compute=lambda _: ToyCompute(CostModel(load_s=10.0)))


def test_what_finds_no_room_again_is_its_owners_to_forget() -> None:
    async def test(swarm: Swarm) -> None:
        deployments = []
        for letter in b"AB":
            deployments.append(await swarm.client.deploy(swarm.workers[0], 2, 0, 2, bytes([letter]) * 16))
        store = swarm.workers[0].store
        await swarm.client.ask(swarm.workers[0], ReleaseSpan(deployments[1], False, b""))
        before = dict(store.spans)
        evicting = await swarm.client.deploy(swarm.workers[0], 2, 0, 2, b"C" * 16)
        assert set(store.spans) == {deployments[0], evicting}
        store.spans = {deployments[1]: before[deployments[1]], **store.spans}  # as if its disk had failed to forget it
        worker = await swarm.restart(0)
        await trio.sleep(5)
        assert set(store.spans) == {*deployments, evicting}
        assert {held.deployment for held in worker.service.herald._held()} == {deployments[0], evicting}
        stranger = await swarm.another("stranger")
        assert isinstance(await stranger.ask(worker, ReleaseSpan(deployments[1], True, b"")), Refusal)
        assert deployments[1] in store.spans
        for _ in range(2):
            assert await swarm.client.ask(worker, ReleaseSpan(deployments[1], True, b"")) == SpanReleased()
            assert set(store.spans) == {deployments[0], evicting}

    in_swarm(1, test, memory_bytes=4 * BLOCK_BYTES + 1, kv_memory_bytes=1)


async def disk_fails(*_: object) -> None:
    raise Refused(RefusalReason.DISK, "read-only")


def test_a_disk_that_forgets_no_span_keeps_none_from_being_loaded_again_or_released(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def test(swarm: Swarm) -> None:
        good = await swarm.client.deploy(swarm.workers[0], 2, 0, 2)
        bad = await swarm.client.deploy(swarm.workers[0], 2, 0, 2, b"X" * 16)
        store = swarm.workers[0].store
        store.spans[bad] = store.spans[bad][:-1]
        with monkeypatch.context() as patch:
            patch.setattr(MemoryStore, "forget_span", disk_fails)
            worker = await swarm.restart(0)
            await trio.sleep(5)
            assert [held.deployment for held in worker.service.herald._held()] == [good]
            for _ in range(2):
                assert reason(await swarm.client.ask(worker, ReleaseSpan(bad, True, b""))) == RefusalReason.DISK
            assert await swarm.client.ask(worker, ReleaseSpan(good, True, b"")) == SpanReleased()
            assert not worker.service.house.spans.leases
            assert not worker.compute.spans
        assert await swarm.client.ask(worker, ReleaseSpan(bad, True, b"")) == SpanReleased()
        assert list(store.spans) == [good], "the disk kept it"

    in_swarm(1, test)


def test_a_disk_that_does_not_tell_what_was_loaded_keeps_nothing_from_being_loaded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(swarm: Swarm) -> None:
        await swarm.client.deploy(swarm.workers[0], 2, 0, 2)
        with monkeypatch.context() as patch:
            patch.setattr(MemoryStore, "saved_spans", disk_fails)
            worker = await swarm.restart(0)
            await trio.sleep(5)
        assert not worker.service.herald._held()
        assert "the spans of an earlier run are not loaded" in caplog.text
        await swarm.client.deploy(worker, 2, 0, 2)

    in_swarm(1, test)


@pytest.mark.parametrize("damage", ["record", "wrong name", "shard garbled", "shard gone", "engine refuses"])
def test_what_does_not_hold_is_forgotten_and_the_rest_comes_back(damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(swarm: Swarm) -> None:
        good = await swarm.client.deploy(swarm.workers[0], 2, 0, 2)
        bad = await swarm.client.deploy(swarm.workers[0], 2, 0, 2, b"X" * 16)
        store = swarm.workers[0].store
        _, manifest, _ = make_manifest(swarm.client.identity, 2, b"X" * 16)
        match damage:
            case "record":
                store.spans[bad] = store.spans[bad][:-1]
            case "wrong name":
                store.spans[bad] = store.spans[good]
            case "shard garbled":
                digest = manifest.blocks[1].digest
                store.whole[digest] = b"?" + store.whole[digest][1:]
            case "shard gone":
                del store.whole[manifest.blocks[0].digest]
            case _:
                load = type(swarm.workers[0].compute).load

                async def refuse(self: object, span: object) -> object:
                    if span.manifest.deployment == bad:  # type: ignore[attr-defined]
                        raise Refused(RefusalReason.BAD_SHARD, "not the manifest's")
                    return await load(self, span)

                monkeypatch.setattr(type(swarm.workers[0].compute), "load", refuse)
        worker = await swarm.restart(0)
        await trio.sleep(5)
        assert [held.deployment for held in worker.service.herald._held()] == [good]
        assert list(store.spans) == [good]
        assert list(worker.service.house.spans.leases) == [good]

    in_swarm(1, test)
