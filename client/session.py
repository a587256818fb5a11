"""One session over a route, as the client holds it: steps out, answers in, one failure for all who wait.

`RouteSession` starts no task and owns no stream: client/driver.py carries its messages and calls `take` with what
arrives. Several steps may be in flight; answers are matched by step id, in any order. What a hop sends is believed only
after it fits: its state table, the step that was asked, shape, dtype, finite numbers. The first failure is final; every
later call raises it. Retrying on another route is for whoever opens sessions.

One task submits at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import trio

from client.errors import HopLost, HopRefused, HopViolation, short
from client.inflight import InFlight, SentStep
from client.observer import ClientObserver
from client.outputs import HopOutput, OutputSink
from client.routing import Route
from client.tensors import RECEIVED, all_finite
from client.tracing import HopTimes, StepTrace
from protocol import limits
from protocol.errors import LocalProtocolError, RemoteProtocolError, RouteUnavailable, SottoError
from protocol.ids import PeerId, SessionId
from protocol.messages import (
    Attach,
    Attached,
    CloseSession,
    Message,
    OpenSession,
    Operation,
    RefusalReason,
    SessionFailed,
    SessionOpened,
    Step,
    StepOutput,
    StepTimes,
)
from protocol.session import Role, SessionMachine, State
from protocol.tensors import Payload
from protocol.tickets import TIMES

OPEN_S = 20.0  # the longest silence of a route that is asked to open
CLOSE_S = 1.0  # for telling the hops that a session is over; the end of our streams tells them as well


class HopLink(Protocol):
    """How messages reach one hop. Raises the error that names the hop once its stream is gone."""

    async def send(self, message: Message, body: bytes = b"") -> None: ...
    def send_at_once(self, message: Message, body: bytes = b"") -> bool: ...


@dataclass(frozen=True, slots=True)
class SessionHost:
    """What a session needs of its driver. `detach`: no message of the session is wanted any more. `close`: have
    `aclose` run, by a task of the driver's."""

    observer: ClientObserver
    detach: Callable[[RouteSession], None]
    close: Callable[[RouteSession], None]


@dataclass(frozen=True, slots=True)
class SessionTerms:
    """What a session is opened with. `returns`: the dtype of what hops before the last return, or "none"; it goes to
    `sink`. `trace` is told where the time of each step went. `times`: all hops say when they have computed a step; it
    shows who is silent. `page_keys`, `deterministic`, `alone`, `micro_batches`, `micro_batch_min`, `request`: see
    OpenSession. `step_timeout_s` is the longest silence of a route that has steps to answer."""

    kv_tokens: int
    returns: str = "none"
    sink: OutputSink | None = None
    trace: StepTrace | None = None
    times: bool = False
    page_keys: bytes = b""
    deterministic: bool = False
    alone: bool = False
    micro_batches: int = 1
    micro_batch_min: int = 1
    request: bytes = b""
    step_timeout_s: float = 60.0

    @property
    def ticket_returns(self) -> str:
        """What tickets ask of the hops before the last."""
        return TIMES if self.returns == "none" and (self.times or self.trace is not None) else self.returns


@dataclass(frozen=True, slots=True)
class _Patience:
    """How long to wait without a sign of life, and what to say then."""

    seconds: float
    error: Callable[[], SottoError]


class RouteSession:
    """Made by Driver.open_session; `submit` and `result` (or `step`), then `aclose`."""

    def __init__(
        self, session: SessionId, route: Route, terms: SessionTerms, links: Sequence[HopLink], host: SessionHost
    ) -> None:
        self.id = session
        self.route = route
        self.terms = terms
        self._links = links
        self._observer = host.observer
        self._close = host.close
        self._detach = host.detach
        self._machines = [SessionMachine(Role.CLIENT) for _ in route.hops]
        self._hop_of = {hop.peer: index for index, hop in enumerate(route.hops)}
        self._steps = InFlight()
        self._held = 0  # tokens in the hops' KV once all submitted steps are computed
        self._held_at_hop = [0] * len(route.hops)  # when the session was opened
        self.keep_pages = b""  # keys of full pages that the hops shall keep when the session is closed
        self._heard_at = trio.current_time()
        self._changed = trio.Event()
        self._failure: SottoError | None = None
        self._sending: trio.CancelScope | None = None
        self._closed = False
        self._resting: Callable[[], bytes] | None = None
        self.bytes_out = self.bytes_in = 0  # of activations
        self.computed: dict[PeerId, tuple[int, int]] = {}  # steps and microseconds, as hops that answered say

    async def open(self, tickets: tuple[bytes, ...]) -> None:
        """Attach to every hop, then open the route with `tickets`. Raises the failure of whichever hop objects."""
        for number, (machine, link) in enumerate(zip(self._machines, self._links, strict=True)):
            machine.sent(Attach)
            await self._send(link, Attach(self.id), b"", self._unready(State.ATTACHED, number))
        await self._until(lambda: self._all(State.ATTACHED), self._unready(State.ATTACHED))
        for machine in self._machines:
            machine.sent(OpenSession)
        terms = self.terms
        message = OpenSession(
            self.id, tickets, terms.page_keys, terms.deterministic, terms.alone,
            terms.micro_batches, terms.micro_batch_min, terms.request,
        )  # fmt: skip
        await self._send(self._links[0], message, b"", self._unready(State.OPEN))
        await self._until(lambda: self._all(State.OPEN), self._unready(State.OPEN))
        self._held = self.held_tokens

    @property
    def held_tokens(self) -> int:
        """So many of the session's first tokens need not be computed: all hops kept them from earlier sessions. Hops
        that kept more forget the rest with the first step."""
        return min(self._held_at_hop)

    async def aclose(self) -> None:
        """Free the session on all hops. Idempotent; never raises for the network's sake; takes at most CLOSE_S.

        Each hop is told, whatever the route passes on: a hop that keeps the news to itself, or that reads nothing, must
        not keep the session, and its memory, alive at the others.
        """
        if self._closed:
            return
        self._closed = True
        self._detach(self)
        told = []
        for machine, link in zip(self._machines, self._links, strict=True):
            if machine.state is not State.IDLE:
                machine.sent(CloseSession)
                told.append(link)
        self.fail(LocalProtocolError("the session is closed"))
        with trio.CancelScope(deadline=trio.current_time() + CLOSE_S, shield=True):
            for link in told:
                with trio.move_on_after(CLOSE_S / len(told)), suppress(SottoError):  # a lost hop's session went with it
                    await link.send(CloseSession(self.id, self.keep_pages))

    def rest(self, page_keys: Callable[[], bytes]) -> None:
        """Nobody uses the session until the next step. If it fails before, or has failed, it is closed at once, so that
        no hop holds it for an owner who does not look; they keep what `page_keys` names, unless one broke the protocol.
        """
        self._resting = page_keys
        if self._failure is not None:  # unseen by who used it: nothing came after it
            self._close_if_resting(self._failure)

    async def submit(self, payload: Payload, position: int, tail: int = 1) -> int:
        """Send a step: `payload` [T, d] holds the tokens at [position, position + T). Its id, for `result`.

        `tail` is how many trailing positions the answer has. Waits while too much is in flight. When this raises or is
        cancelled, the step was not sent.
        """
        self._resting = None
        rows, width = self._check(payload, position, tail)
        late = _Patience(self.terms.step_timeout_s, self._silent)
        await self._until(lambda: self._steps.has_room(len(payload.data)), late)
        if self._steps.idle:
            self._heard_at = trio.current_time()  # a route that had nothing to do may be silent
        last = len(self._links) - 1
        waiting = {last} if self.terms.ticket_returns == "none" else set(range(last + 1))
        step = self._steps.add(SentStep(position, rows, width, tail, len(payload.data), waiting))
        message = Step(
            session=self.id, epoch=0, step=step, position=position, acked=self._steps.acked, tail=tail,
            operation=Operation.SPAN, block=0, matrix="", tensor=payload.header,
        )  # fmt: skip
        for machine in self._machines:
            machine.sent(Step)
        try:
            await self._send(self._links[0], message, payload.data, late)
        except BaseException:
            self._steps.give_up(step)
            raise
        if self.terms.trace is not None:
            self.terms.trace.sent(step, position, trio.current_time())
        self._held = position + rows
        self.bytes_out += len(payload.data)
        return step

    async def result(self, step: int) -> Payload:
        """The last hop's answer [tail, d] to a submitted step, once. Raises whatever ended the session.

        Raises RouteUnavailable when the route was silent for `step_timeout_s`, though it had steps to answer; HopLost
        where it is known which hop was.
        """
        self._raise_failure()
        sent = self._steps.unfetched(step)
        await self._until(lambda: sent.answered, _Patience(self.terms.step_timeout_s, self._silent))
        return self._steps.fetch(sent)

    def ready_s(self, step: int) -> float | None:
        """For how long `result` would have returned at once, or raised; None: it would wait."""
        if self._failure is not None:
            return 0.0
        sent = self._steps.unfetched(step)
        return trio.current_time() - sent.answered_at if sent.answered else None

    def abandon(self) -> None:
        """Nobody will ask for the answers that are under way, or here and not fetched."""
        self._steps.abandon()

    async def step(self, payload: Payload, position: int, tail: int = 1) -> Payload:
        """`submit` and `result` in one."""
        return await self.result(await self.submit(payload, position, tail))

    def take(self, peer: PeerId, message: Message, body: bytes) -> bool:
        """The driver's: a message of this session came from `peer`. False when nobody waits for it. Raises
        RemoteProtocolError when it does not fit."""
        hop, wanted = self._hop_of[peer], True
        self._machines[hop].received(type(message))
        match message:
            case Attached():
                self._heard_at = trio.current_time()
            case SessionOpened():
                if message.epoch != 0 or message.kv_tokens < self.terms.kv_tokens:
                    raise RemoteProtocolError("the session was opened on other terms than the ticket's")
                if message.held_tokens > self._held_max or message.held_tokens % limits.PAGE_TOKENS:
                    raise RemoteProtocolError(f"{message.held_tokens} tokens are said to be held already")
                self._held_at_hop[hop] = message.held_tokens
                self._heard_at = trio.current_time()
            case StepOutput():
                wanted = self._take_output(hop, message, body)
            case StepTimes():
                wanted = self._take_times(hop, message)
            case SessionFailed():
                self.fail(self._failure_of(hop, message))
            case _:  # no other type passes the table
                raise RemoteProtocolError(f"{type(message).__name__} came on a session stream")
        self._wake()
        return wanted

    def fail(self, error: SottoError) -> None:
        """The driver's: end the session with `error`, unless it has ended."""
        self._failure = self._failure or error
        if self._sending is not None:
            self._sending.cancel()
        self._wake()
        self._close_if_resting(error)

    def _close_if_resting(self, error: SottoError) -> None:
        resting, self._resting = self._resting, None
        if resting is not None and not self._closed:
            self.keep_pages = b"" if isinstance(error, RemoteProtocolError) else resting()
            self._close(self)

    @property
    def lost_words(self) -> str:
        """What to say of a worker that is lost now."""
        return "was lost in mid-generation" if self._steps.next else "was lost while the session was opened"

    def _take_output(self, hop: int, message: StepOutput, body: bytes) -> bool:
        if message.epoch != 0 or message.step >= self._steps.next:
            raise RemoteProtocolError(f"an output of step {message.step}, which was not asked for")
        payload = Payload(message.tensor, body)
        last = hop == len(self._links) - 1
        sent = self._steps.waits_for(message.step, hop)
        if sent is None:
            return False
        _check_output(payload, (sent.tail if last else sent.rows, sent.width), first=hop == 0)
        if self.terms.ticket_returns == TIMES and not last:
            raise RemoteProtocolError("an output where times were asked for")
        sent.waiting.discard(hop)
        self.bytes_in += len(body)
        self._heard_at = trio.current_time()  # only what was asked for counts as a sign of life
        self._note_times(hop, message)
        if last:
            sent.answered, sent.answer = True, None if sent.abandoned else payload
            sent.answered_at = self._heard_at
        elif self.terms.sink is not None:
            self.terms.sink.take(HopOutput(hop, message.step, sent.position, payload))
        return True

    def _take_times(self, hop: int, message: StepTimes) -> bool:
        if self.terms.ticket_returns != TIMES or hop == len(self._links) - 1:
            raise RemoteProtocolError("times that were not asked for")
        if message.epoch != 0 or message.step >= self._steps.next:
            raise RemoteProtocolError(f"times of step {message.step}, which was not asked for")
        sent = self._steps.waits_for(message.step, hop)
        if sent is None:
            return False
        sent.waiting.discard(hop)
        self._note_times(hop, message)
        return True

    def _note_times(self, hop: int, message: StepOutput | StepTimes) -> None:
        peer = self.route.hops[hop].peer
        self._observer.step_computed(peer, message.compute_us / 1e6)
        steps, micros = self.computed.get(peer, (0, 0))
        self.computed[peer] = (steps + 1, micros + message.compute_us)
        if self.terms.trace is not None:
            times = HopTimes(message.compute_us, message.queue_us, message.total_us)
            self.terms.trace.told(message.step, hop, times)
            if hop == len(self._links) - 1:
                self.terms.trace.answered(message.step, trio.current_time())

    def _failure_of(self, hop: int, message: SessionFailed) -> SottoError:
        peer = self.route.hops[hop].peer
        if message.reason != RefusalReason.HOP_LOST:
            return HopRefused(peer, message.reason, message.detail)
        if hop + 1 == len(self._links):
            return HopViolation(peer, "the last hop of a route says that the next one is lost")
        return HopLost(
            self.route.hops[hop + 1].peer, f"{self.lost_words} (says worker {short(peer)}, the hop before it)"
        )

    def _check(self, payload: Payload, position: int, tail: int) -> tuple[int, int]:
        """Rows and width of a step that may be sent. Raises LocalProtocolError, or what ended the session."""
        self._raise_failure()
        shape = payload.header.shape
        if len(shape) != 2 or payload.header.dtype not in RECEIVED:
            raise LocalProtocolError(f"a step of {payload.header.dtype} {shape}; [positions, width] floats are sent")
        rows, width = shape
        if not 1 <= tail <= rows <= limits.STEP_TOKENS_MAX or payload.header.numbers > limits.STEP_NUMBERS_MAX:
            raise LocalProtocolError(f"a step of {rows} positions, {payload.header.numbers} numbers and tail {tail}")
        if position > self._held or position + rows > self.terms.kv_tokens:
            raise LocalProtocolError(
                f"a step at {position} of {rows} tokens, with {self._held} held in a session of {self.terms.kv_tokens}"
            )
        return rows, width

    @property
    def _held_max(self) -> int:
        return limits.PAGE_TOKENS * (len(self.terms.page_keys) // limits.PAGE_KEY_BYTES)

    def _all(self, state: State) -> bool:
        return all(machine.state is state for machine in self._machines)

    async def _send(self, link: HopLink, message: Message, body: bytes, patience: _Patience) -> None:
        """Hand a message to `link`; ends early, not sent, when the session fails or patience runs out."""
        if link.send_at_once(message, body):
            return
        with trio.move_on_after(patience.seconds) as scope:
            self._sending = scope
            try:
                await link.send(message, body)
            finally:
                self._sending = None
        if scope.cancelled_caught:
            self.fail(patience.error())
            self._raise_failure()

    async def _until(self, ready: Callable[[], bool], patience: _Patience) -> None:
        """Wait for `ready`, or for the session's end, or until the route was silent for too long."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while True:
            self._raise_failure()
            if ready():
                return
            changed = self._changed
            with trio.move_on_at(self._heard_at + patience.seconds):
                await changed.wait()
            if trio.current_time() >= self._heard_at + patience.seconds and not ready():
                self.fail(patience.error())

    def _unready(self, state: State, told: int = 0) -> _Patience:
        """Names the first hop that was asked and has not reached `state`; if there is none, hop `told`: it answered
        what it did not read, and still reads nothing."""

        def error() -> SottoError:
            hops = zip(self.route.hops, self._machines, strict=True)
            asked = (hop for hop, machine in hops if machine.state not in (state, State.IDLE))
            late = next(asked, self.route.hops[told])
            return HopLost(late.peer, f"did not open the session within {OPEN_S:g} s")

        return _Patience(OPEN_S, error)

    def _silent(self) -> SottoError:
        """Names the first hop that has not answered the oldest step, where each of them was to."""
        seconds, long = self.terms.step_timeout_s, "it is a long prompt that takes so long"
        smaller = "with smaller steps (--strategy prefill_chunk=64)"
        late = self._steps.oldest
        if late is not None and (len(self._links) == 1 or self.terms.ticket_returns != "none"):
            peer = self.route.hops[min(late.waiting)].peer
            return HopLost(peer, f"gave no answer for {seconds:g} s", f", or, if {long}, {smaller}")
        who = ", ".join(short(hop.peer) for hop in self.route.hops)
        return RouteUnavailable(
            f"no answer from the route over workers {who} for {seconds:g} s; run again, and if {long}, {smaller}"
        )

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure.with_traceback(None)

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()


def _check_output(payload: Payload, shape: tuple[int, int], *, first: bool) -> None:
    header = payload.header
    if header.shape != shape or header.dtype not in RECEIVED:
        raise RemoteProtocolError(f"an output of {header.dtype} {list(header.shape)} where {list(shape)} was asked for")
    if not all_finite(payload):
        origin = "" if first else " (its own, or passed on from a worker before it)"
        raise RemoteProtocolError(f"an output with numbers that are NaN or infinite{origin}")
