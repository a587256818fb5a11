"""The worker: protocol handlers on one side, the engine behind its port on the other, and the tasks between them.

Invariant: a stream's reader waits for nothing but its stream, its peer's pace (and, in control and shard, for the
request it is serving), so no peer can hold up another. This is the only file of the room that opens nurseries;
whatever goes wrong in a handler costs that stream, in a session that session. It decides nothing: control.py,
fetches.py and sessions.py do.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from functools import partial
from math import inf
from typing import Any

import trio

from protocol import limits
from protocol.channel import Channel
from protocol.errors import LocalProtocolError, Refused, RemoteProtocolError, SottoError, TransportError
from protocol.ids import PeerId, SessionId
from protocol.messages import (
    CONTROL,
    LINK,
    SESSION,
    SHARD,
    Attach,
    CloseSession,
    LeaseSpan,
    Message,
    OpenSession,
    PiecesWanted,
    Ping,
    Refusal,
    RefusalReason,
    SessionFailed,
    ShardAsk,
    ShardOffer,
    Step,
)
from protocol.pieces import PieceList
from protocol.ports import Stream, StreamHandler, TaskStatus
from protocol.tickets import TicketGate
from worker.admission import SessionQuota, SpanLedger
from worker.arrivals import Arrivals
from worker.cleanup import shielded
from worker.config import WorkerConfig, WorkerPorts
from worker.control import Control
from worker.dialling import dialable
from worker.duty import Cause, Duty
from worker.fetches import Fetches
from worker.giving import Giving
from worker.herald import Herald
from worker.house import House
from worker.kv_pool import KvPool
from worker.leases import LeaseBook
from worker.links import OPEN_S, Link, LinkPool
from worker.meter import Meter
from worker.outbox import Outbox
from worker.pace import LINK_MESSAGES_PER_S, Pace
from worker.piece_plan import Giver
from worker.providing import Held, Providing
from worker.quotas import QueueBook, Rates, RequestGate, Room
from worker.rights import Rights
from worker.session import Session
from worker.session_task import SessionTask
from worker.sessions import SessionTable
from worker.suppliers import Suppliers, Way
from worker.throttle import Throttle

log = logging.getLogger("sotto.worker")
STREAMS_PER_PEER_MAX = 64  # our own client needs four
SWEEP_S = 5.0
OPENING_COST = 20.0  # messages: a box, a signature and four peer ids take as long
VIOLATIONS_PER_S = 2.0  # of one peer, eight at once; an honest one has none. Each costs us some milliseconds
SHUN_S = 60.0
PING_COST = 0.2  # requests
MANIFEST_BYTES_PER_REQUEST = 20 << 10  # reading so much of a manifest takes as long as a request
Serve = Callable[[Channel], Awaitable[None]]
Answer = Callable[[Message, bytes], Awaitable[None]]

__all__ = ["WorkerConfig", "WorkerPorts", "WorkerService"]


class WorkerService:
    """One worker. `run` until cancelled. Its owner has it stand down and up and asks for its `status`; `herald` is told
    when it is reached elsewhere; tests read the rest."""

    def __init__(self, ports: WorkerPorts, config: WorkerConfig) -> None:
        self._ports = ports
        self._nursery: trio.Nursery | None = None
        self._streams: Counter[PeerId] = Counter()
        self._outboxes: dict[Outbox, None] = {}
        self._meter = Meter(ports.observer)
        quotas = config.quotas
        self.house = House(
            gate=TicketGate(config.identity),
            rights=Rights(ports.clock, ports.revoked),
            spans=SpanLedger(config.weight_memory_bytes, ports.store.bytes_max, quotas.owner_memory_share),
            pool=KvPool(config.kv_memory_bytes),
            queues=QueueBook(config.queue_memory_bytes, quotas.peer_queue_share),
            duty=Duty(),
            quota=SessionQuota(quotas.sessions, quotas.peer_sessions),
        )
        self._requests = RequestGate(Rates(quotas.peer_requests, quotas.requests))
        self._throttle = Throttle(Rates(quotas.peer_bandwidth, quotas.bandwidth), ports.clock)
        self._violations = Rates(VIOLATIONS_PER_S, inf)
        self._throttled = min(quotas.peer_bandwidth, quotas.bandwidth) < inf
        self._arrivals = Arrivals(ports.clock.monotonic)
        self._pace = Pace(ports.clock.monotonic)
        self._link_pace = Pace(ports.clock.monotonic, LINK_MESSAGES_PER_S)
        self.sessions = SessionTable(self.house, ports.clock, ports.observer, self._spawn_session)
        self.links = LinkPool(self._spawn_link, self._link_lost, self.house.queues, self._reach)
        self.herald = Herald(ports, config, self.house, _together)
        suppliers = Suppliers(ports, self._meter, Way(self._reach, self._slowed), self._spawn)
        self._fetches = Fetches(ports.store, ports.clock, self.house, suppliers, _together)
        self._giving = Giving(ports.store, self.house, ports.clock)
        leases = LeaseBook(config.identity, self.house.spans, self.house.pool, ports.entropy)
        changed, spawn = self.herald.changed, self._spawn
        self._control = Control(ports, self.house, leases, self.sessions, self._fetches, changed, spawn)

    async def run(self, *, task_status: TaskStatus = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; then sessions are failed with STOPPING, told so, and streams closed."""
        await self.house.rights.recall()
        for protocol, serve in (
            (CONTROL, self._serve_control),
            (SHARD, self._serve_shards),
            (SESSION, self._serve_sessions),
            (LINK, self._serve_link),
        ):
            self._ports.transport.handle(protocol, self._handler(protocol, serve))
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                nursery.start_soon(self.herald.listen)
                nursery.start_soon(self.herald.publish)
                nursery.start_soon(self.herald.measure)
                if self._ports.directory is not None:
                    which = Held(self.house.spans.needed, self._giving.gives)
                    nursery.start_soon(Providing(self._ports.directory, self._ports.clock, which).run)
                nursery.start_soon(self._sweep)
                nursery.start_soon(self._supervised, self._control.restore)
                task_status.started()
                await trio.sleep_forever()
            finally:
                with shielded():
                    await self._say_goodbye()
                with shielded():
                    for channel in self._meter.channels:
                        await channel.aclose()

    def stand_down(self, cause: Cause, until: float | None = None) -> None:
        """Take no new work because of `cause`, until `until` (Unix seconds) if that is known; open sessions drain."""
        if self.house.duty.begin(cause, self._ports.clock.monotonic(), until):
            log.info("no new work", extra={"cause": cause.value})
            self.herald.changed()

    def stand_up(self, cause: Cause) -> None:
        """`cause` is over; work is taken again unless there is another."""
        if self.house.duty.end(cause):
            log.info("work is taken again", extra={"cause": cause.value})
            self.herald.changed()

    def status(self) -> dict[str, Any]:
        """What the owner is shown."""
        house, now = self.house, self._ports.clock.monotonic()
        return {
            "peer": self._ports.transport.peer,
            "state": house.duty.state(now).value,
            "causes": [cause.value for cause in sorted(house.duty.causes)],
            "sessions": house.quota.taken,
            "sessions_waiting": self.sessions.sessions_waiting,
            "leases": sum(len(span.holders) for span in house.spans.leases.values()),
            "spans": sum(1 for _ in house.spans.loaded()),
            "weight_bytes": house.spans.used_bytes,
            "kv_bytes": house.pool.used_bytes,
            "load_percent": house.load.percent(now),
        }

    # --- streams from peers -------------------------------------------------------------------------------------------

    def _handler(self, protocol: str, serve: Serve) -> StreamHandler:
        async def handle(stream: Stream) -> None:
            peer, scope = stream.remote, trio.CancelScope()
            if self.sessions.stopping or self._streams[peer] >= STREAMS_PER_PEER_MAX:
                await stream.aclose()
                return
            self._streams[peer] += 1
            try:
                with scope, self._arrivals.of(peer, scope.cancel) as arriving:
                    channel = Channel(self._slowed(stream), protocol, arriving)
                    with self._meter.on(channel, protocol):
                        await serve(channel)
            except Refused as refusal:  # too much of its peer is arriving
                self._ports.observer.request_refused(refusal.reason)
                log.info("refused", extra={"peer": peer, "reason": refusal.reason})
            except RemoteProtocolError as error:
                log.warning("violation", extra={"peer": peer, "protocol": protocol, "error": str(error)})
                self._penalise(peer, protocol)
            except TransportError as error:
                log.debug("stream lost", extra={"peer": peer, "protocol": protocol, "error": str(error)})
            finally:
                self._streams[peer] -= 1
                if not self._streams[peer]:
                    del self._streams[peer]
                    self._requests.forget(peer)
                await stream.aclose()

        return handle

    def _penalise(self, peer: PeerId, protocol: str) -> None:
        """A stream was lost to what the peer itself sent. What it forwards for others is dropped elsewhere."""
        self._ports.observer.violation(peer, protocol)
        if self._violations.take(peer, 1.0, self._ports.clock.monotonic()) > 0:
            log.warning("shunned", extra={"peer": peer, "seconds": SHUN_S})
            self._ports.transport.shun(peer, SHUN_S)

    async def _serve_control(self, channel: Channel) -> None:
        async def answer(request: Message, _: bytes) -> None:
            await channel.send(await self._control.answer(request, channel.remote))

        await self._serve_requests(channel, answer)

    async def _serve_shards(self, channel: Channel) -> None:
        giver = Giver(channel.remote)
        offered: PieceList | None = None

        async def answer(request: Message, body: bytes) -> None:
            nonlocal offered
            match request:
                case ShardOffer():
                    await self._fetches.take(channel, giver, request, body)
                case ShardAsk():
                    offered = await self._giving.offer(channel, request)
                case PiecesWanted():
                    await self._giving.send(channel, offered, request)
                case _:
                    raise RemoteProtocolError(f"{type(request).__name__} is no request of the shard protocol")

        await self._serve_requests(channel, answer)

    async def _serve_requests(self, channel: Channel, answer: Answer) -> None:
        async def serve(request: Message, body: bytes) -> None:
            try:
                await self._admit(request, channel.remote)
                await answer(request, body)
            except Refused as refusal:
                self._ports.observer.request_refused(refusal.reason)
                log.info("refused", extra={"peer": channel.remote, "reason": refusal.reason})
                await channel.send(Refusal(refusal.reason, refusal.detail[: limits.DETAIL_CHARS_MAX]))

        await _each(channel, serve)

    async def _admit(self, message: Message, peer: PeerId) -> None:
        """Count a request. Raises Refused(RATE); but a ping, which nothing can refuse, waits, and so does who gives an
        open session another route.

        Pieces are not counted: their offer was, and whoever asks for them waits for each.
        """
        now = self._ports.clock.monotonic()
        match message:
            case PiecesWanted():
                return
            case Ping():
                await trio.sleep(self._requests.rates.take(peer, PING_COST, now))
            case OpenSession():
                await trio.sleep(self._requests.rates.take(peer, 1.0, now))
            case LeaseSpan(manifest):
                self._requests.admit(peer, 1.0 + len(manifest) / MANIFEST_BYTES_PER_REQUEST, now)
            case _:
                self._requests.admit(peer, 1.0, now)

    async def _serve_sessions(self, channel: Channel) -> None:
        outbox = Outbox(Room(self.house.queues, channel.remote))
        self._outboxes[outbox] = None
        try:
            await _race(partial(outbox.pump, channel), partial(self._read_sessions, channel, outbox))
        finally:
            del self._outboxes[outbox]
            outbox.close()
            self.sessions.client_gone(outbox)

    async def _read_sessions(self, channel: Channel, outbox: Outbox) -> None:
        async def read(message: Message, body: bytes) -> None:
            await self._its_turn(channel, message, self._pace, self._link_pace)
            if isinstance(message, OpenSession) and self.sessions.is_open(message.session):
                await self._admit(message, channel.remote)  # the next hop charges it to this worker, not to its client
            if isinstance(message, Attach):
                try:
                    await self._admit(message, channel.remote)
                except Refused as refusal:
                    outbox.force(SessionFailed(message.session, refusal.reason, refusal.detail))
                    self._ports.observer.session_failed(refusal.reason)
                else:
                    self.sessions.attach(message, channel.remote, outbox)
            elif not self._route(message, body, channel.remote):
                outbox.force(SessionFailed(_session_of(message), RefusalReason.UNKNOWN_SESSION, ""))

        await _each(channel, read)

    async def _serve_link(self, channel: Channel) -> None:
        async def read(message: Message, body: bytes) -> None:
            await self._its_turn(channel, message, self._link_pace)
            try:
                self._route(message, body, channel.remote)
            except RemoteProtocolError as error:
                # One client's session out of order must not cost the others on this link theirs.
                self._ports.observer.violation(channel.remote, LINK)
                log.warning("dropped", extra={"peer": channel.remote, "error": str(error)})

        await _each(channel, read)

    async def _its_turn(self, channel: Channel, message: Message, *paces: Pace) -> None:
        opens = isinstance(message, OpenSession) and message.session in self.sessions.live  # else it is not looked into
        for pace in paces:
            await pace.take(channel.remote, channel.given, OPENING_COST if opens else 1.0)

    def _route(self, message: Message, body: bytes, remote: PeerId) -> bool:
        """What goes along a route. False when its session is not known here."""
        match message:
            case Step():
                return self.sessions.step(message, body, remote)
            case OpenSession():
                return self.sessions.open(message, remote)
            case CloseSession():
                ticket = self.sessions.close(message, remote)
                if ticket is not None and ticket.successor:
                    self.links.close_session(message, ticket.successor)
                return True
            case _:
                raise RemoteProtocolError(f"{type(message).__name__} has no place here")

    # --- tasks --------------------------------------------------------------------------------------------------------

    def _spawn_session(self, session: Session) -> None:
        self._tasks.start_soon(self._run_session, session)

    def _spawn_link(self, link: Link) -> None:
        self._tasks.start_soon(self._run_link, link)

    def _spawn(self, task: Callable[[], Awaitable[None]]) -> None:
        self._tasks.start_soon(self._supervised, task)

    @property
    def _tasks(self) -> trio.Nursery:
        if self._nursery is None:
            raise LocalProtocolError("the worker is not running")
        return self._nursery

    async def _run_session(self, session: Session) -> None:
        task = SessionTask(session, self.sessions, self._ports.compute, self.links, self._ports.observer)
        try:
            await self._supervised(task.run, partial(self.sessions.fail, session, RefusalReason.INTERNAL, "a bug here"))
        finally:
            await self._supervised(task.free)

    async def _run_link(self, link: Link) -> None:
        error = ""
        try:
            with link.scope:
                error = await self._serve_next_hop(link)
        finally:
            self.links.broke(link, error)

    async def _serve_next_hop(self, link: Link) -> str:
        """Until the link breaks; gives the reason."""
        try:
            with trio.fail_after(OPEN_S):
                stream = await self._ports.transport.open(link.peer, link.addrs, LINK)
            channel = Channel(self._slowed(stream), LINK, _hear_no_byte)
            self.links.opened(link)
            try:
                with self._meter.on(channel, LINK):
                    await _race(partial(link.outbox.pump, channel), partial(_hear_nothing, channel))
            finally:
                await stream.aclose()
        except trio.TooSlowError:
            return "the next hop did not answer in time"
        except SottoError as error:
            return str(error)
        return ""

    async def _supervised(self, task: Callable[[], Awaitable[None]], failed: Callable[[], None] | None = None) -> None:
        """The one place where a bug is caught: logged with its trace, it costs one session, or one sweep."""
        try:
            await task()
        except Exception:
            log.exception("a bug in this worker")
            if failed is not None:
                failed()

    def _slowed(self, stream: Stream) -> Stream:
        return self._throttle.over(stream) if self._throttled else stream

    def _reach(self, peer: PeerId, stated: tuple[str, ...]) -> tuple[str, ...]:
        """Where to dial a worker that a client names: a next hop, a source of shards. Raises TransportError."""
        transport = self._ports.transport
        addrs = dialable(self.herald.view, peer, stated, transport.own_addrs, transport.addrs)
        if not addrs and peer not in transport.connected():
            raise TransportError("the peer has no address that this worker dials")
        return addrs

    def _link_lost(self, sessions: Iterable[SessionId], error: str) -> None:
        self.sessions.fail_ids(sessions, RefusalReason.HOP_LOST, error)

    async def _sweep(self) -> None:
        while True:
            await trio.sleep(SWEEP_S)
            self._meter.report()
            self._arrivals.sweep()
            await self._supervised(self._sweep_sessions)
            await self._supervised(self._sweep_leases)

    async def _sweep_sessions(self) -> None:
        self.sessions.sweep()

    async def _sweep_leases(self) -> None:
        connected = frozenset(self._ports.transport.connected())
        self._control.sweep(partial(self._is_present, connected))

    def _is_present(self, connected: frozenset[PeerId], peer: PeerId) -> bool:
        return peer in connected or self._streams[peer] > 0

    async def _say_goodbye(self) -> None:
        self.sessions.stop()
        for outbox in list(self._outboxes):
            await outbox.drained()


async def _each(channel: Channel, answer: Answer) -> None:
    """Deal with what comes until the peer ends the stream. A frame has up to 33 MiB, and a peer up to 64 streams: none
    is held while the next is waited for."""
    while (received := await channel.receive()) is not None:
        await answer(*received)
        del received


async def _race(*tasks: Callable[[], Awaitable[None]]) -> None:
    """Run all; when the first ends, the others are cancelled. Raises its SottoError, if it ended so."""

    async def run(task: Callable[[], Awaitable[None]]) -> None:
        await task()
        raise _Ended

    with suppress(_Ended):
        await _together(*(partial(run, task) for task in tasks))


class _Ended(SottoError):
    """A task of a race came to its end."""


async def _together(*tasks: Callable[[], Awaitable[None]]) -> None:
    """Run all to their ends; the first SottoError cancels the others and is raised."""
    errors: list[SottoError] = []

    async def run(task: Callable[[], Awaitable[None]]) -> None:
        try:
            await task()
        except SottoError as error:
            errors.append(error)
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for task in tasks:
            nursery.start_soon(run, task)
    if errors:
        raise errors[0]


def _hear_no_byte(size: int) -> None:
    if size:
        raise RemoteProtocolError("the next hop spoke on a link")


async def _hear_nothing(channel: Channel) -> None:
    """A next hop has nothing to say on a link; its end is what we listen for."""
    if await channel.receive() is not None:
        raise RemoteProtocolError("the next hop spoke on a link")
    raise TransportError("the next hop closed the link")


def _session_of(message: Message) -> SessionId:
    assert isinstance(message, OpenSession | Step | CloseSession)
    return message.session
