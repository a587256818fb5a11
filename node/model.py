"""A deployed model at the client: prompts in, text out, over a route of workers.

One session per request: opened before the first token, closed after the last, whatever happens between. It holds the
model's ends and the tokenizer, which never leave this process.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import dataclass, field
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
from client.ports import ClientPorts
from client.routing import Route
from client.session import RouteSession, SessionTerms
from client.text import TextStream
from equivariant.ends import ClientEnds
from models.checkpoint import Checkpoint
from models.config import ModelConfig
from models.sampling import SamplingParams
from models.tokenizer import Tokenizer
from node.draft import Draft
from node.guessing import SPECULATION, Guessing
from protocol.errors import InputError

T = TypeVar("T")
INLINE_WEIGHTS_MAX = 2 << 20  # below this a head takes under a millisecond, less than handing it to a thread


@dataclass(frozen=True, slots=True)
class Ask:
    """What a user asks for besides the prompt. `stop`: strings that end the answer and are not part of it.
    `speculation`: guess at tokens ("lookup": from what the text held before; "draft": by a draft model, too); the
    answer is the same. Raises InputError."""

    max_new_tokens: int = 64
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    speculation: str = "off"

    def __post_init__(self) -> None:
        if self.speculation not in SPECULATION:
            raise InputError(f"speculation must be one of {', '.join(SPECULATION)}, not {self.speculation!r}")


class Answer:
    """One request under way. Iterate `pieces` once; `result` is there afterwards."""

    def __init__(self, stream: TextStream, pieces: AsyncGenerator[str, None]) -> None:
        self._stream = stream
        self.pieces = pieces

    @property
    def result(self) -> GenerationResult:
        """Raises ValueError before `pieces` has ended."""
        return self._stream.result()


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
        async with self.session(kv_tokens) as session:
            generation = Generation(session, self.ends, ids, params, host)
            stream = TextStream(generation, self.tokenizer.stream(), ask.stop)
            async with aclosing(stream.pieces()) as pieces:
                yield Answer(stream, pieces)

    async def generate(
        self, prompt: str | list[int], ask: Ask | None = None, on_piece: Callable[[str], None] = lambda _: None
    ) -> GenerationResult:
        """The whole answer; `on_piece` sees it as it comes."""
        async with self.ask(prompt, ask) as answer:
            async for piece in answer.pieces:
                on_piece(piece)
        return answer.result

    def params(self, ask: Ask) -> GenerationParams:
        return GenerationParams(
            max_new_tokens=ask.max_new_tokens,
            sampling=ask.sampling,
            stop_ids=frozenset() if ask.ignore_eos else frozenset(self.config.eos_ids),
        )

    def guessing(self) -> Guessing:
        """What guesses for one request, or for one after the other."""
        return Guessing(self.draft, self.config.vocab_size, self.ports.clock)

    async def host(self, ask: Ask, guessing: Guessing) -> GenerationHost:
        """What one generation needs. Raises InputError, ModelError when there is no draft model that fits."""
        speculation = await guessing.of(ask.speculation, ask.sampling)
        return GenerationHost(self.ports.clock, self.run_sync, self.ports.observer, speculation)

    def session(self, kv_tokens: int) -> AbstractAsyncContextManager[RouteSession]:
        """A session of its own over the route, for those who do the steps themselves."""
        return self.driver.session(self.route, SessionTerms(kv_tokens))

    @property
    def run_sync(self) -> RunSync:
        return inline if self.ends.head.in_features * self.ends.head.out_features <= INLINE_WEIGHTS_MAX else _in_thread


async def _in_thread(function: Callable[[], T], /) -> T:
    return await trio.to_thread.run_sync(function)
