"""A session that stays open between requests, and is opened again when it is lost.

Of a request only what follows the longest common beginning of its prompt and of what the hops' KV holds is sent;
the first step truncates the rest there. When the session is lost, also in the middle of an answer, another one is
opened (over the same route, then over one that is found anew, past the workers that were lost; at once past one that
was lost again and again), and what was known and is not in kept pages is computed again: tokens depend on their
positions alone, so the answer goes on as if nothing had happened. The same when it is preempted: a worker took its
memory for a client that holds less. Then the same route is waited for, as long as it takes within reason; preempted
again without a token between, it is lost like any other. Who declines what was asked is asked again, and no other in
its place. When a session is closed its pages stay, under their names on its route.

Invariants: `held` is what the KV of all hops holds when they have computed what was sent, in the order in which it was
sent. Only what an answer showed to be computed is named: a name that stood for anything else would give a later session
KV of another text, and that a wrong answer. One request at a time. Where sessions come from is the opener's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from typing import Protocol

import trio

from client.errors import short
from client.generate import FinishReason, Generation, GenerationHost, GenerationParams, GenerationResult, Steps
from client.head_batches import Ends
from protocol.errors import Refused, RemoteProtocolError, RouteUnavailable, SottoError, TransportError
from protocol.ids import PeerId
from protocol.messages import RefusalReason

LOSSES_MAX = 3  # in a row, without a token between them
REQUEST_LOSSES_MAX = 16  # of one request
BLAMED_MAX = 2  # losses of one request that one worker is named in: it is passed over then, tokens between or not
PREEMPTIONS_MAX = 32  # of one request: honest workers take hours to come to that
NO_ROOM_S = 300.0  # how long who was preempted looks for room again
BUSY_S = 30.0  # how long a worker that is busy is asked again, before that counts as a refusal
PAUSE_S = 1.0  # between two refusals that came at once
BACKOFF_S = 0.5  # after a refusal or a second loss, twice as long each time; a lost session is opened again at once

_LOST = (RouteUnavailable, Refused, TransportError)
# At an opening these pass by themselves. A session that was closed keeps its place until its last step is computed, and
# whoever closed it may come back before that.
_BUSY = frozenset((RefusalReason.RATE, RefusalReason.SESSIONS))
# Refusals of what a worker is, not of what was asked: another may serve.
_GONE = frozenset(
    (
        RefusalReason.HOP_LOST,
        RefusalReason.INTERNAL,
        RefusalReason.PAUSED,
        RefusalReason.PREEMPTED,
        RefusalReason.STOPPING,
        RefusalReason.UNKNOWN_DEPLOYMENT,
        RefusalReason.UNKNOWN_LEASE,
        RefusalReason.UNKNOWN_SESSION,
    )
)


class OpenedSession(Steps, Protocol):
    """The part of client.session.RouteSession that is used here."""

    keep_pages: bytes
    bytes_out: int
    bytes_in: int

    @property
    def held_tokens(self) -> int: ...
    def abandon(self) -> None: ...
    def rest(self, page_keys: Callable[[], bytes]) -> None: ...
    async def aclose(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Opening:
    """What a session is opened for: a sequence that begins with `known`. `anew`: over a route that is found anew, past
    the workers `without` where there are others. `times`: see SessionTerms."""

    known: Sequence[int]
    anew: bool = False
    without: frozenset[PeerId] = frozenset()
    times: bool = False


@dataclass(frozen=True, slots=True)
class Opened:
    """A session that may hold the first tokens already, and the keys of the pages of a sequence on its route. `named`:
    the tokens of the pages to which its opening gave names; hops keep whatever fills these."""

    session: OpenedSession
    page_keys: Callable[[Sequence[int]], bytes] = lambda _: b""
    named: Sequence[int] = ()


Opener = Callable[[Opening], Awaitable[Opened]]
"""Raises SottoError."""


@dataclass(frozen=True, slots=True)
class KeptTerms:
    """`losses_max`: how many losses in a row are made good; preemptions are, LOSSES_MAX in a row at least. `notice` is
    told in a sentence what befell the session. `refusals`: a worker that declines what was asked (no room, no right) is
    asked again, as often; else that is final."""

    losses_max: int = LOSSES_MAX
    notice: Callable[[str], None] = lambda _: None
    refusals: bool = True


class KeptSession:
    """Opened when it is first needed; closed by its owner. `violations`: see ClientPorts."""

    def __init__(
        self, opener: Opener, terms: KeptTerms | None = None, violations: Counter[PeerId] | None = None
    ) -> None:
        self.held: list[int] = []
        self._computed = 0  # so many tokens of it are in the KV of all hops by now
        self.losses = self.preemptions = 0  # over its whole life
        self._opener = opener
        self._terms = terms or KeptTerms()
        self._opened: Opened | None = None
        self._moved_before = (0, 0)
        self._in_a_row = 0
        self._anew = False  # the next opening is over a route that is found anew
        self._without: frozenset[PeerId] = frozenset()  # the workers that were lost in a row
        self._violations = Counter[PeerId]() if violations is None else violations
        self._blamed: Counter[PeerId] = Counter()  # of this request
        self._unnamed = False  # in this request a session was lost to nobody knows whom
        self._losses_left = REQUEST_LOSSES_MAX
        self._preemptions_left = PREEMPTIONS_MAX
        self._roomless_since = inf  # when it was preempted, while it has no room again
        self._busy_since = inf  # when a busy worker was first asked for the session that is to be opened
        self._preempted = False  # since the last token

    @property
    def moved(self) -> tuple[int, int]:
        """Bytes of activations over its whole life, out and in."""
        (out, in_), opened = self._moved_before, self._opened
        return (out + opened.session.bytes_out, in_ + opened.session.bytes_in) if opened is not None else (out, in_)

    def begin(self) -> None:
        """Another request begins."""
        self._preemptions_left, self._preempted = PREEMPTIONS_MAX, False
        self._losses_left, self._blamed, self._unnamed = REQUEST_LOSSES_MAX, Counter(), False
        self._busy_since = inf

    async def ready(self, known: Sequence[int]) -> OpenedSession:
        """The open session; one is opened when there is none that may hold a sequence that begins with `known`. Raises
        SottoError when that fails again and again."""
        if self._opened is not None and common(self._opened.named, known) < len(self._opened.named):
            await self.aclose()  # else the pages of `known` were kept under names of others
        while self._opened is None:
            try:
                without = self._without.union(self._violations)
                opened = await self._opener(Opening(known, self._anew, without, self._unnamed))
            except _LOST as error:
                await self.lost(error)
                continue
            except RemoteProtocolError as error:
                await self.violated(error)
                raise
            self._opened, self._anew, self._roomless_since, self._busy_since = opened, False, inf, inf
            self.held = list(known[: opened.session.held_tokens])
            self._computed = len(self.held)
        return self._opened.session

    async def lost(self, error: SottoError) -> None:
        """The session failed with `error`, or could not be opened. Raises it when nothing more can be done; comes back
        when it is time to try again."""
        opening = self._opened is None
        await self.aclose()
        reason = error.reason if isinstance(error, Refused) else ""
        declined = bool(reason) and reason not in _GONE
        if declined:
            self._anew = False  # whom the opener found anew is asked again, too
        again, self._preempted = self._preempted, self._preempted or reason == RefusalReason.PREEMPTED
        if reason == RefusalReason.PREEMPTED:
            self._note_preemption(error)
        if reason == RefusalReason.PREEMPTED and not again:
            return
        if self._passes(reason, opening):
            await trio.sleep(PAUSE_S)
        else:
            final = declined and not self._terms.refusals
            self._count_loss(error, max(0 if final else self._terms.losses_max, LOSSES_MAX if again else 0))
            if not declined:
                self._avoid(getattr(error, "peer", None))
            if self._in_a_row > 1 or reason:
                await trio.sleep(BACKOFF_S * 2 ** (self._in_a_row - 1))

    async def violated(self, error: RemoteProtocolError) -> None:
        """The session, or its opening, ended in a breach of the protocol: its pages are not kept. Where `error` names a
        worker, the next opening is over a route that is found anew without it, if there are others; so are those of
        sessions that share `violations`."""
        await self.aclose(keep=False)
        self.progressed()
        peer: PeerId | None = getattr(error, "peer", None)
        if peer is not None:
            self._anew = True
            self._violations[peer] += 1

    def _passes(self, reason: str, opening: bool) -> bool:
        """Whether to wait until a refusal for `reason` passes by itself."""
        now = trio.current_time()
        if reason == RefusalReason.KV_MEMORY:
            return 0 <= now - self._roomless_since < NO_ROOM_S
        if not opening or reason not in _BUSY:
            return False
        if self._busy_since == inf:
            self._busy_since = now
            self._terms.notice(f"a worker is busy ({reason}): it is asked again for {BUSY_S:g} s")
        return now - self._busy_since < BUSY_S

    def _note_preemption(self, error: SottoError) -> None:
        if not self._preemptions_left:
            raise error
        self._preemptions_left -= 1
        self.preemptions += 1
        self._roomless_since = min(self._roomless_since, trio.current_time())
        self._terms.notice("a worker needs its memory for another client: the answer goes on when there is room again")

    def _count_loss(self, error: SottoError, most: int) -> None:
        self._in_a_row += 1
        self._losses_left -= 1
        if self._in_a_row > most or self._losses_left < 0:
            self.progressed()
            raise error
        if self._in_a_row == 1:
            self.losses += 1
            peer: PeerId | None = getattr(error, "peer", None)
            who = f"worker {short(peer)} is" if peer else "the workers are"
            self._terms.notice(f"{who} lost to this session: it is opened again, and what was said is computed anew")

    def _avoid(self, peer: PeerId | None) -> None:
        """A worker was lost. The same route is tried once more, unless `peer` is to blame again and again. If it is not
        known which one, its workers are to tell what they do: whoever is silent again is named then."""
        if peer is not None:
            self._without |= {peer}
            self._blamed[peer] += 1
        self._unnamed |= peer is None
        self._anew = self._in_a_row > 1 or (peer is not None and self._blamed[peer] > BLAMED_MAX)

    def settle(self, ids: list[int], answered: bool) -> None:
        """A request has ended, well or early: the KV will hold `ids`. If the request was not `answered` yet, a hop may
        still hold what was there before."""
        if self._opened is not None:
            self._opened.session.abandon()
            self._computed = len(ids) if answered else min(self._computed, common(self.held, ids))
            self.held = ids
            self._opened.session.rest(partial(self._opened.page_keys, ids[: self._computed]))

    def progressed(self) -> None:
        """A token came: whatever fails next is another failure."""
        self._in_a_row, self._anew, self._without, self._preempted = 0, False, frozenset(), False

    async def aclose(self, keep: bool = True) -> None:
        """Free the KV on all hops, which `keep` its full pages as long as they have room. The next request opens a
        session."""
        self._moved_before = self.moved
        opened, self._opened = self._opened, None
        computed, self.held = self.held[: self._computed], []
        if opened is not None:
            opened.session.keep_pages = opened.page_keys(computed) if keep else b""
            await opened.session.aclose()


@dataclass(frozen=True, slots=True)
class KeptAsk:
    """A request. `prompt` has one token at least."""

    prompt: Sequence[int]
    params: GenerationParams
    ends: Ends


class KeptRequest:
    """One request over a kept session. Iterate `tokens` once; then `result` has everything."""

    def __init__(self, kept: KeptSession, ask: KeptAsk, host: GenerationHost) -> None:
        self.ids: list[int] = []
        self.reused_tokens = 0  # of the prompt, that were held and never computed for this request
        self._kept = kept
        self._ask = ask
        self._host = host
        self._times_s: list[float] = []
        self._computed_again = 0  # tokens of the answer, by the newest session
        self._generation: Generation | None = None

    def stop(self) -> None:
        """The caller has what it wanted: the stream ends before the next token."""
        if self._generation is not None:
            self._generation.stop()

    @property
    def token_times_s(self) -> tuple[float, ...]:
        """When each token so far was there, in seconds from the start of the request."""
        return tuple(self._times_s)

    @property
    def finish_reason(self) -> FinishReason | None:
        """None before the end."""
        return self._generation.finish_reason if self._generation is not None else None

    @property
    def prompt_tokens(self) -> int:
        """What the newest session was sent, or held: the prompt, and the answer as far as it came before."""
        return len(self._ask.prompt) + self._computed_again

    def result(self, text: str = "") -> GenerationResult:
        """Raises ValueError before the stream has ended."""
        if self._generation is None:
            raise ValueError("the generation has not begun")
        last = self._generation.result(text)
        return replace(
            last,
            ids=tuple(self.ids),
            prompt_tokens=len(self._ask.prompt),
            token_times_s=tuple(self._times_s),
            held_tokens=self.reused_tokens,
        )

    async def tokens(self) -> AsyncGenerator[int, None]:
        """The new token ids, each as soon as it is known. Raises SottoError when the session cannot be had again."""
        begun, observer = self._host.started_at, self._host.observer
        started_at = self._host.clock.monotonic() if begun is None else begun
        observer.request_started(len(self._ask.prompt))
        failure = "internal"
        try:
            async with aclosing(self._tokens(started_at)) as tokens:
                async for token in tokens:
                    yield token
        except SottoError as error:
            failure = type(error).__name__
            raise
        except (trio.Cancelled, GeneratorExit):
            failure = "cancelled"
            raise
        finally:
            if self.finish_reason is None:
                observer.request_failed(failure, len(self.ids))
            else:
                observer.request_finished(self.finish_reason, len(self.ids), self._host.clock.monotonic() - started_at)

    async def _tokens(self, started_at: float) -> AsyncGenerator[int, None]:
        self._kept.begin()
        while True:
            known = [*self._ask.prompt, *self.ids]
            session = await self._kept.ready(known)
            generation = self._next(session, known)
            try:
                try:
                    async with aclosing(generation.tokens()) as tokens:
                        async for token in tokens:
                            self._note(token, self._host.clock.monotonic() - started_at)
                            self._kept.progressed()
                            yield token
                finally:
                    held = [*self._ask.prompt, *self.ids][: generation.held_tokens]
                    self._kept.settle(held, answered=bool(generation.ids))
                return
            except _LOST as error:
                await self._kept.lost(error)
            except RemoteProtocolError as error:  # this request ends; a later one goes past that peer, if it can
                await self._kept.violated(error)
                raise

    def _note(self, token: int, known_s: float) -> None:
        if self._times_s:
            self._host.observer.next_token(known_s - self._times_s[-1])
        else:
            self._host.observer.first_token(known_s)
        self.ids.append(token)
        self._times_s.append(known_s)

    def _next(self, session: OpenedSession, known: list[int]) -> Generation:
        """What is left of the request, over `session`."""
        held, host = min(common(self._kept.held, known), len(known) - 1), self._host
        if self._generation is None:
            self.reused_tokens = held
        else:  # its first token is not the request's
            self.reused_tokens, host = min(self.reused_tokens, held), replace(host, started_at=None)
        self._computed_again = len(self.ids)
        left = replace(self._ask.params, max_new_tokens=self._ask.params.max_new_tokens - len(self.ids))
        self._generation = Generation(session, self._ask.ends, known, left, host, held)
        return self._generation


def common(left: Sequence[int], right: Sequence[int]) -> int:
    """The length of the longest common beginning."""
    return next((n for n, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
