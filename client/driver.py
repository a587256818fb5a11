"""The client's tasks: one session stream to each worker, shared by all sessions, with a reader and a writer.

Invariant: whatever happens to a stream (end, reset, violation) ends every session on it with an error that names the
worker, and the next session opens a new stream. A caller that is cancelled leaves no task, no stream in mid-frame and
no session open: a frame is written by the writer task, or at once and whole, and cleanup is shielded for CLOSE_S at
most.

The only nurseries of the room. Placement, routing and retrying are decided elsewhere.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial

import trio

from client.dialling import open_stream
from client.errors import HopLost, blame
from client.ports import ClientPorts
from client.routing import Hop, Route
from client.session import CLOSE_S, RouteSession, SessionHost, SessionTerms
from protocol import limits
from protocol.channel import Channel
from protocol.errors import LocalProtocolError, RemoteProtocolError, SottoError, TransportError
from protocol.ids import ID_BYTES, PeerId, SessionId
from protocol.messages import SESSION, Message
from protocol.ports import Stream, TaskStatus
from protocol.tickets import Ticket, issue_ticket

DIAL_S = 10.0
OUTBOX_FRAMES = 4
UNWANTED_MAX = 1000  # outputs in a row that nobody waits for; a closed session leaves a few behind
TICKET_LIFE_MS = 120_000  # used within seconds; clocks may differ by limits.CLOCK_SKEW_MAX_S


async def run_all(*calls: Callable[[], Awaitable[None]]) -> None:
    """Run `calls` at once. The first of our errors cancels the others and is raised as it is, not in a group."""
    failures: list[SottoError] = []

    async def run(call: Callable[[], Awaitable[None]]) -> None:
        try:
            await call()
        except SottoError as error:
            failures.append(error)
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for call in calls:
            nursery.start_soon(run, call)
    if failures:
        raise failures[0]


class _Link:
    """The session stream to one worker."""

    def __init__(self, hop: Hop, channel: Channel) -> None:
        self.peer = hop.peer
        self.sessions: dict[SessionId, RouteSession] = {}
        self.lost: SottoError | None = None
        self._channel = channel
        self._outbox, self._frames = trio.open_memory_channel[bytes](OUTBOX_FRAMES)
        self._unwritten = 0  # frames that the writer has, or is about to get

    async def send(self, message: Message, body: bytes = b"") -> None:
        """Hand a frame to the writer; raises the error that lost the link, and LocalProtocolError for what the peer
        would refuse. Cancelled: the frame is not sent."""
        if self.lost is not None:
            raise self.lost.with_traceback(None)
        frame = self._channel.frame(message, body)
        self._unwritten += 1
        try:
            await self._outbox.send(frame)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise (self.lost or HopLost(self.peer, "was lost")).with_traceback(None) from None
        except BaseException:
            self._unwritten -= 1
            raise

    def send_at_once(self, message: Message, body: bytes = b"") -> bool:
        """`send` without waiting, when that can be. A lone session's frame is written here and now; where there are
        several, what they send in one turn of the event loop is one write, so that the hop computes it together. Raises
        LocalProtocolError for what the peer would refuse."""
        if self.lost is not None:
            return False
        if len(self.sessions) > 1:
            return self._hand_over(message, body)
        return not self._unwritten and self._channel.send_at_once(message, body)

    def _hand_over(self, message: Message, body: bytes) -> bool:
        if self._outbox.statistics().current_buffer_used >= OUTBOX_FRAMES:
            return False
        try:
            self._outbox.send_nowait(self._channel.frame(message, body))
        except (trio.WouldBlock, trio.BrokenResourceError, trio.ClosedResourceError):
            return False
        self._unwritten += 1
        return True

    async def write(self) -> None:
        """Send frames until the stream fails, all that wait at once. Raises TransportError."""
        async for first in self._frames:
            together, size = [first], len(first)
            with suppress(trio.WouldBlock, trio.EndOfChannel):
                while size < limits.TOGETHER_BYTES and len(together) < limits.TOGETHER_MESSAGES:
                    together.append(self._frames.receive_nowait())
                    size += len(together[-1])
            small = len(together) - (size > limits.TOGETHER_BYTES)
            for frames in (together[:small], together[small:]):  # a large one is not copied to go with the others
                if count := len(frames):
                    await self._channel.send_frames(frames)
                    self._unwritten -= count

    async def read(self, dropped: Callable[[PeerId], None]) -> None:
        """Give messages to their sessions until the stream ends. Raises TransportError, RemoteProtocolError."""
        unwanted = 0
        while (frame := await self._channel.receive()) is not None:
            message, body = frame
            if self._channel.given % limits.TOGETHER_MESSAGES == 0:
                await trio.lowlevel.checkpoint()  # a chunk of tiny messages is no pause for other workers
            session = self.sessions.get(_session_of(message))
            if session is not None and session.take(self.peer, message, body):
                unwanted = 0
                continue
            dropped(self.peer)  # of a session that was closed here while this was on its way, or a repetition
            unwanted += 1
            if unwanted > UNWANTED_MAX:
                raise RemoteProtocolError("it sends what nobody asked for")
        raise TransportError("it closed the stream")

    async def close(self, error: SottoError) -> None:
        """End the stream and every session on it."""
        self.lost = blame(self.peer, error)
        self._outbox.close()
        self._frames.close()
        for session in self.sessions.values():
            session.fail(blame(self.peer, error, session.lost_words))
        self.sessions.clear()
        with trio.CancelScope(deadline=trio.current_time() + CLOSE_S, shield=True):
            await self._channel.aclose()


@dataclass(slots=True)
class _Dials:
    """Of one worker, one at a time. `failures`: how many have failed; `failure`: the newest of them."""

    lock: trio.Lock = field(default_factory=trio.Lock)
    failures: int = 0
    failure: SottoError | None = None


class Driver:
    """Opens sessions over routes. `run` must be running meanwhile."""

    def __init__(self, ports: ClientPorts) -> None:
        self._ports = ports
        self._links: dict[PeerId, _Link] = {}
        self._dials: dict[PeerId, _Dials] = {}
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: TaskStatus = trio.TASK_STATUS_IGNORED) -> None:
        """Carry messages until cancelled; then every stream is closed and every session ends."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._nursery = None

    @asynccontextmanager
    async def session(self, route: Route, terms: SessionTerms) -> AsyncIterator[RouteSession]:
        """`open_session`, closed on the way out however that is."""
        session = await self.open_session(route, terms)
        try:
            yield session
        finally:
            await session.aclose()

    async def open_session(self, route: Route, terms: SessionTerms) -> RouteSession:
        """Open a session on every hop of `route`: attached, tickets sent, KV reserved everywhere.

        Raises HopLost (a worker cannot be reached, or does not answer), HopRefused (it declined) or HopViolation, all
        naming the worker; nothing stays open then. Close it with its `aclose`.
        """
        links: dict[PeerId, _Link] = {}

        async def dial(hop: Hop) -> None:
            links[hop.peer] = await self._link(hop)

        await run_all(*(partial(dial, hop) for hop in route.hops))
        ordered = [links[hop.peer] for hop in route.hops]
        identifier = SessionId(self._ports.entropy(ID_BYTES))
        host = SessionHost(self._ports.observer, self._detach, self._close)
        session = RouteSession(identifier, route, terms, ordered, host)
        for link in ordered:
            link.sessions[identifier] = session  # a link that is lost already says so when it is sent to
        try:
            await session.open(self._tickets(identifier, route, terms))
        except BaseException:
            await session.aclose()
            raise
        return session

    def _detach(self, session: RouteSession) -> None:
        for hop in session.route.hops:
            link = self._links.get(hop.peer)
            if link is not None:
                link.sessions.pop(session.id, None)

    def _close(self, session: RouteSession) -> None:
        if self._nursery is not None:  # else all streams end, and every session with them
            self._nursery.start_soon(session.aclose)

    async def _link(self, hop: Hop) -> _Link:
        """The stream to `hop`, opened if there is none. Who comes while another dials shares what comes of that; who
        comes later dials anew. Raises HopLost."""
        dials = self._dials.setdefault(hop.peer, _Dials())
        failures = dials.failures
        async with dials.lock:
            link = self._links.get(hop.peer)
            if link is not None:
                return link
            if dials.failure is not None and dials.failures != failures:
                raise dials.failure.with_traceback(None)
            try:
                stream = await self._dial(hop)
            except SottoError as error:
                dials.failures, dials.failure = dials.failures + 1, error
                raise
            if self._nursery is None:
                await stream.aclose()
                raise LocalProtocolError("the driver is not running")
            link = _Link(hop, Channel(stream, SESSION))
            self._links[hop.peer] = link
            self._nursery.start_soon(self._carry, link)
            return link

    async def _dial(self, hop: Hop) -> Stream:
        """A new stream to `hop`. Raises HopLost."""
        with trio.move_on_after(DIAL_S):
            try:
                return await open_stream(self._ports, hop.peer, hop.addrs, SESSION)
            except TransportError as error:
                raise blame(hop.peer, error, "cannot be reached") from error
        raise HopLost(hop.peer, f"could not be reached within {DIAL_S:g} s")

    async def _carry(self, link: _Link) -> None:
        """Read and write a link until it ends, whichever side ends it."""
        error: SottoError = LocalProtocolError("the driver has stopped")
        try:
            await run_all(link.write, partial(link.read, self._ports.observer.output_dropped))
        except (TransportError, RemoteProtocolError) as failure:
            error = failure
            if isinstance(failure, RemoteProtocolError):
                self._ports.observer.violation(link.peer)
            else:
                self._ports.observer.hop_lost(link.peer)
        finally:
            if self._links.get(link.peer) is link:
                del self._links[link.peer]
            await link.close(error)

    def _tickets(self, session: SessionId, route: Route, terms: SessionTerms) -> tuple[bytes, ...]:
        """One for each hop, sealed to it, naming its neighbours."""
        client, ports = self._ports.identity.peer, self._ports
        capability = ports.credentials(route.deployment)
        expires_ms = int(ports.clock.time() * 1000) + TICKET_LIFE_MS
        before = [client, *(hop.peer for hop in route.hops)]
        after = [*route.hops[1:], None]
        boxes = []
        for predecessor, hop, successor in zip(before, route.hops, after, strict=False):
            ticket = Ticket(
                session=session, epoch=0, nonce=ports.entropy(ID_BYTES), expires_ms=expires_ms,
                client=client, worker=hop.peer, predecessor=predecessor,
                successor=successor.peer if successor else PeerId(""),
                successor_addrs=successor.addrs[: limits.ADDRS_MAX] if successor else (),
                deployment=route.deployment, start=hop.start, end=hop.end, kv_tokens=terms.kv_tokens,
                returns=terms.ticket_returns if successor else "none", capability=capability,
            )  # fmt: skip
            boxes.append(issue_ticket(ticket, ports.identity))
        return tuple(boxes)


def _session_of(message: Message) -> SessionId:
    """The session that a message belongs to; an id that no session has when it belongs to none."""
    session: SessionId = getattr(message, "session", SessionId(b""))
    return session
