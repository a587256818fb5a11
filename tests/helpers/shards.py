"""What tests of shards share: a swarm with shards of nine pieces, and lines of chosen speed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace

import trio

from protocol.channel import Channel
from protocol.ids import PeerId
from protocol.limits import PIECE_BYTES
from protocol.messages import LoadSpan, Message, ShardProgress, Source, SpanLeased, SpanLoaded
from simnet.links import LinkOptions
from tests.helpers.workers import CONFIG, DEPLOYMENT, SALT, HandClient, Swarm, Worker, in_swarm, lease_of, make_manifest

BIG = replace(CONFIG, hidden_size=512, intermediate_size=1400)  # shards of nine pieces
MEMORY = {"memory_bytes": 64 << 20, "kv_memory_bytes": 1 << 16}
SLOW = LinkOptions(bytes_per_s=PIECE_BYTES / 4)  # a piece in four seconds
LAN = LinkOptions(delay_s=0.001, bytes_per_s=50 * PIECE_BYTES)


def in_big_swarm(count: int, test: Callable[[Swarm], Awaitable[None]]) -> None:
    in_swarm(count, test, **MEMORY)


async def leased(client: HandClient, worker: Worker, blocks: int = 1, salt: bytes = SALT) -> list[bytes]:
    data, _, shards = make_manifest(client.identity, blocks, salt, config=BIG)
    assert isinstance(await client.ask(worker, lease_of(data, 0, blocks)), SpanLeased)
    return shards


async def deployed(client: HandClient, worker: Worker, blocks: int = 1) -> list[bytes]:
    shards = await leased(client, worker, blocks)
    await client.upload(worker, shards)
    assert isinstance(await client.ask(worker, LoadSpan(DEPLOYMENT)), SpanLoaded)
    return shards


def source(worker: Worker) -> Source:
    return Source(worker.peer, worker.endpoint.addrs)


def lines(swarm: Swarm, options: LinkOptions, *peers: PeerId) -> None:
    """Every line between the first peer and each of the others."""
    for other in peers[1:]:
        swarm.network.options.links[peers[0], other] = options
        swarm.network.options.links[other, peers[0]] = options


def assert_no_fetch(worker: Worker) -> None:
    assert not worker.service._fetches._running
    assert not any(supplier.jobs for supplier in worker.service._fetches.suppliers._live.values())


async def next_of(channel: Channel, kind: type[Message]) -> Message:
    """The next message, with progress passed over when it is not what is waited for."""
    with trio.fail_after(120):
        while (received := await channel.receive()) is not None:
            if not isinstance(received[0], ShardProgress) or issubclass(ShardProgress, kind):
                assert isinstance(received[0], kind), received[0]
                return received[0]
    raise AssertionError("the worker closed the stream")
