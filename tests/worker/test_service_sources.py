"""Shards that workers give to each other, over real services on the virtual network."""

from __future__ import annotations

from contextlib import suppress

import pytest
import trio

from protocol.capabilities import Right
from protocol.channel import Channel
from protocol.errors import RemoteProtocolError, TransportError
from protocol.ids import PeerId, ShardDigest
from protocol.limits import PIECE_BYTES
from protocol.messages import (
    SHARD,
    Message,
    PiecesWanted,
    RefusalReason,
    ReleaseSpan,
    ShardAsk,
    ShardOffer,
    ShardPiece,
    Source,
)
from protocol.pieces import PieceList
from protocol.ports import Stream
from simnet.links import LinkOptions
from tests.helpers.rights import capability, reason
from tests.helpers.shards import LAN, SLOW, assert_no_fetch, deployed, in_big_swarm, leased, lines, next_of, source
from tests.helpers.workers import DEPLOYMENT, Swarm, Worker
from worker.fetch import SILENT_S
from worker.piece_plan import LATE_S, WINDOW_START
from worker.suppliers import JOBS_MAX


def test_several_sources_share_the_work() -> None:
    async def test(swarm: Swarm) -> None:
        first, second, third = swarm.workers
        for worker in (first, second):
            shards = await deployed(swarm.client, worker, 2)
        lines(swarm, LAN, third.peer, first.peer, second.peer, swarm.client.peer)
        await leased(swarm.client, third, 2)
        started = trio.current_time()
        given = await swarm.client.upload(
            third, shards, sources=(source(first), source(second)), capability=capability(swarm.client, third.peer)
        )
        assert list(third.store.whole.values()) == shards
        assert 0 < len(given) < 14
        assert len(_shard_streams(swarm, third)) == 2, "one stream to each source, for both shards"
        assert trio.current_time() - started < 2
        assert not any(worker.counts.violations for worker in swarm.workers)
        await trio.sleep(60)
        assert not third.service._fetches.suppliers._live

    in_big_swarm(3, test)


def _shard_streams(swarm: Swarm, opener: Worker) -> list[PeerId]:
    return [supplier.peer for supplier in opener.service._fetches.suppliers._live.values()]


@pytest.mark.parametrize("fault", ["crash", "freeze", "never there", "refuses", "no right"])
def test_a_source_that_fails_costs_little_time(fault: str) -> None:
    async def test(swarm: Swarm) -> None:
        holder, worker = swarm.workers
        (shard,) = await deployed(swarm.client, holder)
        lines(swarm, LinkOptions(bytes_per_s=2 * PIECE_BYTES), worker.peer, holder.peer, swarm.client.peer)
        await leased(swarm.client, worker)
        right = capability(swarm.client, worker.peer, Right.USE if fault == "no right" else Right.FETCH)
        if fault == "never there":
            swarm.network.refuse_dials(holder.peer)
        if fault == "refuses":
            await swarm.client.ask(holder, ReleaseSpan(DEPLOYMENT, True, b""))

        async def fail() -> None:
            await trio.sleep(1.5)
            if fault == "crash":
                swarm.network.crash(holder.peer)
            elif fault == "freeze":
                swarm.network.freeze(holder.peer)

        started = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail)
            await swarm.client.upload(worker, [shard], sources=(source(holder),), capability=right)
        assert trio.current_time() - started < 9 / 2 + LATE_S + 2
        assert list(worker.store.whole.values()) == [shard]
        assert not worker.counts.violations
        await trio.sleep(60)
        assert_no_fetch(worker)

    in_big_swarm(2, test)


def test_a_slow_client_gives_little_when_another_worker_is_quick() -> None:
    async def test(swarm: Swarm) -> None:
        holder, worker = swarm.workers
        shards = await deployed(swarm.client, holder, 4)
        lines(swarm, SLOW, swarm.client.peer, worker.peer)
        lines(swarm, LAN, holder.peer, worker.peer)
        await leased(swarm.client, worker, 4)
        started = trio.current_time()
        given = await swarm.client.upload(
            worker, shards, sources=(source(holder),), capability=capability(swarm.client, worker.peer)
        )
        assert list(worker.store.whole.values()) == shards
        assert len(given) <= WINDOW_START + 1, "of thirty-six"
        assert trio.current_time() - started < 4 * (len(given) + 1)

    in_big_swarm(2, test)


def test_a_source_that_lies_is_named_and_not_asked_again() -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        liar = await swarm.another("liar")
        shards = await leased(swarm.client, worker, 2)
        asked: list[Message] = []

        async def lie(stream: Stream) -> None:
            channel = Channel(stream, SHARD)
            while (received := await channel.receive()) is not None:
                asked.append(received[0])
                match received[0]:
                    case ShardAsk(digest):
                        shard = next(each for each in shards if PieceList.of_bytes(each).digest == digest)
                        await channel.send(ShardOffer(digest, len(shard), (), b""), PieceList.of_bytes(shard).hashes)
                    case PiecesWanted(digest, first):
                        await channel.send(ShardPiece(digest, first), bytes(PIECE_BYTES))

        liar.endpoint.handle(SHARD, lie)
        lines(swarm, LinkOptions(bytes_per_s=2 * PIECE_BYTES), worker.peer, swarm.client.peer)
        liars = (Source(liar.peer, liar.endpoint.addrs),)
        given = await swarm.client.upload(
            worker, shards, sources=liars, capability=capability(swarm.client, worker.peer)
        )
        assert sorted(given) == sorted([*range(9), *range(9)])
        assert list(worker.store.whole.values()) == shards
        assert worker.counts.violations == [(liar.peer, SHARD)]
        assert sum(isinstance(message, ShardAsk) for message in asked) == 1

    in_big_swarm(1, test)


async def silent_source(swarm: Swarm, shards: list[bytes]) -> Source:
    """It has the shards, and never gives a piece."""
    named = await swarm.another("silent")

    async def offer(stream: Stream) -> None:
        channel = Channel(stream, SHARD)
        while (received := await channel.receive()) is not None:
            match received[0]:
                case ShardAsk(digest):
                    pieces = next(each for each in map(PieceList.of_bytes, shards) if each.digest == digest)
                    await channel.send(ShardOffer(digest, pieces.shard_bytes, (), b""), pieces.hashes)

    named.endpoint.handle(SHARD, offer)
    return Source(named.peer, named.endpoint.addrs)


def test_a_source_that_owes_pieces_and_brings_none_is_let_go() -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        (shard,) = await leased(swarm.client, worker)
        sources = (await silent_source(swarm, [shard]),)
        channel = await swarm.client.dial(worker, SHARD)
        await swarm.client.offer(channel, shard, sources, capability(swarm.client, worker.peer))
        await trio.sleep(SILENT_S - 5)
        assert _shard_streams(swarm, worker) == [sources[0].peer]
        await trio.sleep(10)
        assert worker.service._fetches._running, "its client is waited for"
        assert not _shard_streams(swarm, worker)
        await swarm.client.upload(worker, [shard], sources=sources)
        assert not _shard_streams(swarm, worker), "it rests"

    in_big_swarm(1, test)


def test_what_waits_for_a_source_is_bounded() -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        stays, goes = await leased(swarm.client, worker, 2)
        sources, right = (await silent_source(swarm, [stays, goes]),), capability(swarm.client, worker.peer)

        async def offered(shard: bytes) -> Channel:
            channel = await swarm.client.dial(worker, SHARD)
            await swarm.client.offer(channel, shard, sources, right)
            await next_of(channel, PiecesWanted)
            return channel

        await offered(stays)
        (supplier,) = worker.service._fetches.suppliers._live.values()
        for _ in range(20):
            await (await offered(goes)).aclose()
            await trio.sleep(0.1)
        assert len(supplier.jobs) == 1, "the fetches before it are over"
        for _ in range(JOBS_MAX + 5):
            channel = await swarm.client.dial(worker, SHARD)
            await swarm.client.offer(channel, stays, sources, right)
            await trio.sleep(0.1)
            await channel.aclose()
        assert len(supplier.jobs) == JOBS_MAX, "one fetch, asked for again and again"

    in_big_swarm(1, test)


def test_a_client_cannot_make_a_worker_dial_without_end() -> None:
    async def test(swarm: Swarm) -> None:
        (worker,) = swarm.workers
        names = [await swarm.another(f"named {number}") for number in range(12)]
        for named in names:
            named.endpoint.handle(SHARD, lambda _: trio.sleep_forever())
        sources = [Source(named.peer, named.endpoint.addrs) for named in names]
        (shard,) = await leased(swarm.client, worker)
        for few in (sources[:8], sources[4:]):
            channel = await swarm.client.dial(worker, SHARD)
            await swarm.client.offer(channel, shard, (*few[:7], Source(worker.peer, worker.endpoint.addrs)))
        await trio.sleep(1)
        assert len(_shard_streams(swarm, worker)) == 8
        assert worker.peer not in _shard_streams(swarm, worker)

    in_big_swarm(1, test)


def test_a_worker_gives_only_to_those_whom_the_owner_sent() -> None:
    async def test(swarm: Swarm) -> None:
        holder, other = swarm.workers
        (shard,) = await deployed(swarm.client, holder)
        pieces = PieceList.of_bytes(shard)
        mallory = await swarm.another("mallory")
        for right in (b"", capability(swarm.client, other.peer), capability(mallory, other.peer)):
            channel = await mallory.dial(holder, SHARD)
            assert reason(await channel.call(ShardAsk(pieces.digest, right))) == RefusalReason.FORBIDDEN
        own = await swarm.client.dial(holder, SHARD)
        assert reason(await own.call(ShardAsk(ShardDigest(bytes(32)), b""))) == RefusalReason.FORBIDDEN
        await own.send(ShardAsk(pieces.digest, b""))  # the owner may read it back
        assert await own.receive() == (ShardOffer(pieces.digest, len(shard), (), b""), pieces.hashes)
        await own.send(PiecesWanted(pieces.digest, 8, 1))
        assert await own.receive() == (ShardPiece(pieces.digest, 8), shard[8 * PIECE_BYTES :])
        await swarm.client.ask(holder, ReleaseSpan(DEPLOYMENT, True, b""))
        assert reason(await own.call(ShardAsk(pieces.digest, b""))) == RefusalReason.FORBIDDEN

    in_big_swarm(2, test)


@pytest.mark.parametrize("wanted", [PiecesWanted(ShardDigest(bytes(32)), 0, 1), None])
def test_pieces_that_were_not_offered_are_a_violation(wanted: PiecesWanted | None) -> None:
    async def test(swarm: Swarm) -> None:
        (holder,) = swarm.workers
        (shard,) = await deployed(swarm.client, holder)
        channel = await swarm.client.dial(holder, SHARD)
        digest = PieceList.of_bytes(shard).digest
        await channel.send(ShardAsk(digest, b""))
        await channel.receive()
        await channel.send(wanted or PiecesWanted(digest, 8, 2))
        assert await channel.receive() is None
        assert holder.counts.violations == [(swarm.client.peer, SHARD)]

    in_big_swarm(1, test)


def test_a_shard_that_goes_in_the_middle_is_refused() -> None:
    async def test(swarm: Swarm) -> None:
        (holder,) = swarm.workers
        (shard,) = await deployed(swarm.client, holder)
        digest = PieceList.of_bytes(shard).digest
        channel = await swarm.client.dial(holder, SHARD)
        await channel.send(ShardAsk(digest, b""))
        await channel.receive()
        del holder.store.whole[digest]
        assert reason(await channel.call(PiecesWanted(digest, 0, 1))) == RefusalReason.MISSING_SHARDS

    in_big_swarm(1, test)


@pytest.mark.parametrize("end", ["client crashes", "client leaves", "worker stops", "source stops"])
def test_whenever_it_ends_nothing_is_left(end: str) -> None:
    """At many moments of a fetch from two sources."""
    for moment in range(0, 40, 3):

        async def test(swarm: Swarm, moment: int = moment) -> None:
            holder, worker = swarm.workers
            (shard,) = await deployed(swarm.client, holder)
            lines(swarm, LinkOptions(bytes_per_s=4 * PIECE_BYTES), worker.peer, holder.peer, swarm.client.peer)
            await leased(swarm.client, worker)
            right = capability(swarm.client, worker.peer)

            async def bring() -> None:
                with suppress(TransportError, RemoteProtocolError, AssertionError):
                    await swarm.client.upload(worker, [shard], sources=(source(holder),), capability=right)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(bring)
                await trio.sleep(0.05 * moment)
                match end:
                    case "client crashes":
                        swarm.network.crash(swarm.client.peer)
                    case "worker stops":
                        await worker.stop()
                    case "source stops":
                        await holder.stop()
                    case _:
                        nursery.cancel_scope.cancel()
            await trio.sleep(60)
            swarm.network.crash(swarm.client.peer)
            await trio.sleep(1)
            assert_no_fetch(worker)
            assert not worker.service._fetches.suppliers._live
            assert not [moment for protocol, *_ in worker.service._meter._open.values() if protocol == SHARD]

        in_big_swarm(2, test)
