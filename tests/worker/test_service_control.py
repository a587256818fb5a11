"""Spans prepared, uploaded, loaded and released over real services."""

from __future__ import annotations

from hashlib import sha256

import pytest
import trio

from protocol.ids import ShardDigest
from protocol.messages import (
    SHARD,
    LeaseSpan,
    LoadSpan,
    Message,
    Refusal,
    RefusalReason,
    ReleaseSpan,
    ShardOffer,
    ShardPiece,
    ShardStored,
    ShardWanted,
    SpanLeased,
    SpanLoaded,
    SpanReleased,
)
from simnet.compute import CostModel, ToyCompute
from tests.helpers.workers import BLOCK_BYTES, DEPLOYMENT, HandClient, Swarm, Worker, in_swarm, lease_of, make_manifest
from worker.admission import UPLOAD_SILENCE_S


def reason(message: Message) -> str:
    assert isinstance(message, Refusal), message
    return message.reason


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
        assert not worker.store.whole
        assert worker.counts.weight_bytes == 0

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


def test_an_idle_deployment_makes_room_and_leaves_nothing() -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        await swarm.client.deploy(worker, 2, 0, 2)
        bob = await swarm.another("bob")
        assert reason(await bob.ask(worker, lease_of(make_manifest(bob.identity, 2)[0], 0, 2))) == RefusalReason.MEMORY
        await swarm.client.ask(worker, ReleaseSpan(DEPLOYMENT, False, b""))
        assert list(worker.compute.spans) == [DEPLOYMENT], "it stays as a cache"
        assert list(worker.compute.spans) != [await bob.deploy(worker, 2, 0, 2)] == list(worker.compute.spans)
        assert len(worker.store.whole) == 2
        assert reason(await swarm.client.ask(worker, LoadSpan(DEPLOYMENT))) == RefusalReason.UNKNOWN_DEPLOYMENT

    in_swarm(1, test, memory_bytes=3 * BLOCK_BYTES + 1, kv_memory_bytes=1)


def test_another_range_of_the_same_deployment_replaces_the_first() -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        await swarm.client.deploy(worker, 3, 0, 2)
        await swarm.client.deploy(worker, 3, 1, 3)
        _, manifest, _ = make_manifest(swarm.client.identity, 3)
        assert set(worker.store.whole) == {block.digest for block in manifest.blocks[1:]}
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


def test_an_upload_goes_on_where_it_broke_off() -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        data, _, (shard,) = make_manifest(swarm.client.identity, 1)
        await swarm.client.ask(worker, lease_of(data, 0, 1))
        offer = ShardOffer(sha256(shard).digest(), len(shard))
        broken = await swarm.client.dial(worker, SHARD)
        assert await broken.call(offer) == ShardWanted(0)
        await broken.send(ShardPiece(0), shard[:100])
        await trio.sleep(1)
        # the old stream still looks alive to the worker: the newer one takes over
        newer = await swarm.client.dial(worker, SHARD)
        assert await newer.call(offer) == ShardWanted(100)
        assert await broken.receive() is None
        await newer.send(ShardPiece(100), shard[100:])
        assert await newer.receive() == (ShardStored(offer.digest), b"")
        assert await newer.call(offer) == ShardWanted(len(shard))
        assert await newer.receive() == (ShardStored(offer.digest), b"")
        assert worker.store.whole[offer.digest] == shard

    in_swarm(1, test)


def test_bytes_that_are_not_the_digests_are_refused_and_deleted() -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        data, _, (shard,) = make_manifest(swarm.client.identity, 1)
        await swarm.client.ask(worker, lease_of(data, 0, 1))
        channel = await swarm.client.dial(worker, SHARD)
        offer = ShardOffer(sha256(shard).digest(), len(shard))
        await channel.call(offer)
        await channel.send(ShardPiece(0), shard[:-1] + b"\xff")
        received = await channel.receive()
        assert received is not None
        assert reason(received[0]) == RefusalReason.BAD_SHARD
        assert await channel.call(offer) == ShardWanted(0), "from the start, over the same stream"
        await channel.send(ShardPiece(0), shard)
        assert await channel.receive() == (ShardStored(offer.digest), b"")

    in_swarm(1, test)


def test_only_what_a_prepared_span_needs_is_taken() -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        data, _, shards = make_manifest(swarm.client.identity, 2)
        await swarm.client.ask(worker, lease_of(data, 0, 1))
        mallory = await swarm.another("mallory")
        own, theirs = [await client.dial(worker, SHARD) for client in (swarm.client, mallory)]
        first, second = (sha256(shard).digest() for shard in shards)
        assert reason(await own.call(ShardOffer(second, len(shards[1])))) == RefusalReason.FORBIDDEN
        assert reason(await own.call(ShardOffer(first, len(shards[0]) + 1))) == RefusalReason.BAD_SHARD
        assert reason(await theirs.call(ShardOffer(first, len(shards[0])))) == RefusalReason.FORBIDDEN
        assert not worker.store.parts

    in_swarm(1, test)


@pytest.mark.parametrize("offset", [1, 50], ids=["a gap", "too many bytes"])
def test_pieces_out_of_place_close_the_stream(offset: int) -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        data, _, (shard,) = make_manifest(swarm.client.identity, 1)
        await swarm.client.ask(worker, lease_of(data, 0, 1))
        channel = await swarm.client.dial(worker, SHARD)
        await channel.call(ShardOffer(sha256(shard).digest(), len(shard)))
        if offset == 50:
            await channel.send(ShardPiece(0), shard + b"x")
        else:
            await channel.send(ShardPiece(1), shard[1:])
        assert await channel.receive() is None
        assert worker.counts.violations == [(swarm.client.peer, SHARD)]
        assert not worker.store.parts

    in_swarm(1, test)


def test_releasing_a_span_ends_its_uploads() -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        data, _, (shard,) = make_manifest(swarm.client.identity, 1)
        await swarm.client.ask(worker, lease_of(data, 0, 1))
        channel = await swarm.client.dial(worker, SHARD)
        await channel.call(ShardOffer(sha256(shard).digest(), len(shard)))
        await channel.send(ShardPiece(0), shard[:100])
        await trio.sleep(1)
        assert await swarm.client.ask(worker, ReleaseSpan(DEPLOYMENT, True, b"")) == SpanReleased()
        assert await channel.receive() is None
        assert not worker.store.parts

    in_swarm(1, test)


def test_an_upload_for_a_range_that_was_replaced_is_cut_off() -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        data, _, shards = make_manifest(swarm.client.identity, 3)
        await swarm.client.ask(worker, lease_of(data, 0, 2))
        channel = await swarm.client.dial(worker, SHARD)
        await channel.call(ShardOffer(sha256(shards[1]).digest(), len(shards[1])))
        await channel.send(ShardPiece(0), shards[1][:100])
        await swarm.client.ask(worker, lease_of(data, 1, 3))
        await channel.send(ShardPiece(100), shards[1][100:])
        received = await channel.receive()
        assert received is not None
        assert reason(received[0]) == RefusalReason.UNKNOWN_DEPLOYMENT
        assert await channel.receive() is None
        await swarm.client.upload(worker, shards[1:])  # and goes on from where it was
        assert isinstance(await swarm.client.ask(worker, LoadSpan(DEPLOYMENT)), SpanLoaded)

    in_swarm(1, test)


def test_a_span_whose_upload_fell_silent_is_forgotten() -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        data, _, (shard,) = make_manifest(swarm.client.identity, 1)
        await swarm.client.ask(worker, lease_of(data, 0, 1))
        channel = await swarm.client.dial(worker, SHARD)
        await channel.call(ShardOffer(sha256(shard).digest(), len(shard)))
        await trio.sleep(UPLOAD_SILENCE_S / 2)
        await channel.send(ShardPiece(0), shard[:100])
        await swarm.client.ask(worker, ReleaseSpan(DEPLOYMENT, False, b""))
        await trio.sleep(UPLOAD_SILENCE_S - 10)
        assert worker.service.house.spans.leases
        assert worker.store.parts
        await trio.sleep(20)
        assert not worker.service.house.spans.leases
        assert not worker.store.parts

    in_swarm(1, test)
