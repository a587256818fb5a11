"""Workers on the virtual network, and a client that is written out by hand: every message is the test's own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any, TypeVar

import numpy as np
import trio

from models.config import BlockConfig, RopeConfig
from protocol.adverts import Speed
from protocol.channel import Channel
from protocol.ids import DeploymentId, PeerId, SessionId, deployment_id
from protocol.manifest import BlockEntry, ConfigPair, Manifest, TensorEntry, sign_manifest
from protocol.messages import (
    CONTROL,
    SESSION,
    SHARD,
    Attach,
    Attached,
    LeaseSpan,
    LoadSpan,
    Message,
    OpenSession,
    Operation,
    PiecesWanted,
    SessionOpened,
    ShardOffer,
    ShardPiece,
    ShardProgress,
    ShardStored,
    Source,
    SpanLeased,
    SpanLoaded,
    Step,
    StepOutput,
)
from protocol.pieces import PieceList
from protocol.ports import Compute
from protocol.signed import Identity
from protocol.tensors import Payload, TensorHeader
from protocol.tickets import Ticket, issue_ticket
from simnet.compute import CostModel, ToyCompute
from simnet.directory import VirtualDirectory
from simnet.endpoint import VirtualEndpoint
from simnet.network import VirtualNetwork, open_network
from simnet.runtime import SeededEntropy, VirtualClock, run
from simnet.store import MemoryStore
from worker.config import QUOTAS_DEFAULT, Quotas
from worker.observer import WorkerObserver
from worker.service import WorkerConfig, WorkerPorts, WorkerService

T = TypeVar("T")
WIDTH = 8
CONFIG = BlockConfig(
    family="llama", hidden_size=WIDTH, intermediate_size=12, num_heads=2, num_kv_heads=1, head_dim=4,
    rms_norm_eps=1e-5, max_position=512, rope=RopeConfig(theta=10_000.0),
)  # fmt: skip
KV_TOKEN_BYTES = 2 * 64  # of one block: narrow heads take as much as if they were 16 numbers wide
BLOCK_BYTES = 4 * CONFIG.num_parameters
QUEUE_BYTES = 256 << 20  # beside what `memory_bytes` of a worker in these tests says
LEASE_S = 3600
SALT = b"hand-made deploy"


class Counts(WorkerObserver):
    """Counts what the tests ask about."""

    def __init__(self) -> None:
        self.violations: list[tuple[PeerId, str]] = []
        self.failed: list[str] = []
        self.refused: list[str] = []
        self.repeated = self.dropped = self.sessions = self.queue = self.computed = self.adverts_refused = 0
        self.weight_bytes = self.kv_bytes = 0
        self.busy_s = self.bubble_s = 0.0
        self.prefix = (0, 0)  # tokens asked for, tokens held
        self.phases: list[tuple[int, bool]] = []  # positions of each step, and whether they were a prompt's

    def step_computed(self, positions: int, compute_s: float, prefill: bool) -> None:
        self.computed += 1
        self.phases.append((positions, prefill))

    def engine_used(self, busy_s: float, bubble_s: float) -> None:
        self.busy_s += busy_s
        self.bubble_s += bubble_s

    def step_repeated(self) -> None:
        self.repeated += 1

    def prefix_asked(self, tokens: int, held: int) -> None:
        self.prefix = (self.prefix[0] + tokens, self.prefix[1] + held)

    def output_dropped(self) -> None:
        self.dropped += 1

    def queue_changed(self, steps: int) -> None:
        self.queue = steps

    def sessions_changed(self, sessions: int) -> None:
        self.sessions = sessions

    def session_failed(self, reason: str) -> None:
        self.failed.append(reason)

    def request_refused(self, reason: str) -> None:
        self.refused.append(reason)

    def memory_changed(self, weight_bytes: int, kv_bytes: int) -> None:
        self.weight_bytes, self.kv_bytes = weight_bytes, kv_bytes

    def violation(self, peer: PeerId, protocol: str) -> None:
        self.violations.append((peer, protocol))

    def advert_refused(self, peer: PeerId) -> None:
        self.adverts_refused += 1


@dataclass(slots=True)
class Worker:
    """A running worker and all that tests look into."""

    identity: Identity
    endpoint: VirtualEndpoint
    service: WorkerService
    compute: Any
    store: MemoryStore
    counts: Counts
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    stopped: trio.Event = field(default_factory=trio.Event)

    @property
    def peer(self) -> PeerId:
        return self.identity.peer

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        with self.scope:
            await self.service.run(task_status=task_status)
        self.stopped.set()

    async def stop(self) -> None:
        self.scope.cancel()
        await self.stopped.wait()

    def assert_idle(self) -> None:
        """No lease of any session is left anywhere."""
        assert not self.service.sessions.live
        house = self.service.house
        leased = sum(
            holding.lease.kv_tokens * span.request.kv_token_bytes
            for span in house.spans.leases.values()
            for holding in span.holders.values()
        )
        assert house.pool.used_bytes == leased
        assert house.quota.taken == 0
        assert house.queues.used_bytes == 0
        assert all(lease.sessions == 0 for lease in house.spans.leases.values())
        assert not self.compute.sessions
        assert (self.counts.sessions, self.counts.queue, self.counts.kv_bytes) == (0, 0, leased)


@dataclass(slots=True)
class Swarm:
    network: VirtualNetwork
    workers: list[Worker]
    nursery: trio.Nursery
    client: HandClient
    start: Callable[[str, MemoryStore], Awaitable[Worker]]

    async def restart(self, index: int) -> Worker:
        """The worker's process ends without a word, and comes back with what its store held."""
        before = self.workers[index]
        self.network.crash(before.peer)
        await before.stop()
        self.workers[index] = await self.start(f"worker {index}", before.store)
        return self.workers[index]

    async def another(self, name: str) -> HandClient:
        """One more client with an identity of its own."""
        return HandClient(await _join(self.network, self.nursery, name), identity(name))


def identity(name: str) -> Identity:
    return Identity(sha256(name.encode()).digest())


DEPLOYMENT = deployment_id(identity("client").peer, SALT)


async def _join(network: VirtualNetwork, nursery: trio.Nursery, name: str) -> VirtualEndpoint:
    """A peer in a task of its own, so that a crash of it cancels nothing else."""

    async def live(task_status: trio.TaskStatus[VirtualEndpoint]) -> None:
        async with network.join(identity(name).seed) as endpoint:
            task_status.started(endpoint)
            await trio.sleep_forever()

    return await nursery.start(live)


def in_swarm(count: int, test: Callable[[Swarm], Awaitable[T]], seed: int = 1, **settings: Any) -> T:
    """Run `test` in virtual time with `count` workers that know nothing yet."""

    async def main() -> T:
        async with open_swarm(count, seed, **settings) as swarm:
            return await test(swarm)

    return run(main, seed)


@asynccontextmanager
async def open_swarm(
    count: int,
    seed: int = 1,
    *,
    compute: Callable[[MemoryStore], Compute] | None = None,
    memory_bytes: int = 1 << 20,
    kv_memory_bytes: int = 1 << 18,
    queue_memory_bytes: int = QUEUE_BYTES,
    quotas: Quotas = QUOTAS_DEFAULT,
    **ports: Any,
) -> AsyncIterator[Swarm]:
    """`ports` are further ones of all workers."""
    async with open_network(seed) as network, trio.open_nursery() as nursery:
        speeds, directory = (Speed("float32", 10.0, 100.0),), VirtualDirectory()

        async def start(name: str, store: MemoryStore) -> Worker:
            own, counts, endpoint = identity(name), Counts(), await _join(network, nursery, name)
            engine: Any = compute(store) if compute else ToyCompute(CostModel())
            entropy = SeededEntropy(seed, name)
            own_ports = WorkerPorts(
                endpoint, endpoint, engine, store, VirtualClock(), entropy, counts, directory=directory.of(endpoint)
            )
            total_bytes = memory_bytes + queue_memory_bytes
            config = WorkerConfig(own, total_bytes, kv_memory_bytes, queue_memory_bytes, speeds, "cpu", "0", quotas)
            service = WorkerService(replace(own_ports, **ports), config)
            worker = Worker(own, endpoint, service, engine, store, counts)
            await nursery.start(worker.run)
            return worker

        workers = [await start(f"worker {index}", MemoryStore()) for index in range(count)]
        client = HandClient(await _join(network, nursery, "client"), identity("client"))
        yield Swarm(network, workers, nursery, client, start)
        for worker in workers:
            await worker.stop()
        nursery.cancel_scope.cancel()


def make_manifest(
    owner: Identity,
    blocks: int,
    salt: bytes = SALT,
    shards: Sequence[bytes] | None = None,
    config: BlockConfig = CONFIG,
    dtype: str = "float32",
) -> tuple[bytes, Manifest, list[bytes]]:
    """A signed manifest of `blocks` equal blocks, and shards that have the stated digests (any bytes, by default)."""
    tensors = tuple(
        TensorEntry(name, TensorHeader(dtype, shape)) for name, shape in sorted(config.tensor_shapes().items())
    )
    size = sum(entry.header.nbytes for entry in tensors)
    if shards is None:
        shards = [(salt + bytes([index])) * (size // 17 + 3) for index in range(blocks)]
    entries = tuple(
        BlockEntry(
            digest=PieceList.of_bytes(shard).digest,
            shard_bytes=len(shard),
            config=tuple(ConfigPair(key, value) for key, value in config.to_pairs()),
            tensors=tensors,
        )
        for shard in shards
    )
    manifest = Manifest(deployment_id(owner.peer, salt), salt, "plain", dtype, entries)
    return sign_manifest(manifest, owner), manifest, list(shards)


def lease_of(manifest: bytes, start: int, end: int, **terms: Any) -> LeaseSpan:
    """An owner's request, without KV room unless `terms` say so."""
    return LeaseSpan(manifest, start, end, **({"kv_tokens": 0, "lease_s": LEASE_S, "capability": b""} | terms))


@dataclass(slots=True)
class HandClient:
    """Sends what the test says; keeps what comes."""

    endpoint: VirtualEndpoint
    identity: Identity
    nonces: int = 0

    @property
    def peer(self) -> PeerId:
        return self.identity.peer

    async def dial(self, worker: Worker, protocol: str) -> Channel:
        return Channel(await self.endpoint.open(worker.peer, worker.endpoint.addrs, protocol), protocol)

    async def ask(self, worker: Worker, request: Message) -> Message:
        channel = await self.dial(worker, CONTROL)
        try:
            return await channel.call(request)
        finally:
            await channel.aclose()

    async def upload(self, worker: Worker, shards: Sequence[bytes], **offer: Any) -> list[int]:
        """Offer `shards` and give what is asked for; gives the indexes of the pieces that were."""
        channel = await self.dial(worker, SHARD)
        given = []
        for shard in shards:
            given += await self.give(channel, shard, **offer)
        await channel.aclose()
        return given

    async def offer(
        self, channel: Channel, shard: bytes, sources: tuple[Source, ...] = (), capability: bytes = b""
    ) -> PieceList:
        pieces = PieceList.of_bytes(shard)
        await channel.send(ShardOffer(pieces.digest, len(shard), sources, capability), pieces.hashes)
        return pieces

    async def give(self, channel: Channel, shard: bytes, **offer: Any) -> list[int]:
        pieces = await self.offer(channel, shard, **offer)
        given = []
        while True:
            received = await channel.receive()
            assert received is not None
            match received[0]:
                case PiecesWanted(digest, first, count):
                    assert digest == pieces.digest
                    for index in range(first, first + count):
                        offset, size = pieces.place(index)
                        await channel.send(ShardPiece(digest, index), shard[offset : offset + size])
                        given.append(index)
                case ShardProgress():
                    pass
                case other:
                    assert other == ShardStored(pieces.digest), other
                    return given

    async def deploy(self, worker: Worker, blocks: int, start: int, end: int, salt: bytes = SALT) -> DeploymentId:
        """Lease, upload, load; the lease is without KV room."""
        data, manifest, shards = make_manifest(self.identity, blocks, salt)
        leased = await self.ask(worker, lease_of(data, start, end))
        assert isinstance(leased, SpanLeased), leased
        await self.upload(worker, shards[start:end])
        loaded = await self.ask(worker, LoadSpan(manifest.deployment))
        assert isinstance(loaded, SpanLoaded), loaded
        return manifest.deployment

    async def deploy_route(self, workers: Sequence[Worker], per_worker: int = 2) -> None:
        blocks = len(workers) * per_worker
        for index, worker in enumerate(workers):
            await self.deploy(worker, blocks, index * per_worker, (index + 1) * per_worker)

    async def route(self, workers: Sequence[Worker], name: str = "session", **terms: Any) -> HandRoute:
        """Streams to all hops, the session attached and opened on each."""
        route = HandRoute(self, list(workers), SessionId(sha256(name.encode()).digest()[:16]))
        await route.dial()
        await route.attach()
        await route.open(**terms)
        for worker in workers:
            message, _ = await route.next(worker)
            assert isinstance(message, SessionOpened), message
        return route


@dataclass(slots=True)
class HandRoute:
    """One session over some workers, two blocks each unless said otherwise."""

    client: HandClient
    workers: list[Worker]
    session: SessionId
    channels: dict[PeerId, Channel] = field(default_factory=dict)

    async def dial(self) -> None:
        for worker in self.workers:
            self.channels[worker.peer] = await self.client.dial(worker, SESSION)

    async def attach(self) -> None:
        for worker in self.workers:
            assert await self.channels[worker.peer].call(Attach(self.session)) == Attached(self.session)

    def tickets(self, workers: Sequence[Worker] | None = None, **terms: Any) -> list[Ticket]:
        """Honest tickets for the route."""
        hops = list(self.workers if workers is None else workers)
        peers = [self.client.peer, *(worker.peer for worker in hops), PeerId("")]
        tickets = []
        for index, worker in enumerate(hops):
            self.client.nonces += 1
            after = hops[index + 1].endpoint.addrs if index + 1 < len(hops) else ()
            ticket = Ticket(
                session=self.session,
                epoch=0,
                nonce=sha256(f"{self.client.peer} {self.client.nonces}".encode()).digest()[:16],
                expires_ms=int(VirtualClock().time() * 1000) + 60_000,
                client=self.client.peer,
                worker=worker.peer,
                predecessor=peers[index],
                successor=peers[index + 2],
                successor_addrs=after,
                deployment=DEPLOYMENT,
                start=2 * index,
                end=2 * index + 2,
                kv_tokens=64,
                returns="none",
                capability=b"",
            )
            tickets.append(replace(ticket, **terms))
        return tickets

    def boxes(self, tickets: Sequence[Ticket]) -> tuple[bytes, ...]:
        return tuple(issue_ticket(ticket, self.client.identity) for ticket in tickets)

    async def open(self, **terms: Any) -> None:
        await self.send(OpenSession(self.session, self.boxes(self.tickets(**terms))))

    async def send(self, message: Message, body: bytes = b"", to: Worker | None = None) -> None:
        await self.channels[(to or self.workers[0]).peer].send(message, body)

    async def next(self, worker: Worker | None = None) -> tuple[Message, bytes]:
        """The next message of a hop: of the last one, by default."""
        with trio.fail_after(60):
            received = await self.channels[(worker or self.workers[-1]).peer].receive()
        assert received is not None, "the worker closed the stream"
        return received

    async def ended(self, worker: Worker) -> bool:
        """True when the worker closed the session stream."""
        with trio.fail_after(60):
            return await self.channels[worker.peer].receive() is None

    def step(self, number: int, position: int, rows: np.ndarray, **other: Any) -> tuple[Step, bytes]:
        payload = Payload(TensorHeader("float32", rows.shape), rows.astype("<f4").tobytes())
        step = Step(
            session=self.session, epoch=0, step=number, position=position, acked=0, tail=1,
            operation=Operation.SPAN, block=0, matrix="", tensor=payload.header,
        )  # fmt: skip
        return replace(step, **other), payload.data

    async def answer(self, number: int) -> np.ndarray:
        """The last hop's answer to step `number`, which must be the next message."""
        message, body = await self.next()
        assert isinstance(message, StepOutput), message
        assert message.step == number
        return rows_of(message, body)

    async def do(self, number: int, position: int, rows: np.ndarray, **other: Any) -> np.ndarray:
        await self.send(*self.step(number, position, rows, **other))
        return await self.answer(number)

    async def aclose(self) -> None:
        for channel in self.channels.values():
            await channel.aclose()


def rows_of(message: StepOutput, body: bytes) -> np.ndarray:
    return np.frombuffer(body, "<f4").reshape(message.tensor.shape)


def some_rows(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, WIDTH)).astype(np.float32)


async def attached(swarm: Swarm, count: int = 1, session: bytes = b"s" * 16) -> HandRoute:
    await swarm.client.deploy_route(swarm.workers[:count])
    route = HandRoute(swarm.client, swarm.workers[:count], SessionId(session))
    await route.dial()
    await route.attach()
    return route


async def opened(swarm: Swarm) -> HandRoute:
    """`attached`, and its session open at the first worker."""
    route = await attached(swarm)
    await route.open()
    await route.next()
    return route
