"""A chat with a deployed model: one session for all turns, so that each sends only what is new.

Each turn's prompt is the whole chat, as the model's template renders it; what the workers' KV holds of it is not sent
again (client/kept.py). An answer that is stopped early stays in the chat as far as it came.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial

import trio

from client.chat import ChatPrompt, Transcript
from client.generate import GenerationResult
from client.kept import KeptAsk, KeptRequest, KeptSession, KeptTerms, Opened, Opening
from client.session import SessionTerms
from client.speculation import Speculation
from client.text import TextStream
from models.chat_template import ChatMessage, ChatTemplate
from models.tokenizer import Tokenizer
from node.choosing import Decided
from node.defaults import KV_TOKENS
from node.model import Ask, Before, DeployedModel, moved_on, progress
from protocol.errors import InputError
from protocol.ids import ID_BYTES
from protocol.strategy import Auto, Strategy

ENDING_S = 1.0  # for a turn whose iterator was dropped: it is closed a little later
OVER_BUDGET = "no strategy is expected to stay within the budget: the cheapest is used"


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """`context_tokens`: KV room that the chat takes, at most the model's context. `notice` is told, in a sentence, of
    what the user should know: a lost session, a full context."""

    system: str | None = None
    context_tokens: int = KV_TOKENS
    notice: Callable[[str], None] = lambda _: None


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn that is over. `reused_tokens` of the prompt were in the workers' KV; `dropped_turns` left the context;
    `losses`: how often the session was lost meanwhile."""

    result: GenerationResult
    reused_tokens: int
    dropped_turns: int
    losses: int


class Reply:
    """An answer under way. Iterate `pieces` once; `turn` is there afterwards."""

    def __init__(self, pieces: AsyncGenerator[str, None], finished: Callable[[], Turn]) -> None:
        self.pieces = pieces
        self._finished = finished

    @property
    def turn(self) -> Turn:
        """Raises ValueError before `pieces` has ended."""
        return self._finished()


class Chat:
    """Made by `open_chat`. One turn at a time."""

    def __init__(self, model: DeployedModel, template: ChatTemplate, options: ChatOptions) -> None:
        self._model = model
        self._template = template
        self._options = options
        self._context_tokens = min(options.context_tokens, model.config.max_position)
        self._terms = SessionTerms(self._context_tokens)
        self._used = Strategy()  # by the newest request
        self._kept = KeptSession(self._open, KeptTerms(notice=options.notice), model.ports.violations)
        self._id = model.ports.entropy(ID_BYTES)  # to workers all turns are one request
        self._guessing = model.guessing()
        self._chosen: Decided | None = None  # by the newest turn that had it chosen
        self._saying: trio.Event | None = None  # a turn is under way: it has the session, and the transcript's end
        self.transcript = Transcript(partial(_ids, template, model.tokenizer), self._context_tokens, options.system)

    @asynccontextmanager
    async def say(self, text: str, ask: Ask | None = None) -> AsyncGenerator[Reply, None]:
        """One turn. `ask.max_new_tokens` is cut to what the context has room for.

        Raises InputError before anything is sent when the message cannot fit or a turn is under way and stays so for
        ENDING_S, and what a generation raises.
        """
        if self._saying is not None:
            with trio.move_on_after(ENDING_S):
                await self._saying.wait()
        if self._saying is not None:
            raise InputError(
                "the turn before has not ended: read its answer to the end, or close what gives it, and say this then"
            )
        self._saying = ended = trio.Event()
        try:
            async with self._turn(text, ask or Ask()) as reply:
                yield reply
        finally:
            self._saying = None
            ended.set()

    @asynccontextmanager
    async def _turn(self, text: str, ask: Ask) -> AsyncGenerator[Reply, None]:
        # In a thread: a long chat takes a while to become tokens, several times when its context is full.
        prompt = await trio.to_thread.run_sync(self.transcript.prompt, text, ask.max_new_tokens)
        if prompt.dropped:
            self._options.notice(f"the context is full: the oldest {_turns(prompt.dropped)} left it")
        ask = replace(ask, max_new_tokens=prompt.room)
        async with self._model.recorder.journal.under_way(), self._reply(text, prompt, ask) as reply:
            yield reply

    @asynccontextmanager
    async def _reply(self, text: str, prompt: ChatPrompt, ask: Ask) -> AsyncGenerator[Reply, None]:
        started_at = self._model.ports.clock.monotonic()  # waiting for a draft model counts
        decided = self._decide(prompt, ask)
        request, stream, guesses = await self._request(prompt, ask, decided.plan.strategy, started_at)
        before, said = self._kept.losses, list[str]()

        def finished() -> Turn:
            return Turn(stream.result(), request.reused_tokens, prompt.dropped, self._kept.losses - before)

        try:
            with self._model.recorder.request(decided.plan) as entry:
                entry.progress = partial(progress, request, self._kept, guesses, Before.of(self._kept))
                entry.kv_tokens = self._context_tokens
                async with (
                    self._model.seat(decided.plan.strategy),
                    aclosing(_noting(stream.pieces(), said)) as pieces,
                ):
                    yield Reply(pieces, finished)
        finally:
            if said or request.ids:
                self.transcript.said(text, "".join(said), prompt.dropped)
        if request.finish_reason is not None and self._kept.losses == before:
            self._model.choosing.learn(decided, request.token_times_s)

    def _decide(self, prompt: ChatPrompt, ask: Ask) -> Decided:
        """A chat that chooses keeps to what it chose first: another strategy may need another session. So it tries
        nothing: a trial would last as long as the chat. What is expected is said, and learnt from, anew each turn."""
        if isinstance(ask.strategy, Auto):
            ask = replace(ask, strategy=replace(ask.strategy, explore=False))
        decided = self._model.decide(prompt.ids, ask, self._chosen)
        if decided.choice is not None:
            if decided.choice.over_budget and self._chosen is None:
                self._options.notice(OVER_BUDGET)
            self._chosen = decided
        return decided

    def reset(self) -> None:
        """Forget what was said, but for the system message. The KV is kept for what it is worth."""
        self.transcript.turns.clear()

    async def aclose(self) -> None:
        await self._kept.aclose()

    async def _request(
        self, prompt: ChatPrompt, ask: Ask, strategy: Strategy, started_at: float
    ) -> tuple[KeptRequest, TextStream, Speculation | None]:
        model, params = self._model, self._model.params(ask, strategy)
        if not ask.ignore_eos:
            params = replace(params, stop_ids=params.stop_ids | self._end_ids())
        host = replace(await model.host(ask, strategy, self._guessing), started_at=started_at)
        terms = self._terms_of(strategy)
        # What a session was opened with cannot be changed, the names of its pages neither; and what its KV holds is as
        # exact as it was sent.
        used = self._used
        if (terms, strategy.wire, strategy.prefix_cache) != (self._terms, used.wire, used.prefix_cache):
            await self._kept.aclose()
        self._terms, self._used = terms, strategy
        request = KeptRequest(self._kept, KeptAsk(prompt.ids, params, model.ends), host)
        stops = (*ask.stop, *self._template.stops)
        stream = TextStream(request, model.tokenizer.stream(), stops, params.stop_ids)
        return request, stream, host.speculation

    def _end_ids(self) -> frozenset[int]:
        """What ends an answer by the tokenizer's word; that may be more than what ends a text by the model's."""
        end = self._model.tokenizer.vocabulary().get(self._template.tokens.get("eos_token", ""))
        return frozenset() if end is None else frozenset({end})

    def _terms_of(self, strategy: Strategy) -> SessionTerms:
        """Part of them follows from the route."""
        return replace(self._model.terms(self._context_tokens, strategy), request=self._id)

    async def _open(self, opening: Opening) -> Opened:
        if opening.anew or self._model.broken:
            self._model = await moved_on(self._model, opening)
            self._terms = self._terms_of(self._used)
        return await self._model.opened(opening, self._terms, self._used)


async def open_chat(model: DeployedModel, options: ChatOptions) -> Chat:
    """A chat with `model`; nothing is sent before the first turn. Close it with `aclose`. Raises InputError,
    CheckpointError."""
    if options.context_tokens < 2:
        raise InputError(f"a chat needs a context of 2 tokens or more, not {options.context_tokens}")
    model = model.moves.newest or model
    template = await trio.to_thread.run_sync(ChatTemplate.open, model.checkpoint.path, datetime.now())
    return Chat(model, template, options)


def _ids(template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[ChatMessage]) -> list[int]:
    return tokenizer.encode(template.render(messages), special=not template.own)


async def _noting(pieces: AsyncGenerator[str, None], said: list[str]) -> AsyncGenerator[str, None]:
    async with aclosing(pieces):
        async for piece in pieces:
            said.append(piece)
            yield piece


def _turns(count: int) -> str:
    return "turn" if count == 1 else f"{count} turns"
