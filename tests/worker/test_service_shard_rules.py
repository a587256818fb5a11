"""Shards under the rules of the house: leases, rights, rates, pausing, the directory; on the virtual network."""

from __future__ import annotations

from dataclasses import replace

import pytest
import trio

from protocol.channel import Channel
from protocol.directory import shard_key
from protocol.limits import PIECE_BYTES
from protocol.messages import (
    SHARD,
    CapabilityRevoked,
    LoadSpan,
    Message,
    PiecesWanted,
    Refusal,
    RefusalReason,
    ReleaseSpan,
    RevokeCapability,
    ShardAsk,
    ShardOffer,
    ShardPiece,
    SpanLeased,
    SpanLoaded,
)
from protocol.pieces import PieceList
from simnet.store import MemoryStore
from tests.helpers.rights import SERIAL, capability, reason
from tests.helpers.shards import (
    BIG,
    LAN,
    MEMORY,
    SLOW,
    assert_no_fetch,
    deployed,
    in_big_swarm,
    leased,
    lines,
    next_of,
    source,
)
from tests.helpers.workers import DEPLOYMENT, Swarm, in_swarm, lease_of, make_manifest
from worker.config import Quotas
from worker.duty import DRAIN_S, Cause
from worker.piece_plan import WINDOW_START
from worker.providing import PERIOD_S
from worker.suppliers import SEARCHES_MAX


async def asked(channel: Channel, request: Message) -> Message:
    await channel.send(request)
    received = await channel.receive()
    assert received is not None
    return received[0]


def test_pieces_are_not_counted_as_requests_but_offers_and_asks_are() -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        (shard,) = await deployed(swarm.client, worker)
        pieces = PieceList.of_bytes(shard)
        channel = await swarm.client.dial(worker, SHARD)
        await asked(channel, ShardAsk(pieces.digest, b""))
        for _ in range(200):
            answer = await asked(channel, PiecesWanted(pieces.digest, 8, 1))
            assert answer == ShardPiece(pieces.digest, 8), "one offer, however many pieces"
        answers = [await asked(channel, ShardAsk(pieces.digest, b"")) for _ in range(40)]
        assert isinstance(answers[0], ShardOffer)
        assert reason(answers[-1]) == RefusalReason.RATE

    in_swarm(1, test, quotas=Quotas(peer_requests=4.0), **MEMORY)


@pytest.mark.parametrize("cause", Cause)
def test_a_paused_worker_fetches_nothing_new_and_gives_while_it_drains(cause: Cause) -> None:
    async def test(swarm: Swarm) -> None:
        holder, worker = swarm.workers
        (shard,) = await deployed(swarm.client, holder)
        await leased(swarm.client, worker)
        pieces = PieceList.of_bytes(shard)
        for each in swarm.workers:
            each.service.stand_down(cause)
        channel = await swarm.client.dial(worker, SHARD)
        await swarm.client.offer(channel, shard)
        assert reason(await next_of(channel, Refusal)) == RefusalReason.PAUSED
        assert_no_fetch(worker)
        asking = await swarm.client.dial(holder, SHARD)
        assert isinstance(await asked(asking, ShardAsk(pieces.digest, b"")), ShardOffer)
        await trio.sleep(DRAIN_S[cause])
        assert reason(await asked(asking, ShardAsk(pieces.digest, b""))) == RefusalReason.PAUSED
        worker.service.stand_up(cause)
        assert await swarm.client.give(channel, shard) == list(range(9)), "over the same stream"

    in_big_swarm(2, test)


def test_a_revoked_right_to_fetch_reads_nothing_more() -> None:
    async def test(swarm: Swarm) -> None:
        holder, worker = swarm.workers
        (shard,) = await deployed(swarm.client, holder)
        right, digest = capability(swarm.client, worker.peer), PieceList.of_bytes(shard).digest
        asking = await replace(swarm.client, endpoint=worker.endpoint).dial(holder, SHARD)
        assert isinstance(await asked(asking, ShardAsk(digest, right)), ShardOffer)
        revoke = RevokeCapability(DEPLOYMENT, SERIAL, b"")
        assert await swarm.client.ask(holder, revoke) == CapabilityRevoked()
        assert reason(await asked(asking, ShardAsk(digest, right))) == RefusalReason.FORBIDDEN
        assert not holder.counts.violations, "it may not have known"

    in_big_swarm(2, test)


@pytest.mark.parametrize("right", [True, False], ids=["with the right", "without"])
def test_a_worker_finds_in_the_directory_who_else_has_a_shard(right: bool) -> None:
    async def test(swarm: Swarm) -> None:
        holder, worker = swarm.workers
        (shard,) = await deployed(swarm.client, holder)
        lines(swarm, SLOW, swarm.client.peer, worker.peer)
        lines(swarm, LAN, holder.peer, worker.peer)
        await leased(swarm.client, worker)
        await trio.sleep(2 * PERIOD_S)
        shown = capability(swarm.client, worker.peer) if right else b""
        given = await swarm.client.upload(worker, [shard], capability=shown)
        assert list(worker.store.whole.values()) == [shard]
        assert len(given) <= WINDOW_START + 1 if right else len(given) == 9
        assert not holder.counts.refused, "nobody is asked in vain"
        await trio.sleep(60)
        assert_no_fetch(worker)
        assert not worker.service._fetches.suppliers._searched

    in_big_swarm(2, test)


def test_what_is_told_to_the_directory_is_what_would_be_given() -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        giving, spans = worker.service._giving, worker.service.house.spans
        first, second = await leased(swarm.client, worker, 2)
        here, other = (PieceList.of_bytes(shard).digest for shard in (first, second))
        assert not await giving.gives(here), "it is still to come"
        await swarm.client.upload(worker, [first])
        assert await giving.gives(here), "whole, though the span is not loaded"
        assert not await giving.gives(other)
        kept = worker.store.whole.pop(here)
        assert not await giving.gives(here), "evicted"
        worker.store.whole[here] = kept
        worker.service.stand_down(Cause.YIELDING)
        assert await giving.gives(here), "while it drains"
        await trio.sleep(DRAIN_S[Cause.YIELDING])
        assert here in spans.needed()
        assert not await giving.gives(here)
        worker.service.stand_up(Cause.YIELDING)
        assert await giving.gives(here)
        await swarm.client.ask(worker, ReleaseSpan(DEPLOYMENT, True, b""))
        assert here not in spans.needed()
        assert not await giving.gives(here), "on disk, but nobody could say whose it is"

    in_big_swarm(1, test)


def test_a_directory_that_lies_or_never_answers_costs_an_upload_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        shards = await leased(swarm.client, worker, 2)
        right, asked = capability(swarm.client, worker.peer), []

        async def silent(_: object, key: bytes) -> tuple[()]:
            asked.append(key)
            await trio.sleep_forever()
            return ()

        monkeypatch.setattr(type(worker.service._ports.directory), "providers", silent)
        for _ in range(3):
            channel = await swarm.client.dial(worker, SHARD)
            await swarm.client.offer(channel, shards[0], capability=right)
            await trio.sleep(1)
        assert asked == [shard_key(PieceList.of_bytes(shards[0]).digest)], "one search for a shard at a time"
        suppliers = worker.service._fetches.suppliers
        suppliers._searched.update(bytes([number]) * 32 for number in range(SEARCHES_MAX))
        await swarm.client.upload(worker, shards, capability=right)
        assert len(asked) == 1, "no more than a few searches at a time"
        assert list(worker.store.whole.values()) == shards

    in_big_swarm(1, test)


def test_a_worker_dials_no_address_that_it_would_not_dial_for_a_ticket(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(swarm: Swarm) -> None:
        holder, worker = swarm.workers
        (shard,) = await deployed(swarm.client, holder)
        await leased(swarm.client, worker)
        mallory, dialled = await swarm.another("mallory"), []
        opened = type(worker.endpoint).open

        async def spy(endpoint: object, peer: str, addrs: tuple[str, ...], protocol: str) -> object:
            if peer == mallory.peer:
                dialled.append(addrs)
            return await opened(endpoint, peer, addrs, protocol)

        monkeypatch.setattr(type(worker.endpoint), "open", spy)
        inside = tuple(
            replace(source(holder), peer=mallory.peer, addrs=(addr,))
            for addr in ("/ip4/127.0.0.1/tcp/22", "/ip4/169.254.169.254/tcp/80", "/dns4/router.lan/tcp/443")
        )
        for named in inside:
            await swarm.client.upload(
                worker, [shard], sources=(named,), capability=capability(swarm.client, worker.peer)
            )
            del worker.store.whole[PieceList.of_bytes(shard).digest]
            await trio.sleep(120)
        assert dialled == []

    in_big_swarm(2, test)


def test_pieces_from_other_workers_count_towards_the_bandwidth() -> None:
    async def test(swarm: Swarm) -> None:
        holder, worker = swarm.workers
        holder.service._throttled = False
        shards = await deployed(swarm.client, holder, 2)
        lines(swarm, SLOW, swarm.client.peer, worker.peer)
        await leased(swarm.client, worker, 2)
        await trio.sleep(60)
        started = trio.current_time()
        right = capability(swarm.client, worker.peer)
        await swarm.client.upload(worker, shards, sources=(source(holder),), capability=right)
        took_s, burst = trio.current_time() - started, 4 * PIECE_BYTES
        assert took_s >= (sum(map(len, shards)) - burst) / PIECE_BYTES - 1

    in_swarm(2, test, quotas=Quotas(bandwidth=PIECE_BYTES), **MEMORY)


def test_what_is_loaded_needs_no_shards_from_disk() -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        (shard,) = await deployed(swarm.client, worker)
        await swarm.client.ask(worker, ReleaseSpan(DEPLOYMENT, False, b""))
        assert not worker.service.house.spans.pinned(), "a cache's shards may go"
        del worker.store.whole[PieceList.of_bytes(shard).digest]
        answer = await swarm.client.ask(worker, lease_of(make_manifest(swarm.client.identity, 1, config=BIG)[0], 0, 1))
        assert isinstance(answer, SpanLeased)
        assert answer.missing == ()
        assert isinstance(await swarm.client.ask(worker, LoadSpan(DEPLOYMENT)), SpanLoaded)

    in_big_swarm(1, test)


def test_a_lease_goes_no_further_than_the_store_s_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    made = MemoryStore.__init__

    def small(store: MemoryStore) -> None:
        made(store)
        store.bytes_max = 10 * PIECE_BYTES

    monkeypatch.setattr(MemoryStore, "__init__", small)

    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        await deployed(swarm.client, worker)
        bob = await swarm.another("bob")
        request = lease_of(make_manifest(bob.identity, 1, b"B" * 16, config=BIG)[0], 0, 1)
        assert reason(await bob.ask(worker, request)) == RefusalReason.DISK
        await swarm.client.ask(worker, ReleaseSpan(DEPLOYMENT, False, b""))
        assert isinstance(await bob.ask(worker, request), SpanLeased), "what nobody leases makes room"

    in_big_swarm(1, test)
