"""A session that stays open between requests, and is opened again when it is lost.

Of a request only what follows the longest common beginning of its prompt and of what the hops' KV holds is sent;
the first step truncates the rest there. When the session is lost, also in the middle of an answer, another one is
opened (over the same route, then over one that is found anew), and what was known is computed again: tokens depend on
their positions alone, so the answer goes on as if nothing had happened.

Invariant: `held` is what the KV holds for certain. One request at a time. Where sessions come from is the opener's.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Protocol

from client.errors import short
from client.generate import FinishReason, Generation, GenerationHost, GenerationParams, GenerationResult, Steps
from client.turns import Ends
from protocol.errors import Refused, RemoteProtocolError, RouteUnavailable, SottoError, TransportError

LOSSES_MAX = 3  # in a row, without a token between them

_LOST = (RouteUnavailable, Refused, TransportError)


class OpenedSession(Steps, Protocol):
    """The part of client.session.RouteSession that is used here."""

    def abandon(self) -> None: ...
    async def aclose(self) -> None: ...


Opener = Callable[[bool], Awaitable[OpenedSession]]
"""Opens a session; with True over a route that is found anew. Raises SottoError."""


class KeptSession:
    """`notice` is told in a sentence when the session was lost."""

    def __init__(self, opener: Opener, notice: Callable[[str], None] = lambda _: None) -> None:
        self.held: list[int] = []
        self.losses = 0  # over its whole life
        self._opener = opener
        self._notice = notice
        self._session: OpenedSession | None = None
        self._in_a_row = 0

    async def ready(self) -> OpenedSession:
        """The open session; one is opened when there is none. Raises SottoError."""
        if self._session is None:
            self._session = await self._opener(self._in_a_row > 1)
        return self._session

    async def lost(self, error: SottoError) -> None:
        """The session failed with `error`, or could not be opened. Raises it when that happens again and again."""
        await self.aclose()
        self._in_a_row += 1
        if self._in_a_row > LOSSES_MAX:
            self._in_a_row = 0
            raise error
        if self._in_a_row == 1:
            self.losses += 1
            peer = getattr(error, "peer", None)
            who = f"worker {short(peer)} is" if peer else "the workers are"
            self._notice(f"{who} lost to this session: it is opened again, and what was said is computed anew")

    def settle(self, ids: list[int]) -> None:
        """A request has ended, well or early: the KV holds `ids`."""
        if self._session is not None:
            self._session.abandon()
            self.held = ids

    def progressed(self) -> None:
        """A token came: whatever fails next is another failure."""
        self._in_a_row = 0

    async def aclose(self) -> None:
        """Free the KV on all hops. The next request opens a session."""
        session, self._session, self.held = self._session, None, []
        if session is not None:
            await session.aclose()


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
        self.reused_tokens = 0  # of the prompt, that the KV held at the start
        self._kept = kept
        self._ask = ask
        self._host = host
        self._times_s: list[float] = []
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

    def result(self, text: str = "") -> GenerationResult:
        """Raises ValueError before the stream has ended."""
        if self._generation is None:
            raise ValueError("the generation has not begun")
        last = self._generation.result(text)
        prompt_tokens, times_s = len(self._ask.prompt), tuple(self._times_s)
        return replace(last, ids=tuple(self.ids), prompt_tokens=prompt_tokens, token_times_s=times_s)

    async def tokens(self) -> AsyncGenerator[int, None]:
        """The new token ids, each as soon as it is known. Raises SottoError when the session cannot be had again."""
        started_at, first = self._host.clock.monotonic(), True
        while True:
            try:
                session = await self._kept.ready()
                self._generation = generation = self._next(session, first)
                first = False
                try:
                    async with aclosing(generation.tokens()) as tokens:
                        async for token in tokens:
                            self.ids.append(token)
                            self._times_s.append(self._host.clock.monotonic() - started_at)
                            self._kept.progressed()
                            yield token
                finally:
                    self._kept.settle([*self._ask.prompt, *self.ids][: generation.held_tokens])
                return
            except _LOST as error:
                await self._kept.lost(error)
            except RemoteProtocolError:  # never again with that peer; a later request opens a session of its own
                await self._kept.aclose()
                raise

    def _next(self, session: OpenedSession, first: bool) -> Generation:
        """What is left of the request, over `session`."""
        known, params = [*self._ask.prompt, *self.ids], self._ask.params
        held = min(common(self._kept.held, known), len(known) - 1)
        self.reused_tokens = held if first else 0
        left = replace(params, max_new_tokens=params.max_new_tokens - len(self.ids))
        return Generation(session, self._ask.ends, known, left, self._host, held)


def common(left: Sequence[int], right: Sequence[int]) -> int:
    """The length of the longest common beginning."""
    return next((n for n, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
