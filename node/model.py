"""A deployed model at the client: prompts in, text out, over a route of workers.

One session per request: opened before the first token, closed after the last, whatever happens between. It holds the
model's ends and the tokenizer, which never leave this process.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import trio

from client.deploy import DeployedHop
from client.driver import Driver
from client.generate import (
    Generation,
    GenerationHost,
    GenerationParams,
    GenerationResult,
    RunSync,
    inline,
    kv_tokens_for,
)
from client.placement import Placement
from client.placement.needs import Objective
from client.ports import ClientPorts
from client.routing import Route
from client.session import RouteSession, SessionTerms
from client.speculation import Speculation
from client.text import TextStream
from client.tracing import StepTrace, TraceReport, report
from equivariant.ends import ClientEnds
from models.checkpoint import Checkpoint
from models.config import ModelConfig
from models.sampling import SamplingParams
from models.tokenizer import Tokenizer
from node.draft import Draft
from node.guessing import Guessing
from node.recording import Plan, Progress, Recorder
from protocol import limits
from protocol.errors import InputError
from protocol.strategy import CHOICES, DEFAULT, Facts, Strategy, infeasible, parse

T = TypeVar("T")
# What a Strategy can say and this version cannot do yet.
MISSING = frozenset(
    {"batching=static", "batching=off", "deterministic=true", "weights=int4"}
    | {f"micro_batches={count}" for count in range(2, limits.MICRO_BATCHES_MAX + 1)}
)
INLINE_WEIGHTS_MAX = 2 << 20  # below this a head takes under a millisecond, less than handing it to a thread


@dataclass(frozen=True, slots=True)
class Ask:
    """What a user asks for besides the prompt. `stop`: strings that end the answer and are not part of it.
    `strategy`: None for the deployment's default. `exact`: refuse one that loses precision. `objective`: the time of
    this request, or the rate of all that run beside it. `trace`: keep account of where the time goes."""

    max_new_tokens: int = 64
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    strategy: Strategy | None = None
    exact: bool = False
    trace: bool = False
    objective: Objective = "latency"


class Answer:
    """One request under way. Iterate `pieces` once; `result` is there afterwards."""

    def __init__(
        self, stream: TextStream, pieces: AsyncGenerator[str, None], trace: Callable[[], TraceReport] | None
    ) -> None:
        self._stream = stream
        self._trace = trace
        self.pieces = pieces

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
    """Made by app_client.Client.deploy."""

    ports: ClientPorts
    driver: Driver
    route: Route
    hops: tuple[DeployedHop, ...]  # as deployed now; () when the workers held the model already
    predicted: Placement  # what the route should take, by the adverts that it was chosen from
    ends: ClientEnds
    tokenizer: Tokenizer
    config: ModelConfig
    dtype: str | None  # of the sealed blocks; None when another's deployment does not say
    recorder: Recorder
    checkpoint: Checkpoint
    draft: Draft
    deploy_again: Callable[[], Awaitable[DeployedModel]]  # over workers that are there now

    @asynccontextmanager
    async def ask(self, prompt: str | list[int], ask: Ask | None = None) -> AsyncGenerator[Answer, None]:
        """A request over a session of its own. Raises InputError before anything is sent when it cannot fit."""
        ask = ask or Ask()
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        kv_tokens = kv_tokens_for(len(ids), ask.max_new_tokens, self.config.max_position)
        params = self.params(ask)
        host = await self.host(ask, self.guessing())
        with self.recorder.request(ids, self.plan(ask)) as entry:
            trace = StepTrace() if ask.trace else None
            async with self.driver.session(self.route, SessionTerms(kv_tokens, trace=trace)) as session:
                generation = Generation(session, self.ends, ids, params, host)
                entry.progress = partial(_progress, session, generation, host.speculation)
                stream = TextStream(generation, self.tokenizer.stream(), ask.stop)
                async with aclosing(stream.pieces()) as pieces:
                    yield Answer(stream, pieces, partial(self._report, trace, len(ids)) if trace else None)

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

    def strategy(self, ask: Ask) -> Strategy:
        """What `ask` asks for. Raises InputError when it cannot be used here, with the reason."""
        strategy = ask.strategy or self.default_strategy
        facts = Facts(
            hops=len(self.route.hops),
            exact=ask.exact,
            deployed=self.dtype,
            draft_model=self.draft.found,
            missing=MISSING,
        )
        reason = infeasible(strategy, facts)
        if reason is not None:
            raise InputError(reason)
        return strategy

    def params(self, ask: Ask) -> GenerationParams:
        """Raises InputError, as `strategy` does."""
        strategy = self.strategy(ask)
        return GenerationParams(
            max_new_tokens=ask.max_new_tokens,
            sampling=ask.sampling,
            stop_ids=frozenset() if ask.ignore_eos else frozenset(self.config.eos_ids),
            prefill_chunk=strategy.prefill_chunk,
            wire_dtype=strategy.wire,
        )

    def guessing(self) -> Guessing:
        """What guesses for one request, or for one after the other."""
        return Guessing(self.draft, self.config.vocab_size, self.ports.clock)

    async def host(self, ask: Ask, guessing: Guessing) -> GenerationHost:
        """What one generation needs. Raises InputError, ModelError when there is no draft model that fits."""
        speculation = await guessing.of(self.strategy(ask), ask.sampling)
        return GenerationHost(self.ports.clock, self.run_sync, self.ports.observer, speculation)

    def _report(self, trace: StepTrace, prompt_tokens: int) -> TraceReport:
        return report(trace, prompt_tokens, self.route, self.recorder.route().leg_rtt_ms)

    def plan(self, ask: Ask) -> Plan:
        """`ask` as the history has it. Raises InputError, as `strategy` does."""
        strategy = self.strategy(ask)
        return Plan(
            max_new_tokens=ask.max_new_tokens,
            temperature=ask.sampling.temperature,
            objective=ask.objective,
            exact=ask.exact,
            strategy=strategy,
            chosen_by="default" if strategy == self.default_strategy else "user",
        )

    def session(self, kv_tokens: int) -> AbstractAsyncContextManager[RouteSession]:
        """A session of its own over the route, for those who do the steps themselves."""
        return self.driver.session(self.route, SessionTerms(kv_tokens))

    @property
    def run_sync(self) -> RunSync:
        return inline if self.ends.head.in_features * self.ends.head.out_features <= INLINE_WEIGHTS_MAX else _in_thread


def _progress(session: RouteSession, generation: Generation, guesses: Speculation | None) -> Progress:
    return Progress(
        times_s=tuple(generation.token_times_s),
        finish=generation.finish_reason or "",
        bytes_out=session.bytes_out,
        bytes_in=session.bytes_in,
        drafted=guesses.drafted if guesses else 0,
        accepted=guesses.accepted if guesses else 0,
    )


async def _in_thread(function: Callable[[], T], /) -> T:
    return await trio.to_thread.run_sync(function)
