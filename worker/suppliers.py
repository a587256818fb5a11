"""Other workers that give shards: named by a client, or found in the directory by right of the capability that the
client sent. One stream each, kept for the next shards.

Invariant: at most SUPPLIERS_PER_CLIENT_MAX streams for one client and SUPPLIERS_MAX in all, whatever clients name, and
at most SEARCHES_MAX searches in the directory at a time, and JOBS_MAX fetches wait for a supplier; what is too much is
left out. One that failed, or owes pieces and brings none (worker/fetch.py), is left alone for REST_S as far as that
client is concerned, who may have named a wrong address. One that broke the protocol is left alone by all, while it is
among the last SHUNNED_MAX.
"""

from __future__ import annotations

import logging
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from math import inf
from typing import TypeVar

import trio

from protocol import limits
from protocol.channel import Channel
from protocol.directory import shard_key
from protocol.errors import RemoteProtocolError, TransportError
from protocol.ids import PeerId, ShardDigest
from protocol.messages import SHARD, Refusal, ShardAsk, ShardOffer
from protocol.ports import Directory, Stream
from worker.config import WorkerPorts
from worker.fetch import Fetch
from worker.meter import Meter
from worker.piece_plan import Giver

log = logging.getLogger("sotto.worker")
DIAL_S = 10.0
ANSWER_S = 30.0  # the supplier may have to read its whole shard once, to make its list
IDLE_S = 30.0
SUPPLIERS_PER_CLIENT_MAX = limits.SHARD_SOURCES_MAX
SUPPLIERS_MAX = 64
JOBS_MAX = 64  # a client has as many streams, and an honest one a fetch or two at a time
REST_S = 60.0
SEARCHES_MAX = 8
SEARCHED_BYTES_MIN = 4 * limits.PIECE_BYTES  # a smaller shard is here before the directory has answered
SHUNNED_MAX = 256
K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class Job:
    """A fetch that a supplier may help with, by right of `capability`."""

    fetch: Fetch
    capability: bytes


@dataclass(slots=True, eq=False)
class Supplier:
    """The stream to one worker, for one client."""

    client: PeerId
    peer: PeerId
    addrs: tuple[str, ...]
    giver: Giver
    jobs: deque[Job] = field(default_factory=deque)
    called: trio.Event = field(default_factory=trio.Event)

    def take(self, job: Job) -> bool:
        """Help with it in its turn. False when too many wait before it; those whose fetches are over do not count."""
        self.jobs = deque(each for each in self.jobs if not each.fetch.over)
        if len(self.jobs) >= JOBS_MAX:
            return False
        self.jobs.append(job)
        self.called.set()
        return True

    async def next(self) -> Job | None:
        """The next fetch that is not over; None when there was none for IDLE_S."""
        with trio.move_on_after(IDLE_S):
            while True:
                while self.jobs:
                    job = self.jobs.popleft()
                    if not job.fetch.over:
                        return job
                self.called = trio.Event()
                await self.called.wait()
        return None


@dataclass(frozen=True, slots=True)
class Way:
    """To another worker: `reach` gives the addresses under which it may be dialled, of those that a stranger stated
    (raises TransportError when there are none); `slowed` keeps a stream within the worker's bandwidth."""

    reach: Callable[[PeerId, tuple[str, ...]], tuple[str, ...]]
    slowed: Callable[[Stream], Stream]


@dataclass(slots=True)
class Suppliers:
    """`spawn` starts a task."""

    ports: WorkerPorts
    meter: Meter
    way: Way
    spawn: Callable[[Callable[[], Awaitable[None]]], None]
    _searched: set[ShardDigest] = field(default_factory=set)
    _live: dict[tuple[PeerId, PeerId], Supplier] = field(default_factory=dict)
    _resting: OrderedDict[tuple[PeerId, PeerId], float] = field(default_factory=OrderedDict)  # until, monotonic s
    _liars: OrderedDict[PeerId, None] = field(default_factory=OrderedDict)

    def call(self, client: PeerId, offer: ShardOffer, fetch: Fetch) -> None:
        """Let the sources that `client` named help with `fetch`, as many as there is room for, and those that the
        directory knows, if it answers in time."""
        job = Job(fetch, offer.capability)
        for source in offer.sources:
            self._enlist(client, source.peer, source.addrs, job)
        directory, digest = self.ports.directory, offer.digest
        room = len(self._searched) < SEARCHES_MAX and len(offer.sources) < limits.SHARD_SOURCES_MAX
        worth = offer.shard_bytes >= SEARCHED_BYTES_MIN and offer.capability and digest not in self._searched
        if directory is not None and room and worth:
            self._searched.add(digest)
            self.spawn(partial(self._search, directory, client, offer, job))

    async def _search(self, directory: Directory, client: PeerId, offer: ShardOffer, job: Job) -> None:
        try:
            found = await directory.providers(shard_key(offer.digest))
        finally:
            self._searched.discard(offer.digest)
        named = {source.peer for source in offer.sources}
        for provider in found:
            if provider.peer not in named and provider.peer != client and not job.fetch.over:
                self._enlist(client, provider.peer, provider.addrs, job)

    def _enlist(self, client: PeerId, peer: PeerId, addrs: tuple[str, ...], job: Job) -> None:
        supplier = self._live.get((client, peer))
        if supplier is None and self._welcome(client, peer):
            supplier = self._live[client, peer] = Supplier(client, peer, addrs, Giver(peer))
            self.spawn(partial(self._run, supplier))
        if supplier is not None and supplier.take(job):
            job.fetch.called(supplier.giver)

    async def _run(self, supplier: Supplier) -> None:
        """Dial, and help with one fetch after the other until there is none, or the stream fails."""
        try:
            with trio.fail_after(DIAL_S):
                addrs = self.way.reach(supplier.peer, supplier.addrs)
                stream = self.way.slowed(await self.ports.transport.open(supplier.peer, addrs, SHARD))
            channel = Channel(stream, SHARD)
            try:
                with self.meter.on(channel, SHARD):
                    while (job := await supplier.next()) is not None:
                        await _help(channel, supplier, job)
            finally:
                await stream.aclose()
        except RemoteProtocolError as error:
            self.ports.observer.violation(supplier.peer, SHARD)
            log.warning("violation", extra={"peer": supplier.peer, "protocol": SHARD, "error": str(error)})
            _note(self._liars, supplier.peer, None)
        except (TransportError, trio.TooSlowError) as error:
            log.info("a source of shards is out", extra={"peer": supplier.peer, "error": str(error) or "too slow"})
            _note(self._resting, (supplier.client, supplier.peer), self.ports.clock.monotonic() + REST_S)
        finally:
            del self._live[supplier.client, supplier.peer]
            for job in supplier.jobs:
                job.fetch.answered(supplier.giver)

    def _welcome(self, client: PeerId, peer: PeerId) -> bool:
        own = sum(owner == client for owner, _ in self._live)
        full = own >= SUPPLIERS_PER_CLIENT_MAX or len(self._live) >= SUPPLIERS_MAX
        rests = self._resting.get((client, peer), -inf) > self.ports.clock.monotonic()
        return not (full or rests or peer in self._liars or peer == self.ports.transport.peer)


def _note(memory: OrderedDict[K, V], key: K, value: V) -> None:
    memory[key] = value
    if len(memory) > SHUNNED_MAX:
        memory.popitem(last=False)


async def _help(channel: Channel, supplier: Supplier, job: Job) -> None:
    """One fetch. Raises RemoteProtocolError, TransportError, trio.TooSlowError."""
    try:
        if await _offered(channel, job):
            await job.fetch.give(channel, supplier.giver)
    finally:
        job.fetch.answered(supplier.giver)


async def _offered(channel: Channel, job: Job) -> bool:
    """Ask for the shard. False when it refuses; raises RemoteProtocolError when it offers something else."""
    pieces = job.fetch.pieces
    with trio.fail_after(ANSWER_S):
        await channel.send(ShardAsk(pieces.digest, job.capability))
        received = await channel.receive()
    if received is None:
        raise TransportError("it closed the stream")
    message, body = received
    match message:
        case ShardOffer(digest) if digest == pieces.digest and body == pieces.hashes:
            return True
        case Refusal(reason):
            log.info("a source refused a shard", extra={"peer": channel.remote, "reason": reason})
            return False
        case _:
            raise RemoteProtocolError(f"{type(message).__name__} where the offer of a shard was due")
