"""One open session's task: do its work in order, answer, and leave nothing behind.

The engine gets a step that finds the session idle the moment it is read, and this task only waits for the result.
Forward first, then the client's copy: the next hop waits for nothing that only replay and verification need. The last
hop's answers are never dropped: the session waits for its client, and only this session does.
"""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import dataclass, replace
from functools import partial
from typing import assert_never

import trio

from protocol import limits
from protocol.errors import LocalProtocolError, Refused, TransportError
from protocol.messages import CloseSession, Operation, RefusalReason, SessionOpened, Step, StepOutput, StepTimes
from protocol.ports import Compute, StepResult, StepWork
from protocol.tensors import Payload
from protocol.tickets import TIMES, Ticket
from worker.cleanup import finish
from worker.links import Link, LinkPool
from worker.observer import WorkerObserver
from worker.scheduler import SHORT_ROWS
from worker.session import Again, Pass, Place, Seat, Session, Work, answer_bytes
from worker.sessions import SessionTable


@dataclass(slots=True)
class SessionTask:
    """`session` at this hop, with the place in the route that the work done so far gave it."""

    session: Session
    table: SessionTable
    compute: Compute
    links: LinkPool
    observer: WorkerObserver
    link: Link | None = None
    _ticket: Ticket | None = None
    _free_at: float = 0.0  # when the last step had been answered
    _begun: Awaitable[StepResult] | None = None  # of the one pass in the inbox
    _held: int = 0  # tokens that earlier sessions left
    _rerouted: bool = False

    async def run(self) -> None:
        """Until the session fails or closes; `free` must follow, whatever happened. Raises only what is a bug."""
        with self.session.scope:
            await self._work()

    async def free(self) -> None:
        """Leave the link, and give memory back once the engine has."""
        if self.link is not None:
            if self.session.preempted:
                # The next hop hears of it before it hears of whom the room is for, and preempts nobody else.
                self.links.close_session(CloseSession(self.session.id), self.link.peer)
            self.links.leave(self.session.id, self.link)
        try:
            keys = self.session.seat.kept_keys if self.session.seat else ()
            await finish(partial(self.compute.close, self.session.id, keys))
        finally:
            self.table.freed(self.session)

    async def _work(self) -> None:
        session = self.session
        assert session.seat is not None
        try:
            await self._open(session.seat)
            while True:
                work = await self._next()
                match work:
                    case Place():
                        await self._take_place(work)
                    case Pass():
                        await self._compute(work)
                    case Again():
                        await self._repeat(work)
                    case _:
                        assert_never(work)
                self.table.inboxes.done(session, work)
                del work  # what is no longer counted must not stay while the session is idle
        except Refused as refusal:
            self.table.fail(session, refusal.reason, refusal.detail)
        except TransportError as error:
            self.table.fail(session, RefusalReason.HOP_LOST, str(error))

    async def _open(self, seat: Seat) -> None:
        seat.ledger.held = self._held = await self.compute.open(self.session.id, seat.spec)
        seat.opened = True
        self.observer.prefix_asked(limits.PAGE_TOKENS * len(seat.spec.page_keys), self._held)

    async def _next(self) -> Work:
        session = self.session
        try:
            work = session.receive_work.receive_nowait()
        except trio.WouldBlock:
            session.begin = self._begin
            return await session.receive_work.receive()
        await trio.lowlevel.checkpoint()
        return work

    async def _take_place(self, work: Place) -> None:
        if self.link is not None:
            self.links.leave(self.session.id, self.link)
            self.link = None
        self._rerouted = self._ticket is not None
        ticket = self._ticket = work.ticket
        if ticket.successor:
            self.link = await self.links.join(self.session.id, ticket.successor, ticket.successor_addrs)
            await self.link.outbox.put(replace(work.message, tickets=work.message.tickets[1:]))
        await trio.lowlevel.checkpoint_if_cancelled()  # the session may have failed while this task was waking up
        self.session.machine.sent(SessionOpened)
        self.session.outbox.force(SessionOpened(self.session.id, ticket.epoch, ticket.kv_tokens, self._held))

    async def _compute(self, work: Pass) -> None:
        step, seat = work.step, self.session.seat
        assert seat is not None
        if self._begun is None:
            self._begin(work)
        begun, self._begun = self._begun, None
        assert begun is not None
        result, computed_at = await begun, self.table.clock.monotonic()
        size = answer_bytes(result)
        seat.ledger.record(step.step, result, size)
        self.session.in_hand = step.step, size
        self.table.inboxes.weigh_answers(self.session)
        waited_us = max(0, round(1e6 * (self._free_at - work.arrived_at)))  # for the step before it
        if waited_us:
            result = replace(result, queue_us=result.queue_us + waited_us)
        try:
            await self._answer(step, result, work.arrived_at)
        finally:
            self._note_computed(
                step, result, computed_at
            )  # the next hop does not wait for what only the owner is shown
        self.session.in_hand = None
        if not seat.ledger.keeps(step.step):
            self.table.inboxes.weigh_answers(self.session)
        self._free_at = self.table.clock.monotonic()

    async def _repeat(self, work: Again) -> None:
        await self._answer(work.step, replace(work.answer, company=False), self.table.clock.monotonic())

    def _begin(self, work: Pass) -> None:
        """Give the engine a pass; the session has no other under way, and none waits before it."""
        step = work.step
        operation, last = Operation(step.operation), self._is_last(step)
        self._begun = self.compute.step(
            StepWork(
                session=self.session.id,
                position=step.position,
                operation=operation,
                block=step.block,
                matrix=step.matrix,
                payload=work.payload,
                forward_tail=step.tail if last and operation is Operation.SPAN else 0,
                returns="none" if last or self.ticket.returns == TIMES else self.ticket.returns,
                keeps=not self._rerouted,
            )
        )

    def _note_computed(self, step: Step, result: StepResult, now: float) -> None:
        positions, compute_s = step.tensor.shape[0], result.compute_us / 1e6
        # Of a prompt the last position is answered, of guesses all are.
        prefill = positions > min(step.tail, SHORT_ROWS)
        self.observer.step_computed(positions, compute_s, prefill)
        house = self.table.house
        busy_s = house.load.computed(result.busy_s, now)
        self.observer.engine_used(busy_s, house.bubbles.computed(busy_s, now))

    async def _answer(self, step: Step, result: StepResult, arrived_at: float) -> None:
        forward, session = result.forward, self.session
        await trio.lowlevel.checkpoint_if_cancelled()
        session.machine.sent(StepOutput)
        if self._is_last(step):
            output = self._output(step, result, forward, arrived_at)
            await session.outbox.put(output, forward.data, company=result.company)
            return
        if self.link is None:
            raise LocalProtocolError("a session in mid-route without a link")
        onward = step if forward.header == step.tensor else replace(step, tensor=forward.header)
        await self.link.outbox.put(onward, forward.data, company=result.company)
        copy = result.returned
        if self.ticket.returns == TIMES:
            times = StepTimes(session.id, step.epoch, step.step, *self._times(result, arrived_at))
            sent = session.outbox.offer(times, company=result.company)
        elif copy is not None:
            output = self._output(step, result, copy, arrived_at)
            sent = session.outbox.offer(output, copy.data, company=result.company)
        else:
            return
        if not sent:
            self.observer.output_dropped()

    @property
    def ticket(self) -> Ticket:
        """The place in the route that the work done so far gave; what is still in the inbox may change it."""
        if self._ticket is None:
            raise LocalProtocolError("a step before the session took its place in the route")
        return self._ticket

    def _is_last(self, step: Step) -> bool:
        # A linear map is no pass through the model: whoever holds the block answers the client itself.
        return not self.ticket.successor or step.operation == Operation.LINEAR

    def _output(self, step: Step, result: StepResult, payload: Payload, arrived_at: float) -> StepOutput:
        times = self._times(result, arrived_at)
        return StepOutput(self.session.id, step.epoch, step.step, *times, payload.header)

    def _times(self, result: StepResult, arrived_at: float) -> tuple[int, int, int]:
        total_us = round(1e6 * (self.table.clock.monotonic() - arrived_at))
        compute_us, queue_us, most = result.compute_us, result.queue_us, limits.STEP_US_MAX
        return min(compute_us, most), min(queue_us, most), min(max(total_us, compute_us), most)
