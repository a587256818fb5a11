"""Leases at a running worker: granted, used, renewed, and every way in which they end. Each leaves nothing behind."""

from __future__ import annotations

from dataclasses import replace
from errno import ENOSPC
from typing import Any

import pytest
import trio

from protocol.capabilities import Right
from protocol.ids import DeploymentId
from protocol.leases import Lease, open_lease
from protocol.messages import (
    CONTROL,
    CapabilityRevoked,
    LeaseRenewed,
    LoadSpan,
    RefusalReason,
    ReleaseSpan,
    RenewLease,
    RevokeCapability,
    SessionFailed,
    SpanLeased,
    SpanLoaded,
    SpanReleased,
)
from simnet.runtime import VirtualClock
from tests.helpers.rights import SERIAL, capability, reason
from tests.helpers.workers import (
    BLOCK_BYTES,
    DEPLOYMENT,
    KV_TOKEN_BYTES,
    SALT,
    HandClient,
    HandRoute,
    Swarm,
    Worker,
    in_swarm,
    lease_of,
    make_manifest,
    some_rows,
)
from worker.admission import UPLOAD_SILENCE_S
from worker.config import Blank, Quotas
from worker.leases import GRACE_S
from worker.rights import Rights
from worker.service import SWEEP_S

KV_TOKENS = 128
KV_BYTES = KV_TOKENS * 2 * KV_TOKEN_BYTES


async def lease(client: HandClient, worker: Worker, owner: HandClient | None = None, **terms: Any) -> Lease:
    """Lease two blocks; the answer must be a lease."""
    data, _, _ = make_manifest((owner or client).identity, 2)
    answer = await client.ask(worker, lease_of(data, 0, 2, **terms))
    assert isinstance(answer, SpanLeased), answer
    return open_lease(answer.lease, worker.peer)


async def opened(client: HandClient, worker: Worker, name: str = "session", **terms: Any) -> HandRoute:
    return await client.route([worker], name, **terms)


async def refused_session(client: HandClient, worker: Worker, name: str = "refused", **terms: Any) -> str:
    with pytest.raises(AssertionError) as failed:
        await client.route([worker], name, **terms)
    return str(failed.value)


async def failure_of(route: HandRoute) -> SessionFailed:
    message, _ = await route.next()
    assert isinstance(message, SessionFailed), message
    return message


def leases(worker: Worker) -> int:
    return sum(len(span.holders) for span in worker.service.house.spans.leases.values())


def test_a_lease_says_what_is_promised_and_sets_it_aside() -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        granted = await lease(swarm.client, worker, kv_tokens=KV_TOKENS, lease_s=60)
        assert (granted.holder, granted.owner) == (swarm.client.peer, swarm.client.peer)
        assert (granted.start, granted.end, granted.weight_bytes) == (0, 2, 2 * BLOCK_BYTES)
        assert (granted.kv_tokens, granted.expires_ms - granted.granted_ms) == (KV_TOKENS, 60_000)
        assert worker.service.house.pool.used_bytes == KV_BYTES == worker.counts.kv_bytes
        again = await lease(swarm.client, worker, kv_tokens=64, lease_s=90)
        assert again.serial == granted.serial
        assert worker.service.house.pool.used_bytes == KV_BYTES // 2

    in_swarm(1, test)


def test_others_cannot_take_what_is_leased() -> None:
    """KV room and memory both; and the holder's own sessions draw on it."""

    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        bob = await swarm.another("bob")
        await swarm.client.deploy(worker, 2, 0, 2)
        await lease(swarm.client, worker, kv_tokens=KV_TOKENS)
        answer = await bob.ask(worker, lease_of(make_manifest(bob.identity, 2)[0], 0, 2, kv_tokens=1))
        assert reason(answer) == RefusalReason.KV_MEMORY
        answer = await bob.ask(worker, lease_of(make_manifest(bob.identity, 2)[0], 0, 2))
        assert reason(answer) == RefusalReason.MEMORY
        route = await opened(swarm.client, worker, kv_tokens=KV_TOKENS)
        assert worker.service.house.pool.used_bytes == KV_BYTES, "drawn, not taken twice"
        await route.aclose()
        await swarm.client.ask(worker, ReleaseSpan(DEPLOYMENT, False, b""))
        await bob.deploy(worker, 2, 0, 2)
        await trio.sleep(1)
        worker.assert_idle()

    in_swarm(1, test, memory_bytes=3 * BLOCK_BYTES + KV_BYTES, kv_memory_bytes=KV_BYTES)


def test_a_lease_that_nobody_renews_ends_and_the_span_stays_as_a_cache() -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        await swarm.client.deploy(worker, 2, 0, 2)
        await lease(swarm.client, worker, kv_tokens=KV_TOKENS, lease_s=60)
        stream = await swarm.client.dial(worker, CONTROL)  # it is there, and says nothing
        await trio.sleep(60 - SWEEP_S)
        assert worker.service.house.pool.used_bytes == KV_BYTES
        await trio.sleep(2 * SWEEP_S)
        assert worker.service.house.pool.used_bytes == 0
        assert list(worker.compute.spans) == [DEPLOYMENT]
        assert reason(await stream.call(RenewLease(DEPLOYMENT, 60, b""))) == RefusalReason.UNKNOWN_LEASE
        assert reason(await stream.call(LoadSpan(DEPLOYMENT))) == RefusalReason.UNKNOWN_LEASE
        again = await lease(swarm.client, worker)
        assert again.kv_tokens == 0
        assert isinstance(await stream.call(LoadSpan(DEPLOYMENT)), SpanLoaded), "at once: nothing was lost"
        worker.assert_idle()

    in_swarm(1, test)


def test_a_renewed_lease_lasts() -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        first = await lease(swarm.client, worker, kv_tokens=KV_TOKENS, lease_s=60)
        stream = await swarm.client.dial(worker, CONTROL)
        for _ in range(5):
            await trio.sleep(30)
            answer = await stream.call(RenewLease(DEPLOYMENT, 60, b""))
            assert isinstance(answer, LeaseRenewed), answer
        renewed = open_lease(answer.lease, worker.peer)
        assert renewed == replace(first, granted_ms=renewed.granted_ms, expires_ms=renewed.granted_ms + 60_000)
        assert renewed.granted_ms > first.granted_ms
        assert worker.service.house.pool.used_bytes == KV_BYTES

    in_swarm(1, test)


def test_a_lease_ends_when_its_holder_is_gone_for_a_while() -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        bob = await swarm.another("bob")
        await lease(bob, worker, kv_tokens=KV_TOKENS)
        swarm.network.crash(bob.peer)
        await trio.sleep(GRACE_S - SWEEP_S)
        assert leases(worker) == 1
        await trio.sleep(3 * SWEEP_S)
        assert leases(worker) == 0
        worker.assert_idle()

    in_swarm(1, test)


def test_a_session_outlives_its_lease_and_gives_all_back() -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        await swarm.client.deploy(worker, 2, 0, 2)
        await lease(swarm.client, worker, kv_tokens=KV_TOKENS)
        route = await opened(swarm.client, worker)
        assert await swarm.client.ask(worker, ReleaseSpan(DEPLOYMENT, False, b"")) == SpanReleased()
        assert worker.service.house.pool.used_bytes == 64 * 2 * KV_TOKEN_BYTES
        await route.do(0, 0, some_rows(4))
        await route.aclose()
        await trio.sleep(1)
        worker.assert_idle()

    in_swarm(1, test)


@pytest.mark.parametrize("right", [Right.USE, Right.FETCH])
def test_each_right_allows_what_it_names_and_no_more(right: Right) -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        await swarm.client.deploy(worker, 2, 0, 2)
        bob = await swarm.another("bob")
        shown = capability(swarm.client, bob.peer, right)
        data, _, _ = make_manifest(swarm.client.identity, 2)
        for request in (
            lease_of(data, 0, 2, capability=shown),
            RenewLease(DEPLOYMENT, 60, shown),
            ReleaseSpan(DEPLOYMENT, True, shown),
            RevokeCapability(DEPLOYMENT, SERIAL, shown),
        ):
            assert reason(await bob.ask(worker, request)) == RefusalReason.FORBIDDEN
        assert "no capability" in await refused_session(bob, worker)
        if right is Right.USE:
            await (await opened(bob, worker, capability=shown)).aclose()
        else:
            assert "right to use" in await refused_session(bob, worker, "other", capability=shown)
        await trio.sleep(1)
        worker.assert_idle()
        assert not worker.counts.violations

    in_swarm(1, test)


def test_a_manager_leases_for_itself_and_no_longer_than_its_capability() -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        bob = await swarm.another("bob")
        shown = capability(swarm.client, bob.peer, Right.MANAGE, Right.USE, life_s=100)
        granted = await lease(bob, worker, swarm.client, kv_tokens=KV_TOKENS, capability=shown)
        assert (granted.holder, granted.owner) == (bob.peer, swarm.client.peer)
        assert 99_000 <= granted.expires_ms - granted.granted_ms <= 100_000
        _, _, shards = make_manifest(swarm.client.identity, 2)
        await bob.upload(worker, shards)
        assert isinstance(await bob.ask(worker, LoadSpan(DEPLOYMENT)), SpanLoaded)
        await lease(swarm.client, worker, kv_tokens=KV_TOKENS)
        assert worker.service.house.pool.used_bytes == 2 * KV_BYTES, "two leases of one span"
        route = await opened(bob, worker, capability=shown)
        await trio.sleep(101 + SWEEP_S)
        assert leases(worker) == 1
        failure = await failure_of(route)
        assert failure.reason == RefusalReason.FORBIDDEN
        assert "has expired" in failure.detail
        worker.assert_idle()

    in_swarm(1, test)


def test_a_revocation_takes_effect_at_once() -> None:
    """Sessions and leases under the capability end, others go on, and it is not accepted again."""

    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        await swarm.client.deploy(worker, 2, 0, 2)
        bob = await swarm.another("bob")
        rights = (Right.MANAGE, Right.USE)
        shown = capability(swarm.client, bob.peer, *rights)
        other = capability(swarm.client, bob.peer, *rights, serial=b"d" * 16)
        await lease(bob, worker, swarm.client, kv_tokens=KV_TOKENS, capability=shown)
        ends, stays = await opened(bob, worker, "a", capability=shown), await opened(bob, worker, "b", capability=other)
        revoke = RevokeCapability(DEPLOYMENT, SERIAL, b"")
        assert await swarm.client.ask(worker, revoke) == CapabilityRevoked()
        assert (await failure_of(ends)).reason == RefusalReason.FORBIDDEN
        assert leases(worker) == 1
        await stays.do(0, 0, some_rows(1))
        assert "revoked" in await refused_session(bob, worker, capability=shown)
        await lease(bob, worker, swarm.client, capability=other)
        await stays.aclose()
        await trio.sleep(1)
        worker.assert_idle()

    in_swarm(1, test)


def test_nobody_revokes_for_another() -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        await swarm.client.deploy(worker, 2, 0, 2)
        mallory = await swarm.another("mallory")
        revoke = RevokeCapability(DEPLOYMENT, SERIAL, b"")
        assert reason(await mallory.ask(worker, revoke)) == RefusalReason.FORBIDDEN
        elsewhere = RevokeCapability(DeploymentId(bytes(16)), SERIAL, b"")
        assert reason(await mallory.ask(worker, elsewhere)) == RefusalReason.UNKNOWN_DEPLOYMENT
        assert not worker.service.house.rights.gate.revoked

    in_swarm(1, test)


def test_another_owners_salt_does_not_block_the_owner() -> None:
    """A deployment id follows from its owner: whoever comes first with the same salt has another deployment."""

    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        mallory = await swarm.another("mallory")
        theirs = await mallory.deploy(worker, 2, 0, 2, SALT)
        mine = await swarm.client.deploy(worker, 2, 0, 2, SALT)
        assert mine != theirs
        assert set(worker.compute.spans) == {mine, theirs}

    in_swarm(1, test)


class Notes(Blank):
    data = b""

    async def read(self) -> bytes:
        return self.data

    async def write(self, data: bytes) -> None:
        self.data = data


@pytest.mark.parametrize("damage", [b"", b"{", b"[[1,2,3]]", b'[["x","y","z"]]', b"[" * 100_000])
def test_a_restart_forgets_no_revocation(damage: bytes) -> None:
    async def test(swarm: Swarm) -> None:
        notes = Notes()
        before = Rights(VirtualClock(), notes)
        before.revoke(swarm.client.peer, SERIAL)
        await before.save()
        after = Rights(VirtualClock(), notes)
        await after.recall()
        assert list(after.gate.revoked) == [(swarm.client.peer, SERIAL)]
        notes.data = damage
        damaged = Rights(VirtualClock(), notes)
        await damaged.recall()
        assert not damaged.gate.revoked

    in_swarm(0, test)


def test_a_revocation_of_which_the_disk_takes_no_note_ends_what_it_must() -> None:
    class Disk(Notes):
        full = True

        async def write(self, data: bytes) -> None:
            if self.full:
                raise OSError(ENOSPC, "no space left")
            await super().write(data)

    notes = Disk()

    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        await swarm.client.deploy(worker, 2, 0, 2)
        bob = await swarm.another("bob")
        shown = capability(swarm.client, bob.peer, Right.MANAGE, Right.USE)
        await lease(bob, worker, swarm.client, kv_tokens=KV_TOKENS, capability=shown)
        route = await opened(bob, worker, capability=shown)
        stream = await swarm.client.dial(worker, CONTROL)
        revoke = RevokeCapability(DEPLOYMENT, SERIAL, b"")
        for _ in range(2):
            answer = await stream.call(revoke)
            assert reason(answer) == RefusalReason.DISK
            assert "until this worker restarts" in answer.detail
        assert (await failure_of(route)).reason == RefusalReason.FORBIDDEN
        assert leases(worker) == 1
        assert "revoked" in await refused_session(bob, worker, capability=shown)
        notes.full = False
        assert await stream.call(revoke) == CapabilityRevoked()
        assert SERIAL.hex() in notes.data.decode()

    in_swarm(1, test, revoked=notes)


def test_requests_in_excess_are_refused_and_then_the_stream_ends() -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        stream = await swarm.client.dial(worker, CONTROL)
        for _ in range(400):
            await stream.send(LoadSpan(DEPLOYMENT))
        answers = []
        while (received := await stream.receive()) is not None:
            answers.append(received[0])
        refusals = [answer for answer in answers if reason(answer) == RefusalReason.RATE]
        assert "come again in" in refusals[0].detail
        assert len(refusals) == 100
        assert worker.counts.violations == [(swarm.client.peer, CONTROL)]
        bob = await swarm.another("bob")
        assert reason(await bob.ask(worker, LoadSpan(DEPLOYMENT))) == RefusalReason.UNKNOWN_DEPLOYMENT

    in_swarm(1, test)


def test_nobody_holds_memory_that_it_does_not_fill() -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        stream = await swarm.client.dial(worker, CONTROL)
        started = trio.current_time()
        await lease(swarm.client, worker, kv_tokens=KV_TOKENS)
        while isinstance(await stream.call(RenewLease(DEPLOYMENT, 3600, b"")), LeaseRenewed):
            await lease(swarm.client, worker, kv_tokens=KV_TOKENS)
            await trio.sleep(20)
        assert UPLOAD_SILENCE_S <= trio.current_time() - started <= UPLOAD_SILENCE_S + 60
        assert leases(worker) == 0
        assert worker.service.house.spans.used_bytes == 0
        worker.assert_idle()

    in_swarm(1, test)


def test_one_owners_leases_set_no_more_kv_aside_than_its_share() -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        bob, guest = await swarm.another("bob"), await swarm.another("guest")
        other, _, _ = make_manifest(swarm.client.identity, 2, b"other" + bytes(11))
        half = {"kv_tokens": KV_TOKENS // 2}
        data, _, _ = make_manifest(swarm.client.identity, 2)
        answer = await swarm.client.ask(worker, lease_of(data, 0, 2, kv_tokens=KV_TOKENS // 2 + 1))
        assert reason(answer) == RefusalReason.KV_MEMORY
        assert not worker.service.house.spans.leases
        await lease(swarm.client, worker, **half)
        await lease(swarm.client, worker, **half)
        assert isinstance(await swarm.client.ask(worker, RenewLease(DEPLOYMENT, 60, b"")), LeaseRenewed)
        answer = await swarm.client.ask(worker, lease_of(other, 0, 2, kv_tokens=1))
        assert reason(answer) == RefusalReason.KV_MEMORY, "another deployment"
        right = capability(swarm.client, guest.peer, Right.MANAGE)
        answer = await guest.ask(worker, lease_of(data, 0, 2, kv_tokens=1, capability=right))
        assert reason(answer) == RefusalReason.KV_MEMORY, "another holder"
        await lease(bob, worker, **half)
        assert worker.service.house.pool.used_bytes == KV_BYTES
        await swarm.client.ask(worker, ReleaseSpan(DEPLOYMENT, False, b""))
        answer = await swarm.client.ask(worker, lease_of(other, 0, 2, kv_tokens=1))
        assert isinstance(answer, SpanLeased)

    room: Any = {"memory_bytes": 8 * BLOCK_BYTES + KV_BYTES, "kv_memory_bytes": KV_BYTES}
    in_swarm(1, test, quotas=Quotas(owner_memory_share=0.5), **room)


def test_sessions_on_spans_that_are_not_leased_are_its_owners_share_too() -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        for salt in (b"other" + bytes(11), SALT):
            other = await swarm.client.deploy(worker, 2, 0, 2, salt)
            await swarm.client.ask(worker, ReleaseSpan(other, False, b""))
        first, second = worker.service.house.spans.leases
        route = await opened(swarm.client, worker, deployment=first)
        assert RefusalReason.MEMORY in await refused_session(swarm.client, worker, deployment=second)
        data, _, _ = make_manifest(swarm.client.identity, 2, b"third" + bytes(11))
        assert reason(await swarm.client.ask(worker, lease_of(data, 0, 2))) == RefusalReason.MEMORY
        bob = await swarm.another("bob")
        await lease(bob, worker)
        await route.aclose()
        await trio.sleep(1)
        assert isinstance(await swarm.client.ask(worker, lease_of(data, 0, 2)), SpanLeased)

    room: Any = {"memory_bytes": 4 * BLOCK_BYTES + KV_BYTES, "kv_memory_bytes": KV_BYTES}
    in_swarm(1, test, quotas=Quotas(owner_memory_share=0.5), **room)
