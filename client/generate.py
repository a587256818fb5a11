"""Generation: from prompt ids to a stream of token ids over an open session.

The prompt goes out in chunks, several in flight, so that all hops work at once. Then each answer gives a token, whose
embedding is the next step, sent before the token is given out. With speculation a step also carries guesses at what
follows (speculation.py), and an answer gives as many tokens as guesses held, and one more. Positions are exact: the
token chosen after P tokens is sampled for position P and computed at position P, so a run that is cut and resumed, or
speculated, is the same run. A session that holds a beginning of the prompt already, from the turn before of a chat or
because the hops kept it, is sent the rest.

Head, sampling and the next embedding are one call (head_batches.py), shared with the other requests of the model; a
prompt's embedding goes through `run_sync`. The composition root points both at a thread for a large model.
No text here (client/text.py), no retrying, and the session stays open: it is the caller's.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, Protocol

import torch
import trio
from torch import Tensor

from client.head_batches import Ends, HeadBatches, inline
from client.observer import ClientObserver
from client.speculation import Speculation
from client.tensors import DTYPES, to_payload, to_tensor
from models.sampling import SamplingParams, sample
from protocol import limits
from protocol.errors import InputError, LocalProtocolError, RemoteProtocolError
from protocol.ports import Clock, RunSync
from protocol.tensors import Payload

FinishReason = Literal["stop", "length"]
# Of a prompt that guesses are made from on the event loop: they take half a millisecond, and a thread a fifth of that.
LOOKED_UP_INLINE_MAX = 1024


class Steps(Protocol):
    """The part of client.session.RouteSession that a generation uses."""

    async def submit(self, payload: Payload, position: int, tail: int = 1) -> int: ...
    async def result(self, step: int) -> Payload: ...
    def ready_s(self, step: int) -> float | None: ...


class Choose(Protocol):
    """models.sampling.sample, or what stands in for it: benchmarks dictate the answer."""

    def __call__(self, logits: Tensor, params: SamplingParams, position: int, /) -> int: ...


@dataclass(frozen=True, slots=True)
class GenerationParams:
    """What is asked for. A stop id is given out and ends the generation. `wire_dtype` is that of the activations.

    Raises InputError on values that cannot be meant.
    """

    max_new_tokens: int
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop_ids: frozenset[int] = frozenset()
    prefill_chunk: int = 256
    wire_dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens must be 1 or more, not {self.max_new_tokens}")
        if not 1 <= self.prefill_chunk <= limits.STEP_TOKENS_MAX:
            raise InputError(f"prefill_chunk must lie in 1..{limits.STEP_TOKENS_MAX}, not {self.prefill_chunk}")
        if self.wire_dtype not in DTYPES:
            raise InputError(f"wire_dtype must be one of {', '.join(DTYPES)}, not {self.wire_dtype!r}")


@dataclass(frozen=True, slots=True)
class GenerationHost:
    """What a generation needs of the world. `speculation`, when there is one, is for this generation alone;
    `head_batches` are those of all requests of the model, None for a request that shares its products with none.
    `observer` hears of a request as its user sees it, however often it was begun again (client/kept.py). `started_at`:
    when the request began, by `clock`, since opening its session is part of what a user waits for; None: with its
    tokens."""

    clock: Clock
    run_sync: RunSync = inline
    observer: ClientObserver = field(default_factory=ClientObserver)
    speculation: Speculation | None = None
    choose: Choose = sample
    head_batches: HeadBatches | None = None
    started_at: float | None = None


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """A finished generation. `token_times_s[i]` is when token i was there, in seconds from the start of the request."""

    ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    token_times_s: tuple[float, ...]
    held_tokens: int = 0  # of the prompt, that the workers had kept and did not compute again
    drafted: int = 0  # guesses that were sent
    accepted: int = 0  # guesses that held

    @property
    def time_to_first_token_s(self) -> float:
        return self.token_times_s[0]

    @property
    def tokens_per_second(self) -> float:
        """Decode rate: tokens after the first over the time they took; 0 for a single token."""
        span = self.token_times_s[-1] - self.token_times_s[0]
        return (len(self.token_times_s) - 1) / span if span > 0 else 0.0


def kv_tokens_for(prompt_tokens: int, max_new_tokens: int, context_tokens: int) -> int:
    """How many tokens a session must hold: call it before anything is opened or sent.

    Raises InputError when prompt and new tokens do not fit into the model's context, naming both numbers.
    """
    if prompt_tokens < 1:
        raise InputError("the prompt has no tokens; give some text")
    if prompt_tokens >= context_tokens:
        raise InputError(
            f"the prompt has {prompt_tokens} tokens and the model's context holds {context_tokens}, the answer "
            "included; shorten the prompt"
        )
    if prompt_tokens + max_new_tokens > context_tokens:
        raise InputError(
            f"the prompt has {prompt_tokens} tokens, and {max_new_tokens} more exceed the model's context of "
            f"{context_tokens}; ask for at most {context_tokens - prompt_tokens}"
        )
    return prompt_tokens + max_new_tokens


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What came of an answer: tokens, the guesses at what follows them, and the step that both make (None: the end)."""

    chosen: list[int]
    drafts: tuple[int, ...]
    following: Payload | None


class Generation:
    """One request. Iterate `tokens` once; `result` is complete when that has ended.

    The session's KV holds the first `held` tokens of the prompt. `held_tokens` says what it holds now, for certain, of
    prompt and answer: also after an end that came early.
    """

    def __init__(
        self,
        session: Steps,
        ends: Ends,
        prompt_ids: Sequence[int],
        params: GenerationParams,
        host: GenerationHost,
        held: int = 0,
    ) -> None:
        if not prompt_ids:
            raise InputError("the prompt has no tokens; give some text")
        if not 0 <= held < len(prompt_ids):
            raise LocalProtocolError(f"{held} of {len(prompt_ids)} tokens are held: one at least is computed")
        self._session = session
        self._prompt = list(prompt_ids)
        self._params = params
        self._host = host
        self._head_batches = host.head_batches or HeadBatches(ends, host.run_sync)
        self._started_at = host.clock.monotonic()
        self._stopped = False
        self._sent_at = 0.0
        self._prompt_held = self._held_at_first = held
        self.ids: list[int] = []
        self.token_times_s: list[float] = []
        self.finish_reason: FinishReason | None = None

    def stop(self) -> None:
        """The caller has what it wanted (a stop string, say): the stream ends before the next token."""
        self._stopped = True

    @property
    def held_tokens(self) -> int:
        # the last token is known before it is computed
        return len(self._prompt) + len(self.ids) - 1 if self.ids else self._prompt_held

    def result(self, text: str = "") -> GenerationResult:
        """Raises ValueError before the stream has ended."""
        if self.finish_reason is None:
            raise ValueError("the generation has not ended")
        guesses = self._host.speculation
        return GenerationResult(
            ids=tuple(self.ids),
            text=text,
            finish_reason=self.finish_reason,
            prompt_tokens=len(self._prompt),
            token_times_s=tuple(self.token_times_s),
            held_tokens=self._held_at_first,
            drafted=guesses.drafted if guesses else 0,
            accepted=guesses.accepted if guesses else 0,
        )

    async def tokens(self) -> AsyncGenerator[int, None]:
        """The new token ids, each as soon as it is known. Raises what ends the session (client/session.py)."""
        begun = self._host.started_at
        self._started_at = self._host.clock.monotonic() if begun is None else begun
        self._head_batches.begin()
        try:
            await self._begin_guessing()
            answer, drafts = await self._prefill(), tuple[int, ...]()
            while True:
                position = len(self._prompt) + len(self.ids)
                outcome = await self._outcome(answer, drafts, position)
                step, known_s = None, self._elapsed_s()
                if outcome.following is not None:
                    step = await self._submit(outcome.following, position + len(outcome.chosen) - 1)
                for token in outcome.chosen:
                    self._note(token, known_s)
                    yield token
                    if self._stopped:
                        break
                if step is None or self._stopped:
                    break
                drafts = outcome.drafts
                answer = await self._answer(step, 1 + len(drafts))
            stopped = self._stopped or token in self._params.stop_ids
            self.finish_reason = "stop" if stopped else "length"
        finally:
            self._head_batches.end()
            if self._host.speculation is not None:
                self._host.speculation.landed()

    async def _begin_guessing(self) -> None:
        if self._host.speculation is None:
            return
        begin = partial(self._host.speculation.begin, self._prompt)
        if len(self._prompt) > LOOKED_UP_INLINE_MAX:
            await self._host.run_sync(begin)
        else:
            begin()

    async def _outcome(self, answer: Payload, drafts: tuple[int, ...], position: int) -> _Outcome:
        speculation, chosen, following = self._host.speculation, list[int](), tuple[int, ...]()
        # A draft model is slow, and kept for the next request: other requests neither wait for it nor run it.
        apart = speculation is not None and speculation.draft is not None

        def choose(logits: Iterable[Tensor]) -> tuple[int, ...]:
            nonlocal following
            chosen.extend(self._choose(logits, drafts, position))
            if speculation is not None and not apart:
                speculation.came(chosen)
            if not apart:
                following = self._next(chosen)
            return following

        hidden = to_tensor(answer)[-1 - len(drafts) :]
        embedded = await self._head_batches.join(hidden, choose)
        if speculation is not None and apart:
            speculation.came(chosen)
            asks = speculation.asks(self._room(chosen))
            following = await self._host.run_sync(partial(self._next, chosen)) if asks else self._next(chosen)
            embedded = self._head_batches.embed(following) if following else None
        if embedded is None:
            return _Outcome(chosen, (), None)
        return _Outcome(chosen, following[1:], self._payload(embedded))

    def _next(self, chosen: list[int]) -> tuple[int, ...]:
        """The next step after the tokens that were chosen now: the last one and guesses; () at the end."""
        speculation = self._host.speculation
        if chosen[-1] in self._params.stop_ids or self._room(chosen) < 0:
            return ()
        if speculation is None:
            return (chosen[-1],)
        return (chosen[-1], *speculation.next(self._room(chosen)))

    def _room(self, chosen: list[int]) -> int:
        """For guesses, after these tokens. The last token is never computed: a guess at it would be in vain, and might
        not fit into the KV."""
        return self._params.max_new_tokens - len(self.ids) - len(chosen) - 1

    def _choose(self, rows: Iterable[Tensor], drafts: tuple[int, ...], position: int) -> list[int]:
        """The tokens for `position` and what follows, from logits, as far as `drafts` hold: one at least."""
        chosen = list[int]()
        room = self._params.max_new_tokens - len(self.ids)
        for row, guess in zip(rows, (*drafts, None), strict=True):
            # Finite numbers can be so large that their sums are not.
            if not all(map(math.isfinite, torch.aminmax(row))):
                raise RemoteProtocolError("the route's answer is so large that no token follows from it: a worker lies")
            token = self._host.choose(row, self._params.sampling, position + len(chosen))
            chosen.append(token)
            if token != guess or token in self._params.stop_ids or len(chosen) == room:
                break
        return chosen

    async def _submit(self, payload: Payload, position: int) -> int:
        self._sent_at, rows = self._host.clock.monotonic(), payload.header.shape[0]
        if self._host.speculation is not None:
            self._host.speculation.sent(rows - 1)
        return await self._session.submit(payload, position, tail=rows)

    async def _answer(self, step: int, rows: int) -> Payload:
        speculation, late_s = self._host.speculation, 0.0
        if speculation is not None:
            late_s = await self._read_ahead(speculation, step, self._sent_at + (speculation.pace.step_s or 0.0))
        answer = await self._session.result(step)
        if speculation is not None:
            speculation.took(rows, self._host.clock.monotonic() - self._sent_at - late_s)
        return answer

    async def _read_ahead(self, speculation: Speculation, step: int, due: float) -> float:
        """A draft model that lags reads while the route is busy with `step`, in pieces that should end before the
        answer is due. Gives the seconds by which the last one came after it all the same."""
        late_s = 0.0
        while (tokens := speculation.readable(due - self._host.clock.monotonic())) and not self._ready(step):
            await self._host.run_sync(partial(speculation.read, tokens))
            await trio.lowlevel.checkpoint()
            late_s = self._session.ready_s(step) or 0.0
        return late_s

    def _ready(self, step: int) -> bool:
        return self._session.ready_s(step) is not None

    async def _prefill(self) -> Payload:
        """The answer for the prompt's last position."""
        ids, position, steps = self._prompt, self._prompt_held, list[int]()
        rows, started = self._params.prefill_chunk, self._host.clock.monotonic()
        while position < len(ids):
            chunk = ids[position : position + rows]
            payload = await self._host.run_sync(partial(self._embedded, chunk))
            if payload.header.numbers > limits.STEP_NUMBERS_MAX and len(chunk) > 1:
                rows = max(1, limits.STEP_NUMBERS_MAX * len(chunk) // payload.header.numbers)
                continue
            steps.append(await self._session.submit(payload, position))
            position = self._prompt_held = position + len(chunk)
        speculation, computed, late_s = self._host.speculation, len(ids) - self._held_at_first, 0.0
        if speculation is not None:
            due = started + speculation.pace.prompt_s(computed)
            late_s = await self._read_ahead(speculation, steps[-1], due)
        for step in steps[:-1]:
            await self._session.result(step)
        answer = await self._session.result(steps[-1])
        if speculation is not None:
            speculation.prefilled(computed, self._host.clock.monotonic() - started - late_s)
        return answer

    def _embedded(self, ids: Sequence[int]) -> Payload:
        return self._payload(self._head_batches.embed(ids))

    def _payload(self, embedded: Tensor) -> Payload:
        return to_payload(embedded, DTYPES[self._params.wire_dtype])

    def _note(self, token: int, known_s: float) -> None:
        self.ids.append(token)
        self.token_times_s.append(known_s)

    def _elapsed_s(self) -> float:
        return self._host.clock.monotonic() - self._started_at
