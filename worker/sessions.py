"""All sessions of a worker: who may do what, decided the moment a message is read.

Everything here is synchronous: a reader is never held up by a session, whatever state that session is in. What is
admitted becomes work in the session's own bounded inbox (session_task.py does it, in order); what overflows the inbox
fails that session alone.

Who may touch a session: its client, over the stream that attached it, and the predecessor that its current ticket
names. Whatever another peer sends about it is counted against that peer and changes nothing. What a client does wrong
by way of honest hops fails the client's session; it never costs the hops their shared link.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import trio

from protocol import limits
from protocol.errors import Refused, RemoteProtocolError
from protocol.ids import PeerId, SessionId
from protocol.messages import (
    LINK,
    SESSION,
    Attach,
    Attached,
    CloseSession,
    OpenSession,
    RefusalReason,
    SessionFailed,
    Step,
)
from protocol.ports import Clock
from protocol.session import Role, SessionMachine
from protocol.steps import StepLedger, Verdict
from protocol.tensors import Payload
from protocol.tickets import Ticket
from worker.admission import SpanLease, SpanState
from worker.duty import State
from worker.house import House
from worker.inbox import Inboxes, open_inbox
from worker.observer import WorkerObserver
from worker.opening import checked_ticket, is_guest, keys_of, reroute, span_for, spec_of
from worker.outbox import Outbox
from worker.preemption import Contest, Preemptor
from worker.session import Again, Pass, Place, Seat, Session
from worker.waiting import KV_WAIT_S, Arrival, WaitingRoom, needed_bytes

# From Attach to OpenSession. A client attaches to all hops first, and each passes the opening on once it has room:
# eight before this one may wait for that, KV_WAIT_S and a sweep each. Tickets of clients live no longer.
ATTACH_LIFE_S = 120.0


@dataclass(slots=True)
class SessionTable:
    """`spawn` starts the task that does an opened session's work and calls `freed` when nothing of it is left."""

    house: House
    clock: Clock
    observer: WorkerObserver
    spawn: Callable[[Session], None]
    live: dict[SessionId, Session] = field(default_factory=dict)
    stopping: bool = False
    _emptied: trio.lowlevel.ParkingLot = field(default_factory=trio.lowlevel.ParkingLot)
    _waiting: WaitingRoom = field(default_factory=WaitingRoom)
    _seating: bool = False
    _leaving: set[SessionId] = field(default_factory=set)  # ended, but the engine still holds something of them
    inboxes: Inboxes = field(init=False)
    preemptor: Preemptor = field(init=False)

    def __post_init__(self) -> None:
        self.inboxes = Inboxes(self.house.queues, self.observer)
        self.preemptor = Preemptor(self.house.pool, self.house.spans)

    @property
    def sessions_waiting(self) -> int:
        """How many wait for room for their KV."""
        return len(self._waiting)

    def is_open(self, session: SessionId) -> bool:
        """Whether it has its place in a route here: its next opening gives it another."""
        known = self.live.get(session)
        return known is not None and known.seat is not None

    def attach(self, message: Attach, client: PeerId, outbox: Outbox) -> None:
        """`client` attached a session to the stream that `outbox` writes. Raises RemoteProtocolError when that stream
        did so already."""
        known = self.live.get(message.session)
        if known is not None and known.outbox is outbox:
            known.machine.received(Attach)
        try:
            if known is not None:
                raise Refused(RefusalReason.FORBIDDEN, "the session is attached to another stream")
            if message.session in self._leaving:
                raise Refused(RefusalReason.FORBIDDEN, "a session of this id is still being freed")
            if self.stopping:
                raise Refused(RefusalReason.STOPPING, "the worker is stopping")
            self.house.duty.require()
            if self.house.quota.full and self.house.quota.may_have_more(client):
                self._make_place(client)
            self.house.quota.take(client)
        except Refused as refusal:
            outbox.force(SessionFailed(message.session, refusal.reason, refusal.detail))
            self.observer.session_failed(refusal.reason)
            return
        send_work, receive_work = open_inbox()
        machine = SessionMachine(Role.WORKER)
        machine.received(Attach)
        self.live[message.session] = Session(
            id=message.session,
            client=client,
            outbox=outbox,
            attached_at=self.clock.monotonic(),
            machine=machine,
            scope=trio.CancelScope(),
            send_work=send_work,
            receive_work=receive_work,
        )
        machine.sent(Attached)
        outbox.force(Attached(message.session))
        self.observer.sessions_changed(self.house.quota.taken)

    def open(self, message: OpenSession, remote: PeerId) -> bool:
        """A ticket for this hop came from `remote`. False when the session is not known here."""
        session = self.live.get(message.session)
        if session is None:
            return False
        try:
            ticket = checked_ticket(self.house, message, session, remote, self._now_ms())
        except RemoteProtocolError as error:
            # A peer that learned the session's id could send rubbish in its name: that must not end an open session.
            self.observer.violation(remote, LINK if remote != session.client else SESSION)
            if remote == session.client or session.seat is None:
                self.fail(session, RefusalReason.BAD_TICKET, str(error))
            return True
        try:
            session.machine.received(OpenSession)
            if session.seat is not None:
                reroute(session.seat, ticket)
                self.inboxes.put(session, Place(ticket, message))
            elif not self._seat(arrival := Arrival(session, ticket, message, self.clock.monotonic())):
                self._waiting.add(arrival)
                self._make_room(arrival, self._contest())
        except Refused as refusal:
            self.fail(session, refusal.reason, refusal.detail)
        return True

    def step(self, message: Step, body: bytes, remote: PeerId) -> bool:
        """A step came from `remote`. False when the session is not known here. Raises RemoteProtocolError when
        `remote` had no right to send it: nothing changed then."""
        session = self.live.get(message.session)
        if session is None:
            return False
        seat = session.seat
        if seat is None or not seat.opened:  # SessionOpened tells the client from where steps may begin
            raise RemoteProtocolError("a step of a session that is not open")
        if message.epoch < seat.ledger.epoch:
            return True  # it was on its way when the client re-routed
        if remote != seat.ticket.predecessor:
            raise RemoteProtocolError("a step from a peer that is not the predecessor")
        session.machine.received(Step)
        try:
            verdict = seat.ledger.admit(message)
        except RemoteProtocolError as error:
            self.observer.violation(session.client, SESSION)
            self.fail(session, RefusalReason.BAD_STEP, str(error))
            return True
        try:
            self.inboxes.weigh_answers(session)
            if verdict is Verdict.COMPUTE:
                self.inboxes.put(session, Pass(message, Payload(message.tensor, body), self.clock.monotonic()))
            elif verdict is Verdict.REPEAT:
                self.observer.step_repeated()
                self.inboxes.put(session, Again(message, seat.ledger.answer(message.step)))
        except Refused as refusal:
            self.fail(session, refusal.reason, refusal.detail)
        return True

    def close(self, message: CloseSession, remote: PeerId) -> Ticket | None:
        """The session is over; gives the ticket whose successor is to be told. Unknown sessions are no violation, for
        the news may come twice: by the route and from the client. Nor is it one of a hop that opened before this one
        did: the client says so here itself. Raises RemoteProtocolError when it is not for `remote` to say."""
        session = self.live.get(message.session)
        if session is None:
            return None
        ticket = session.seat.ticket if session.seat else None
        if remote != session.client:
            if ticket is None:
                return None
            if remote != ticket.predecessor:
                raise RemoteProtocolError("a session closed by a peer that has no part in it")
        session.machine.received(CloseSession)
        if session.seat is not None:
            session.seat.kept_keys = keys_of(message.page_keys, session.seat.ticket)
        self._drop(session)
        return ticket

    def client_gone(self, outbox: Outbox) -> None:
        """The attached stream ended: free all its sessions."""
        for session in [session for session in self.live.values() if session.outbox is outbox]:
            self._drop(session)

    def fail(self, session: Session, reason: str, detail: str = "") -> None:
        """Tell the client that the session is over at this hop, and free it. Idempotent."""
        if self.live.get(session.id) is not session:
            return
        session.machine.sent(SessionFailed)
        session.outbox.force(SessionFailed(session.id, reason, detail[: limits.DETAIL_CHARS_MAX]))
        self.observer.session_failed(reason)
        self._drop(session)

    def fail_ids(self, ids: Iterable[SessionId], reason: str, detail: str) -> None:
        for session in [self.live[each] for each in ids if each in self.live]:
            self.fail(session, reason, detail)

    def freed(self, session: Session) -> None:
        """The engine holds nothing of the session any more: its seat ends here, and only here."""
        assert session.seat is not None
        self._drop(session)
        self._leaving.remove(session.id)
        self.inboxes.empty(session)
        self.house.pool.release(session.id)
        session.seat.span.sessions -= 1
        session.seat.span.touched = now = self.clock.monotonic()
        self.observer.engine_used(0.0, self.house.bubbles.closed(now))
        self.house.quota.give(session.client)
        self.observer.sessions_changed(self.house.quota.taken)
        self.report_memory()
        self._emptied.unpark_all()
        self.seat_waiting()

    def sweep(self) -> None:
        """End attachments that nobody opened in time, sessions whose capability has expired, and, when the worker has
        drained for long enough, all."""
        now, now_ms = self.clock.monotonic(), self._now_ms()
        self.seat_waiting()  # leases may have ended
        for arrival in self._waiting.late(now):
            if arrival.session.seat is None:  # the room that was kept for one before it may be its own by now
                detail = f"no room for the session's KV within {KV_WAIT_S:g} s"
                self.fail(arrival.session, RefusalReason.KV_MEMORY, detail)
        contest = self._contest()  # of those who wait on: nobody gives way to one that has just been refused
        for arrival in self._waiting.in_turn(self.house.pool.held_bytes):
            if self._make_room(arrival, contest):
                contest = self._contest()
        drained = self.house.duty.state(now) is State.DRAINED
        for session in list(self.live.values()):
            if drained:
                self.fail(session, RefusalReason.PAUSED, self.house.duty.refusal().detail)
            elif session.seat is None and session not in self._waiting and now - session.attached_at >= ATTACH_LIFE_S:
                self.fail(session, RefusalReason.UNKNOWN_SESSION, "attached, but not opened in time")
            elif session.seat is not None and session.seat.has_expired(now_ms):
                self.fail(session, RefusalReason.FORBIDDEN, "the capability that it was opened with has expired")

    def end_granted_under(self, owner: PeerId, serial: bytes) -> None:
        """The owner revoked the capability `serial`: its sessions end at once."""
        for session in list(self.live.values()):
            seat = session.seat
            shown = seat.capability if seat else None
            if seat is not None and shown is not None and shown.serial == serial and seat.span.request.owner == owner:
                self.fail(session, RefusalReason.FORBIDDEN, "the deployment's owner revoked the capability")

    async def evacuate(self, lease: SpanLease) -> None:
        """End the deployment's sessions and wait until the engine is rid of them."""
        for session in list(self.live.values()):
            if session.seat is not None and session.seat.span is lease:
                self.fail(session, RefusalReason.UNKNOWN_DEPLOYMENT, "its owner released the deployment")
        while lease.sessions:
            await self._emptied.park()

    def stop(self) -> None:
        """No session from now on."""
        self.stopping = True
        for session in list(self.live.values()):
            self.fail(session, RefusalReason.STOPPING, "the worker is stopping")

    def seat_waiting(self) -> None:
        """Memory may have become free: open what fits of the sessions that wait for it, and fail those that cannot be
        opened any more."""
        if self._seating or self.stopping:
            return  # one that waited has failed below: the next turn finds its room
        self._seating = changed = True
        try:
            while changed and len(self._waiting):
                changed = any(self._try(arrival) for arrival in self._waiting.in_turn(self.house.pool.held_bytes))
        finally:
            self._seating = False

    def _contest(self) -> Contest:
        return self.preemptor.contest(self.live.values(), self._leaving, self._waiting, self.clock.monotonic())

    def _make_room(self, arrival: Arrival, contest: Contest) -> bool:
        """Preempt what has to give way to `arrival`, if that is fair. Their clients open them again, and wait then.
        True when some did: `contest` is out of date."""
        chosen = self.preemptor.choose(arrival, contest)
        for each in chosen:
            session = self.live[each]
            assert session.seat is not None
            self.preemptor.preempted(session.client, session.seat.request)
            session.preempted = True
            self.fail(session, RefusalReason.PREEMPTED, "a client that holds less needs the room")
        return bool(chosen)

    def _make_place(self, client: PeerId) -> None:
        """When all are taken: the oldest of those that nobody has opened gives way, of the peer who has most of them,
        if `client` has fewer. To attach takes no right, so a few who attach without end could else take all places."""
        idle = [each for each in self.live.values() if each.seat is None and each not in self._waiting]
        have = Counter(each.client for each in idle)
        most = max(have, key=lambda peer: have[peer], default=client)
        if have[most] > have[client] + 1:
            oldest = next(each for each in idle if each.client == most)
            self.fail(oldest, RefusalReason.SESSIONS, "attached, not opened, and another client needs the place")

    def _try(self, arrival: Arrival) -> bool:
        """Open a waiting session, or fail it. False when there is still no room."""
        try:
            return self._may_fit(arrival) and self._seat(arrival)
        except Refused as refusal:
            self.fail(arrival.session, refusal.reason, refusal.detail)
            return True

    def _may_fit(self, arrival: Arrival) -> bool:
        # Checking a right takes a signature, and a thousand sessions may wait whenever one closes: room comes first.
        self.house.duty.require()
        ticket = arrival.ticket
        span = self.house.spans.leases.get(ticket.deployment)
        if span is None or span.state is not SpanState.LOADED:
            return True  # to hear why not
        key = (ticket.deployment, ticket.client)
        return self.house.pool.fits(arrival.session.id, needed_bytes(ticket, span), key)

    def _seat(self, arrival: Arrival) -> bool:
        """Reserve what the ticket asks for, and begin. False when there is no room yet. Raises Refused."""
        session, ticket = arrival.session, arrival.ticket
        self.house.duty.require()
        span, capability = span_for(self.house, ticket)
        needed, key = needed_bytes(ticket, span), (ticket.deployment, ticket.client)
        try:
            self.house.pool.reserve(session.id, needed, key)
        except Refused:
            if not self.house.pool.could_fit(needed, key):
                raise
            return False
        self._waiting.remove(session)
        now = self.clock.monotonic()
        tenant = ticket.client if is_guest(capability) else span.request.owner
        request = self.preemptor.request_of(arrival, self.live.values())
        session.seat = Seat(
            span=span,
            ledger=StepLedger(ticket.kv_tokens, epoch=ticket.epoch),
            ticket=ticket,
            capability=capability,
            spec=spec_of(arrival, tenant),
            request=request,
            seated_at=now,
            safe_until=now + self.preemptor.safe_s(session.client, request),
        )
        span.sessions += 1
        span.touched = now
        self.house.bubbles.opened(now)
        self.report_memory()
        self.spawn(session)
        self.inboxes.put(session, Place(ticket, arrival.message))
        return True

    def _drop(self, session: Session) -> None:
        """Out of the table at once; an open one's task frees the rest when its running step has committed."""
        if self.live.get(session.id) is not session:
            return
        del self.live[session.id]
        self._waiting.remove(session)
        claimed = self.house.pool.claims(session.id)
        self.house.pool.disclaim(session.id)
        session.scope.cancel()
        if session.seat is not None:
            self._leaving.add(session.id)
        else:
            self.house.quota.give(session.client)
            self.observer.sessions_changed(self.house.quota.taken)
        if claimed:
            self.seat_waiting()

    def report_memory(self) -> None:
        self.observer.memory_changed(self.house.spans.used_bytes, self.house.pool.used_bytes)

    def _now_ms(self) -> int:
        return math.floor(self.clock.time() * 1000)
