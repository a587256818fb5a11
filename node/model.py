"""A deployed model at the client: prompts in, text out, over a route of workers.

One session per request: opened before the first token, closed after the last, whatever happens between, and opened
again when workers preempt it or, where that is asked for, are lost. It holds the model's ends and the tokenizer, which
never leave this process.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple, TypeVar

import trio

from client.batches import Batches
from client.deploy import DeployedHop
from client.driver import Driver
from client.generate import (
    Choose,
    GenerationHost,
    GenerationParams,
    GenerationResult,
    kv_tokens_for,
)
from client.head_batches import HeadBatches
from client.kept import LOSSES_MAX, KeptAsk, KeptRequest, KeptSession, KeptTerms, Opened, Opening
from client.metalearning.price import Goal, Money
from client.page_keys import PageKeys, page_context
from client.placement import Placement
from client.ports import ClientPorts
from client.routing import Route
from client.session import RouteSession, SessionTerms
from client.speculation import Costs, Speculation
from client.text import TextStream
from client.tracing import StepTrace, TraceReport, report
from equivariant.ends import ClientEnds
from models.checkpoint import Checkpoint
from models.config import ModelConfig
from models.precision import compute_dtype
from models.sampling import SamplingParams, sample
from models.tokenizer import Tokenizer
from node.choosing import Choosing, Decided, Wanted
from node.draft import Draft, Guessing
from node.moves import Moves
from node.recording import Plan, Progress, Recorder
from protocol import limits
from protocol.errors import InputError, Refused, RouteUnavailable
from protocol.ids import ID_BYTES, PeerId
from protocol.strategy import CHOICES, DEFAULT, Auto, Facts, Strategy, infeasible, parse

T = TypeVar("T")
# What a Strategy can say and this version cannot do yet.
MISSING = frozenset({"weights=int4"})
# Of a head's weights, times rows, on the event loop: 10 ms at most, for which a lone request does better without a
# thread. At few rows it is bytes that cost, not products.
INLINE_BYTES_MAX = 256 << 20

# Characters of a prompt that become tokens on the event loop: half a millisecond, of which a thread takes a fifth.
ENCODED_INLINE_MAX = 2000

NO_TRIALS = Auto(explore=False)


@dataclass(frozen=True, slots=True)
class Ask:
    """What a user asks for besides the prompt. `stop`: strings that end the answer and are not part of it.
    `strategy`: the one to use, or how to choose one. `exact`: refuse one that loses precision. `objective`: the time of
    this request, the rate of all that run beside it, or the price. `money`: what workers cost, and the answer may.
    `concurrency`: requests that the caller keeps under way, this one included. `recover`: when workers are lost, go on
    over others, which may take as long as a deployment; else that is an error, at once. `trace`: keep account of where
    the time goes. `choose`: how a token is chosen; benchmarks dictate answers. `notice` is told, in a sentence, why the
    request waits or begins anew; in a chat the chat's is."""

    max_new_tokens: int = 64
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    strategy: Strategy | Auto = NO_TRIALS
    exact: bool = False
    recover: bool = False
    trace: bool = False
    objective: Goal = "latency"
    money: Money | None = None
    concurrency: int = 1
    choose: Choose = sample
    notice: Callable[[str], None] = lambda _: None


class Answer:
    """One request under way. Iterate `pieces` once; `result` is there afterwards."""

    def __init__(
        self,
        stream: TextStream,
        pieces: AsyncGenerator[str, None],
        trace: Callable[[], TraceReport] | None,
        decided: Decided,
    ) -> None:
        self._stream = stream
        self._trace = trace
        self.pieces = pieces
        self.decided = decided

    @property
    def result(self) -> GenerationResult:
        """Raises ValueError before `pieces` has ended."""
        return self._stream.result()

    @property
    def trace(self) -> TraceReport | None:
        """Where the time of the steps so far went, if that was asked for."""
        return self._trace() if self._trace is not None else None


@dataclass(frozen=True, slots=True)
class DeployedModel:
    """Made by node.client.Client.deploy."""

    ports: ClientPorts
    driver: Driver
    route: Route
    hops: tuple[DeployedHop, ...]  # as deployed now; () when the workers held the model already
    predicted: Placement  # what the route should take, by the adverts that it was chosen from
    ends: ClientEnds
    page_secret: bytes
    tokenizer: Tokenizer
    config: ModelConfig
    dtype: str  # of the sealed blocks
    recorder: Recorder
    checkpoint: Checkpoint
    draft: Draft
    deploy_again: Callable[[frozenset[PeerId]], Awaitable[DeployedModel]]  # on workers of now, past those if possible
    head_batches: HeadBatches  # of all requests here
    guess_costs: Costs  # what their guesses cost
    batches: Batches  # of those with batching=static
    choosing: Choosing
    moves: Moves[DeployedModel]
    has_moved: bool = False  # to this route from another

    @asynccontextmanager
    async def ask(self, prompt: str | list[int], ask: Ask | None = None) -> AsyncGenerator[Answer, None]:
        """A request over a session of its own. Raises InputError, ModelError before anything is sent when it
        cannot fit, or is no text. The session is opened, and may fail, when `pieces` are asked for."""
        ask = ask or Ask()
        async with self.recorder.journal.under_way():
            ids = await self._encoded(prompt) if isinstance(prompt, str) else prompt
            model = self.moves.newest or self
            async with model._answer(ids, ask) as answer:
                yield answer

    async def _encoded(self, prompt: str) -> list[int]:
        if len(prompt) <= ENCODED_INLINE_MAX:
            return self.tokenizer.encode(prompt)
        return await trio.to_thread.run_sync(self.tokenizer.encode, prompt)

    @asynccontextmanager
    async def _answer(self, ids: list[int], ask: Ask) -> AsyncGenerator[Answer, None]:
        # Waiting for a choice, a draft model, a batch and a session counts.
        started_at = self.ports.clock.monotonic()
        kv_tokens = kv_tokens_for(len(ids), ask.max_new_tokens, self.config.max_position)
        decided = self.decide(ids, ask)
        strategy = decided.plan.strategy
        params, host = self.params(ask, strategy), await self.host(ask, strategy, self.guessing())
        host = replace(host, started_at=started_at)
        trace = StepTrace() if ask.trace else None
        way = _Way(self, kv_tokens, strategy, trace, ask.recover)
        terms = KeptTerms(LOSSES_MAX if ask.recover else 0, ask.notice, refusals=False)
        kept = KeptSession(way.opened, terms, self.ports.violations)
        request = KeptRequest(kept, KeptAsk(ids, params, self.ends), host)
        stream = TextStream(request, self.tokenizer.stream(), ask.stop, params.stop_ids)
        report = partial(_report, trace, request, kept, way) if trace else None
        with self.recorder.request(decided.plan) as entry:
            entry.progress = partial(progress, request, kept, host.speculation, Before())
            entry.kv_tokens = kv_tokens
            async with self.seat(strategy):
                try:
                    async with aclosing(stream.pieces()) as pieces:
                        yield Answer(stream, pieces, report, decided)
                finally:
                    await kept.aclose()
        if request.finish_reason is not None and not kept.losses:
            self.choosing.learn(decided, request.token_times_s)

    async def moved(self, without: frozenset[PeerId]) -> DeployedModel:
        """The model over the route that its requests move to, past the workers `without` where there are others.
        Raises what a deployment raises."""

        async def found(left: DeployedModel) -> DeployedModel:
            return left.succeeded_by(await left.deploy_again(without))

        violations = self.ports.violations.copy()
        model = await self.moves.instead_of(self, without, found)
        self.moves.passed(violations)
        return model

    @property
    def broken(self) -> bool:
        """A worker of the route has broken the protocol, so that requests begin over another where they can."""
        return self.moves.broken(self.route, self.ports.violations)

    def succeeded_by(self, found: DeployedModel) -> DeployedModel:
        """`found` with what the client holds of the model here: it is in memory once, and static requests have one
        gate."""
        return replace(
            found,
            has_moved=True,
            moves=self.moves,
            ends=self.ends,
            head_batches=self.head_batches,
            batches=self.batches,
            draft=self.draft,
            tokenizer=self.tokenizer,
        )

    async def opened(self, opening: Opening, terms: SessionTerms, strategy: Strategy) -> Opened:
        """A session over this route for a request with `strategy`. Raises SottoError."""
        page_keys = self.page_keys(strategy)
        keys = page_keys(opening.known[:-1])  # the last token is always computed
        named = opening.known[: len(keys) // limits.PAGE_KEY_BYTES * limits.PAGE_TOKENS]
        terms = replace(terms, page_keys=keys, times=opening.times)
        return Opened(await self.driver.open_session(self.route, terms), page_keys, named)

    def seat(self, strategy: Strategy) -> AbstractAsyncContextManager[None]:
        """The block is a request with `strategy`: a static one begins with its batch."""
        return self.batches.seat() if strategy.batching == "static" else nullcontext()

    async def generate(
        self, prompt: str | list[int], ask: Ask | None = None, on_piece: Callable[[str], None] = lambda _: None
    ) -> GenerationResult:
        """The whole answer; `on_piece` sees it as it comes."""
        async with self.ask(prompt, ask) as answer:
            async for piece in answer.pieces:
                on_piece(piece)
        return answer.result

    @property
    def default_strategy(self) -> Strategy:
        """The default with the weights that this deployment has."""
        return parse(f"weights={self.dtype}") if self.dtype in CHOICES["weights"] else DEFAULT

    def decide(self, ids: Sequence[int], ask: Ask, kept: Decided | None = None) -> Decided:
        """The strategy of a request with the prompt `ids`: the one that `ask` names, or the best by what is known. Who
        has it chosen keeps to what was `kept`, while that is possible.

        Raises InputError when the named one cannot be used here, or none can, with the reason, and when the model does
        not know one of `ids`.
        """
        self._require_known(ids)
        wish = (ask.max_new_tokens, ask.sampling.temperature, ask.objective, ask.exact)
        recorder = self.recorder
        task = recorder.task(ids, *wish)
        task = replace(
            task,
            concurrency=max(task.concurrency, ask.concurrency),
            guess_us=self.draft.guess_us,
            agreement=self.draft.agreement.rate,
        )
        named = None if isinstance(ask.strategy, Auto) else ask.strategy
        facts = Facts(
            hops=len(self.route.hops),
            exact=ask.exact,
            deployed=self.dtype,
            draft_model=self.draft.found if named is not None else self.draft.ready is not None,
            missing=MISSING,
        )
        if named is not None and facts.hops == 1 and self.has_moved:  # there were more when it was named
            named = replace(named, micro_batches=0)
        reason = infeasible(named or self.default_strategy, facts)
        if reason is not None:
            raise InputError(reason)
        if isinstance(ask.strategy, Auto):
            weights = self.default_strategy.weights
            wanted = Wanted(
                name=recorder.subject.name,
                model=recorder.model(),
                route=recorder.route(),
                task=task,
                facts=facts,
                weights=weights,
                how=ask.strategy,
                token_s=self.predicted.predicted_ms_per_token / 1000,
                money=ask.money,
                kept=kept,
            )
            return self.choosing.decide(wanted)
        assert named is not None
        chosen_by = "default" if named == self.default_strategy else "user"
        return Decided(Plan(task, named, chosen_by, money=ask.money))

    def _require_known(self, ids: Sequence[int]) -> None:
        known = self.config.vocab_size
        unknown = next((token for token in ids if not 0 <= token < known), None)
        if unknown is not None:
            raise InputError(
                f"the prompt has token {unknown}, and the model knows 0 to {known - 1}: leave it out, or use the "
                "tokenizer that belongs to the model"
            )

    def params(self, ask: Ask, strategy: Strategy) -> GenerationParams:
        return GenerationParams(
            max_new_tokens=ask.max_new_tokens,
            sampling=ask.sampling,
            stop_ids=frozenset() if ask.ignore_eos else frozenset(self.config.eos_ids),
            prefill_chunk=strategy.prefill_chunk,
            wire_dtype=wire_of(strategy, self.dtype),
        )

    def guessing(self) -> Guessing:
        """What guesses for one request, or for one after the other."""

        def beside() -> int:
            return max(1, self.recorder.journal.running)

        return Guessing(self.draft, self.config.vocab_size, self.ports.clock, self.guess_costs, beside)

    async def host(self, ask: Ask, strategy: Strategy, guessing: Guessing) -> GenerationHost:
        """What one generation needs. Raises InputError, ModelError when there is no draft model that fits."""
        speculation = await guessing.of(strategy, ask.sampling)
        batches = self.head_batches
        if strategy.deterministic:
            batches = HeadBatches(self.ends, in_thread, apart=True)
        return GenerationHost(self.ports.clock, in_thread, self.ports.observer, speculation, ask.choose, batches)

    def terms(self, kv_tokens: int, strategy: Strategy) -> SessionTerms:
        """What a session of a request with `strategy` is opened with."""
        shares = strategy.batching != "off" and not strategy.deterministic
        suited = shares and not strategy.micro_batches  # to the route
        return SessionTerms(
            kv_tokens,
            deterministic=strategy.deterministic,
            alone=strategy.batching == "off",
            micro_batches=self.predicted.micro_batches if suited else strategy.micro_batches or 1,
            micro_batch_min=self.predicted.micro_batch_min if suited else 1,
            request=self.ports.entropy(ID_BYTES),
        )

    def page_keys(self, strategy: Strategy) -> Callable[[Sequence[int]], bytes]:
        """Names the pages of a sequence of tokens on this route; all the same, nothing, where `strategy` keeps none."""
        if not strategy.prefix_cache:
            return lambda _: b""
        return PageKeys(self.page_secret, page_context(self.route, strategy.wire, strategy.deterministic)).of

    def session(self, kv_tokens: int) -> AbstractAsyncContextManager[RouteSession]:
        """A session of its own over the route, for those who do the steps themselves."""
        return self.driver.session(self.route, SessionTerms(kv_tokens))


@dataclass(slots=True)
class _Way:
    """Where one request goes: over `model`'s route, or the one that it has moved to."""

    model: DeployedModel
    kv_tokens: int
    strategy: Strategy
    trace: StepTrace | None
    recover: bool
    _request: bytes = field(init=False)

    def __post_init__(self) -> None:
        self._request = self.model.ports.entropy(ID_BYTES)

    async def opened(self, opening: Opening) -> Opened:
        """A session for the request. What a worker keeps of it is found by page keys, after a preemption too. Raises
        SottoError; RouteUnavailable where there is nothing to move to."""
        if self.recover and (opening.anew or self.model.broken):
            self.model = await moved_on(self.model, opening)
        if self.trace is not None:
            self.trace.begin()
        terms = self.model.terms(self.kv_tokens, self.strategy)
        return await self.model.opened(opening, replace(terms, trace=self.trace, request=self._request), self.strategy)


async def moved_on(model: DeployedModel, opening: Opening) -> DeployedModel:
    """The model over the route that `opening` is to go over. Raises RouteUnavailable where there is none."""
    try:
        return await model.moved(opening.without)
    except (InputError, Refused) as error:  # not for what this request asks
        raise RouteUnavailable(f"workers were lost, and no others could take their place: {error}") from error


def _report(trace: StepTrace, request: KeptRequest, kept: KeptSession, way: _Way) -> TraceReport:
    rtts_ms = way.model.recorder.route().leg_rtt_ms
    return replace(report(trace, request.prompt_tokens, way.model.route, rtts_ms), preemptions=kept.preemptions)


def wire_of(strategy: Strategy, dtype: str) -> str:
    """What activations leave this client in: what the first hop rounds them to at once, or what was asked for."""
    return compute_dtype(dtype) if strategy.wire == "float32" else strategy.wire


def head_batches_of(ends: ClientEnds) -> HeadBatches:
    """Few rows are computed where they are, many in a thread."""
    return HeadBatches(ends, in_thread, INLINE_BYTES_MAX // ends.head.weight_bytes)


class Before(NamedTuple):
    """What a kept session had done when a request began. Bytes of activations."""

    out: int = 0
    in_: int = 0
    preemptions: int = 0
    losses: int = 0

    @classmethod
    def of(cls, kept: KeptSession) -> Before:
        return cls(*kept.moved, kept.preemptions, kept.losses)


def progress(request: KeptRequest, kept: KeptSession, guesses: Speculation | None, before: Before) -> Progress:
    """What a request came to, for its record."""
    out, in_, preemptions, losses = Before.of(kept)
    return Progress(
        times_s=request.token_times_s,
        finish=request.finish_reason or "",
        bytes_out=out - before.out,
        bytes_in=in_ - before.in_,
        drafted=guesses.drafted if guesses else 0,
        accepted=guesses.accepted if guesses else 0,
        prefix_tokens=request.reused_tokens,
        preemptions=preemptions - before.preemptions,
        losses=losses - before.losses,
    )


async def in_thread(function: Callable[[], T], /) -> T:
    """RunSync."""
    return await trio.to_thread.run_sync(function)
