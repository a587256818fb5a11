"""Shards that clients bring, over real services on the virtual network."""

from __future__ import annotations

from collections.abc import Collection, Set
from contextlib import suppress

import pytest
import trio

from protocol.channel import Channel
from protocol.errors import Refused, TransportError
from protocol.ids import ShardDigest
from protocol.limits import PIECE_BYTES
from protocol.messages import (
    SHARD,
    Message,
    PiecesWanted,
    Refusal,
    RefusalReason,
    ReleaseSpan,
    ShardOffer,
    ShardPiece,
    ShardProgress,
    ShardStored,
    SpanLeased,
    SpanReleased,
)
from protocol.pieces import PieceList
from protocol.ports import Keep
from simnet.links import LinkOptions
from simnet.store import MemoryStore
from tests.helpers.rights import reason
from tests.helpers.shards import BIG, assert_no_fetch, deployed, in_big_swarm, leased, lines, next_of
from tests.helpers.workers import DEPLOYMENT, HandClient, Swarm, Worker, in_swarm, lease_of, make_manifest
from worker.admission import UPLOAD_SILENCE_S
from worker.fetch import DRAIN_S
from worker.piece_plan import LATE_S, WINDOW_START


def test_every_piece_is_asked_for_once_over_one_stream() -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        shards = await leased(swarm.client, worker, 2)
        assert await swarm.client.upload(worker, shards) == [*range(9), *range(9)]
        assert list(worker.store.whole.values()) == shards
        assert await swarm.client.upload(worker, shards) == []
        assert_no_fetch(worker)

    in_big_swarm(1, test)


def test_a_long_line_is_kept_full() -> None:
    """100 ms of delay: piece by piece, nine would take nine round trips."""

    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        window = 64 << 20
        lines(swarm, LinkOptions(delay_s=0.1, bytes_per_s=1e9, window_bytes=window), worker.peer, swarm.client.peer)
        (shard,) = await leased(swarm.client, worker)
        started = trio.current_time()
        await swarm.client.upload(worker, [shard])
        assert trio.current_time() - started < 7 * 0.2

    in_big_swarm(1, test)


def test_an_upload_that_broke_off_sends_no_piece_again_that_was_written() -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        (shard,) = await leased(swarm.client, worker)
        given: list[int] = []
        for _ in range(4):
            channel = await swarm.client.dial(worker, SHARD)
            with trio.move_on_after(0.1):
                given += await swarm.client.give(channel, shard)
            await channel.aclose()
            await trio.sleep(1)
            part = worker.store.parts[PieceList.of_bytes(shard).digest]
            assert not await _asked_now(swarm.client, worker, shard) & part.keys()
        await swarm.client.upload(worker, [shard])
        assert worker.store.whole[PieceList.of_bytes(shard).digest] == shard

    in_big_swarm(1, test)


async def _asked_now(client: HandClient, worker: Worker, shard: bytes) -> set[int]:
    """What the worker asks of a client that gives nothing."""
    channel = await client.dial(worker, SHARD)
    await client.offer(channel, shard)
    wanted = await next_of(channel, PiecesWanted)
    assert isinstance(wanted, PiecesWanted)
    await channel.aclose()
    await trio.sleep(1)
    return set(range(wanted.first, wanted.first + wanted.count))


def test_a_newer_stream_takes_over_from_one_that_died_unnoticed() -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        (shard,) = await leased(swarm.client, worker)
        dead = await swarm.client.dial(worker, SHARD)
        await swarm.client.offer(dead, shard)
        await trio.sleep(1)
        started = trio.current_time()
        given = await swarm.client.upload(worker, [shard])
        assert sorted(given) == list(range(9))
        assert trio.current_time() - started < LATE_S + 2
        await trio.sleep(DRAIN_S + 1)
        assert await _closed(dead)
        assert_no_fetch(worker)

    in_big_swarm(1, test)


async def _closed(channel: Channel) -> bool:
    with trio.fail_after(60):
        with suppress(TransportError):
            while await channel.receive() is not None:
                pass
        return True


def test_two_clients_with_the_same_shard_bring_it_together() -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        bob = await swarm.another("bob")
        (shard,) = await leased(swarm.client, worker)
        entry = make_manifest(bob.identity, 1, b"B" * 16, [shard], BIG)
        assert isinstance(await bob.ask(worker, lease_of(entry[0], 0, 1)), SpanLeased)
        given: list[int] = []

        async def bring(client: HandClient) -> None:
            given.extend(await client.upload(worker, [shard]))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(bring, swarm.client)
            nursery.start_soon(bring, bob)
        assert sorted(given) == list(range(9))
        assert_no_fetch(worker)

    in_big_swarm(1, test)


def test_progress_is_told_every_second_even_when_there_is_none() -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        (shard,) = await leased(swarm.client, worker)
        channel = await swarm.client.dial(worker, SHARD)
        digest = (await swarm.client.offer(channel, shard)).digest
        assert await next_of(channel, ShardProgress) == ShardProgress(digest, 0)
        assert isinstance(await next_of(channel, PiecesWanted), PiecesWanted)
        started = trio.current_time()
        for _ in range(3):
            assert await next_of(channel, ShardProgress) == ShardProgress(digest, 0)
        assert trio.current_time() - started < 4
        await channel.send(ShardPiece(digest, 0), shard[:PIECE_BYTES])
        while (told := await next_of(channel, Message)) != ShardProgress(digest, PIECE_BYTES):
            assert isinstance(told, ShardProgress | PiecesWanted)

    in_big_swarm(1, test)


@pytest.mark.parametrize("wrong", ["bytes", "too short", "not due", "another shard", "another message"])
def test_a_client_that_gives_what_was_not_asked_for_is_cut_off(wrong: str) -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        (shard,) = await leased(swarm.client, worker)
        channel = await swarm.client.dial(worker, SHARD)
        digest = (await swarm.client.offer(channel, shard)).digest
        await next_of(channel, PiecesWanted)
        piece = shard[:PIECE_BYTES]
        match wrong:
            case "bytes":
                await channel.send(ShardPiece(digest, 0), b"?" + piece[1:])
            case "too short":
                await channel.send(ShardPiece(digest, 0), piece[:-1])
            case "not due":
                await channel.send(ShardPiece(digest, 1), shard[PIECE_BYTES : 2 * PIECE_BYTES])
            case "another shard":
                await channel.send(ShardPiece(ShardDigest(bytes(32)), 0), piece)
            case _:
                await channel.send(ShardStored(digest))
        assert await _closed(channel)
        assert worker.counts.violations == [(swarm.client.peer, SHARD)]
        assert worker.store.parts[digest] == {}
        await trio.sleep(1)
        assert_no_fetch(worker)
        await swarm.client.upload(worker, [shard])

    in_big_swarm(1, test)


def test_an_offer_with_a_wrong_piece_list_is_a_violation() -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        (shard,) = await leased(swarm.client, worker)
        pieces = PieceList.of_bytes(shard)
        channel = await swarm.client.dial(worker, SHARD)
        await channel.send(ShardOffer(pieces.digest, len(shard), (), b""), pieces.hashes[:-1] + b"?")
        assert await channel.receive() is None
        assert worker.counts.violations == [(swarm.client.peer, SHARD)]

    in_big_swarm(1, test)


def test_only_what_a_leased_span_needs_is_taken() -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        data, _, shards = make_manifest(swarm.client.identity, 2)
        await swarm.client.ask(worker, lease_of(data, 0, 1))
        mallory = await swarm.another("mallory")
        own, theirs = [await client.dial(worker, SHARD) for client in (swarm.client, mallory)]
        for client, channel, shard, why in (
            (swarm.client, own, shards[1], RefusalReason.FORBIDDEN),
            (mallory, theirs, shards[0], RefusalReason.FORBIDDEN),
        ):
            await client.offer(channel, shard)
            assert reason(await next_of(channel, Refusal)) == why
        first = PieceList.of_bytes(shards[0])
        await own.send(ShardOffer(first.digest, len(shards[0]) + 1, (), b""), first.hashes)
        assert reason(await next_of(own, Refusal)) == RefusalReason.BAD_SHARD
        await swarm.client.give(own, shards[0])  # over the same stream
        assert not worker.store.parts

    in_swarm(1, test)


@pytest.mark.parametrize("forget", [True, False])
def test_releasing_a_span_ends_its_fetch_and_keeps_what_came(forget: bool) -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        (shard,) = await leased(swarm.client, worker)
        channel = await swarm.client.dial(worker, SHARD)
        pieces = await swarm.client.offer(channel, shard)
        assert await next_of(channel, PiecesWanted) == PiecesWanted(pieces.digest, 0, WINDOW_START)
        assert await swarm.client.ask(worker, ReleaseSpan(DEPLOYMENT, forget, b"")) == SpanReleased()
        for index in range(WINDOW_START):  # what was asked for still comes, so the stream stays in step
            await channel.send(ShardPiece(pieces.digest, index), shard[index * PIECE_BYTES : (index + 1) * PIECE_BYTES])
        assert reason(await next_of(channel, Refusal)) == RefusalReason.UNKNOWN_LEASE
        assert_no_fetch(worker)
        await leased(swarm.client, worker)
        assert await swarm.client.give(channel, shard) == list(range(WINDOW_START, 9))
        assert worker.store.whole[pieces.digest] == shard

    in_big_swarm(1, test)


def test_a_lease_that_ends_ends_its_fetch_and_a_silent_span_is_forgotten_but_not_its_bytes() -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        data, _, (shard,) = make_manifest(swarm.client.identity, 1, config=BIG)
        await swarm.client.ask(worker, lease_of(data, 0, 1, lease_s=300))
        channel = await swarm.client.dial(worker, SHARD)
        digest = (await swarm.client.offer(channel, shard)).digest
        await trio.sleep(200)
        await channel.send(ShardPiece(digest, 0), shard[:PIECE_BYTES])
        await trio.sleep(90)
        assert worker.service._fetches._running
        await trio.sleep(20)
        assert not worker.service._fetches._running
        await trio.sleep(UPLOAD_SILENCE_S - 120)
        assert worker.service.house.spans.leases
        await trio.sleep(20)
        assert not worker.service.house.spans.leases
        assert list(worker.store.parts[digest]) == [0]

    in_big_swarm(1, test)


def test_offers_without_pieces_keep_no_memory() -> None:
    """Whoever offers again and again, and gives nothing, uploads nothing: also when some of the shard is here."""

    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        (shard,) = await leased(swarm.client, worker)
        for _ in range(3):
            channel = await swarm.client.dial(worker, SHARD)
            digest = (await swarm.client.offer(channel, shard)).digest
            await next_of(channel, PiecesWanted)
            if trio.current_time() < 1:
                await channel.send(ShardPiece(digest, 0), shard[:PIECE_BYTES])
            await trio.sleep(190)
            await channel.aclose()
        await trio.sleep(UPLOAD_SILENCE_S - trio.current_time() - 10)
        assert worker.service.house.spans.leases
        await trio.sleep(20)
        assert not worker.service.house.spans.leases
        assert list(worker.store.parts[digest]) == [0]

    in_big_swarm(1, test)


@pytest.mark.parametrize("call", ["begin", "write", "commit"])
def test_a_full_disk_is_refused_and_costs_nothing_else(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        (shard,) = await leased(swarm.client, worker)

        async def full(*_: object) -> None:
            raise Refused(RefusalReason.DISK, "the disk is full")

        channel = await swarm.client.dial(worker, SHARD)
        with monkeypatch.context() as patch:
            patch.setattr(type(worker.store), call, full)
            with pytest.raises(AssertionError, match="disk is full"):
                await swarm.client.give(channel, shard)
        assert_no_fetch(worker)
        await swarm.client.give(channel, shard)
        assert worker.store.whole

    in_big_swarm(1, test)


def test_what_spans_and_fetches_need_is_kept_when_room_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        held = await deployed(swarm.client, worker)
        bob = await swarm.another("bob")
        shards = await leased(bob, worker, 2, b"B" * 16)
        kept: list[Collection[ShardDigest]] = []
        begin = type(worker.store).begin

        async def spy(store: MemoryStore, pieces: PieceList, keep: Keep) -> Set[int]:
            kept.append(keep())
            return await begin(store, pieces, keep)

        monkeypatch.setattr(type(worker.store), "begin", spy)
        await bob.upload(worker, shards[:1])
        assert set(kept[0]) == {PieceList.of_bytes(shard).digest for shard in (*held, *shards)}

    in_big_swarm(1, test)
