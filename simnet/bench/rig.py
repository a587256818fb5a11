"""What `sotto bench engine`, `growth` and `serve` measure with: one checkpoint in one precision, deployed as they ask,
and the opponents beside it.

Everything is opened when it is first asked for and closed with the rig. A deployment has a data folder of its own: one
client would take the route that it already holds, however many hops it was asked for.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import trio

from client.generate import GenerationResult
from models.checkpoint import Checkpoint
from node.app_client import open_client
from node.bringing import DeployOptions
from node.client import ClientOptions
from node.cores import cores
from node.keys import key_of
from node.model import Ask, DeployedModel
from protocol.errors import InputError
from protocol.strategy import Strategy
from protocol.tensors import DTYPE_BYTES
from simnet.bench.dictated import Dictated
from simnet.bench.library import Library
from simnet.bench.machine import Memory, cpu_seconds
from simnet.bench.paired import ENOUGH, Budget, Contestant, Pair, Patience, Rounds, take_turns
from simnet.bench.workloads import Request, Source

CPU_TICK_S = 0.01
LIBRARY_DTYPES = ("float32", "bfloat16")
PREFIX_NEW_TOKENS = 2  # after a prompt with a prefix in common: its first token is what is timed
CONTEXT_MIN = 64  # below, hardly anything could be measured


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured. Tests take less."""

    hops: int = 3
    batch: int = 16
    prompt_tokens: int = 64
    new_tokens: int = 32
    prefill_tokens: int = 256  # of each of `batch` prompts
    long_tokens: int = 2048
    trace_requests: int = 48
    trace_tokens_max: int = 256
    prefix_tokens: int = 768  # that prompts share
    own_tokens: int = 32  # of each of them
    memory_bytes: int = 256 << 20  # of the arrays that are read for the memory limit
    rounds_min: int = 4
    enough: float = ENOUGH

    @property
    def kv_tokens(self) -> int:
        """Room for each of `batch` sessions, so that all of any section fit."""
        long = -(-max(self.long_tokens, self.prefix_tokens + self.own_tokens) // self.batch)
        return (
            max(self.prompt_tokens + self.new_tokens, self.prefill_tokens + 1, self.trace_tokens_max, long)
            + 16
            + self.new_tokens
        )

    def within(self, context: int) -> Sizes:
        """As much of it as fits into a model's context of so many tokens. Raises InputError where that says nothing."""
        if context < CONTEXT_MIN:
            raise InputError(f"the model's context holds {context} tokens: measure one with {CONTEXT_MIN} or more")
        new, own = min(self.new_tokens, context // 4), min(self.own_tokens, context // 4)
        return replace(
            self,
            new_tokens=new,
            prompt_tokens=min(self.prompt_tokens, context - new),
            prefill_tokens=min(self.prefill_tokens, context - 1),
            long_tokens=min(self.long_tokens, context - 1),
            trace_tokens_max=min(self.trace_tokens_max, context),
            prefix_tokens=min(self.prefix_tokens, context - own - PREFIX_NEW_TOKENS),
            own_tokens=own,
        )


@dataclass(frozen=True, slots=True)
class Work:
    """Requests of one length that are there together."""

    requests: int
    prompt_tokens: int
    new_tokens: int = 1

    @property
    def quarter(self) -> Work:
        return replace(self, prompt_tokens=max(1, self.prompt_tokens // 4), new_tokens=max(1, self.new_tokens // 4))


@dataclass(frozen=True, slots=True)
class Bench:
    """What to measure with: the checkpoint, the swarm that serves it, and where files go."""

    folder: Path
    model: Path
    way_in: str
    sizes: Sizes
    budget: Budget
    say: Callable[[str], None]
    data: Path | None = None
    pids: tuple[int, ...] = ()  # the workers' processes


class Rig:
    """The checkpoint in `dtype`. Use as an async context manager."""

    def __init__(self, bench: Bench, dtype: str) -> None:
        self.bench, self.dtype, self.sizes = bench, dtype, bench.sizes
        self.checkpoint = Checkpoint.open(str(bench.model))
        self._deployed: dict[tuple[str, int], DeployedModel] = {}
        self._libraries: dict[bool, Library] = {}
        self._seeds = itertools.count()
        self._threads: dict[tuple[Work, bool], int] = {}
        self._memory: Memory | None = None
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Rig:
        await self._stack.__aenter__()
        return self

    async def __aexit__(self, *problem: object) -> None:
        await self._stack.__aexit__(*problem)  # type: ignore[arg-type]

    async def deployed(self, privacy: str = "ee", hops: int | None = None) -> DeployedModel:
        """The model over `hops` workers. Raises what deploying raises."""
        hops = self.sizes.hops if hops is None else hops
        if (privacy, hops) not in self._deployed:
            self.bench.say(f"{self.dtype}: sealing and deploying, {privacy}, {hops} hops")
            folder = self.bench.folder / f"{self.dtype}-{privacy}-{hops}"
            client = await self._stack.enter_async_context(
                open_client(ClientOptions(folder, (self.bench.way_in,), origin="bench"))
            )
            key = key_of(privacy, None, folder)
            room = DeployOptions(hops_min=hops, concurrency=self.sizes.batch, kv_tokens=self.sizes.kv_tokens)
            self._deployed[privacy, hops] = await client.bring(self.checkpoint, self.dtype, key, room)
        return self._deployed[privacy, hops]

    async def library(self, same_kernel: bool = False) -> Library:
        """transformers on the same checkpoint; with our product of weights in this precision."""
        if same_kernel not in self._libraries:
            product = self.dtype if same_kernel else None
            made = partial(Library, self.bench.model, self.library_dtype, product)
            self._libraries[same_kernel] = await trio.to_thread.run_sync(made)
        return self._libraries[same_kernel]

    async def memory_gb_per_s(self) -> float:
        """A contestant's turn: the memory limit of one thread."""
        if self._memory is None:
            self._memory = Memory(self.sizes.memory_bytes)
        return await trio.to_thread.run_sync(self._memory.gb_per_s)

    async def rounds(self, contestants: dict[str, Contestant], pairs: list[Pair]) -> Rounds:
        """Turns until `pairs` are known, or this set's share of the time is over."""
        torch.set_num_threads(1)
        patience = Patience(self.bench.budget.next(), self.sizes.enough, self.sizes.rounds_min)
        return await take_turns(contestants, patience, self.bench.say, pairs)

    async def metered_rounds(
        self, contestants: dict[str, Contestant], pairs: list[Pair], tokens: int
    ) -> tuple[Rounds, Rounds]:
        """`rounds`, and beside them tokens per second of processor time, of this process and all workers together:
        what a busy machine changes least. A turn is of so many new `tokens`."""
        costs: dict[str, list[float]] = {name: [] for name in contestants}

        def metered(name: str, run: Contestant) -> Contestant:
            async def turn() -> float:
                before = cpu_seconds(self.bench.pids)
                rate = await run()
                costs[name].append(tokens / max(CPU_TICK_S, cpu_seconds(self.bench.pids) - before))
                return rate

            return turn

        rounds = await self.rounds({name: metered(name, run) for name, run in contestants.items()}, pairs)
        counted = len(next(iter(rounds.rates.values())))  # the round that warms up does not count
        return rounds, Rounds({name: values[-counted:] for name, values in costs.items()})

    def source(self) -> Source:
        """Where requests come from, another one each time: what the workers have seen they may still hold."""
        return Source(next(self._seeds), self.checkpoint.config.vocab_size, self.bench.data)

    def prompts(self, count: int, tokens: int) -> list[list[int]]:
        """Prompts of one length that nobody has seen before."""
        source = self.source()
        rng = source.rng("prompts")
        return [list(source.ids(rng, tokens)) for _ in range(count)]

    @property
    def library_dtype(self) -> str:
        """What transformers computes in: this precision, or float32 where it has none such."""
        return self.dtype if self.dtype in LIBRARY_DTYPES else "float32"

    def bytes_per_token(self, dtype: str) -> int:
        """Weights that a token at batch 1 reads: all blocks and the head, in `dtype`."""
        config = self.checkpoint.config
        blocks = sum(block.num_parameters for block in config.blocks)
        return DTYPE_BYTES[dtype] * (blocks + config.vocab_size * config.hidden_size)

    @property
    def kv_bytes_per_token(self) -> int:
        """What keys and values of a token take in all blocks, in the dtype that they are computed in."""
        return DTYPE_BYTES[self.library_dtype] * sum(
            block.kv_values_per_token for block in self.checkpoint.config.blocks
        )

    async def library_threads(self, work: Work, same_kernel: bool = False) -> int:
        """What transformers gets against all workers together: as many threads as they have, no more than there are
        cores; or one, where that does this work faster (few rows, or a busy machine, where threads that wait for each
        other lose much more than they win). Tried once, on a quarter of each request."""
        counts = sorted({1, min(self.sizes.hops, cores())})
        if (work, same_kernel) not in self._threads:
            library, short = await self.library(same_kernel), work.quarter
            prompts = self.prompts(short.requests, short.prompt_tokens)
            tried = partial(_fastest_threads, library, prompts, short.new_tokens, counts)
            self._threads[work, same_kernel] = await trio.to_thread.run_sync(tried)
        return self._threads[work, same_kernel]

    async def threads(self, work: Work) -> dict[str, int]:
        """Of everybody who computes, in one process or several."""
        return {
            "workers": self.sizes.hops,
            "client": 1,
            "transformers": await self.library_threads(work),
            "transformers_same_kernel": await self.library_threads(work, same_kernel=True),
        }

    @property
    def weights(self) -> dict[str, str]:
        """In which precision the opponents' products have their weights."""
        return {"transformers": self.library_dtype, "transformers_same_kernel": self.dtype}


def _fastest_threads(library: Library, prompts: list[list[int]], new_tokens: int, counts: list[int]) -> int:
    if len(counts) == 1:
        return counts[0]
    rates = dict.fromkeys(counts, 0.0)
    for order in (counts, counts[::-1], counts):  # the first of them warms up, too
        for threads in order:
            rates[threads] = max(rates[threads], library.generate(prompts, new_tokens, threads))
    return max(counts, key=lambda threads: rates[threads])


def in_thread(work: Callable[[], float]) -> Contestant:
    """A contestant that computes in this process, beside the event loop."""
    return lambda: trio.to_thread.run_sync(work)


async def answer(model: DeployedModel, request: Request, strategy: Strategy | None = None) -> GenerationResult:
    """The whole answer to a request, of the length that it asks for, and dictated where it says what comes out."""
    ask = Ask(request.new_tokens, ignore_eos=True, strategy=strategy or model.default_strategy)
    if request.output:
        ask = replace(ask, choose=Dictated(len(request.prompt), request.output).choose)
    return await model.generate(list(request.prompt), ask)


async def together(
    model: DeployedModel, prompts: list[list[int]], new_tokens: int, strategy: Strategy | None = None
) -> float:
    """New tokens per second of all `prompts` at once, from the first one's start to the last one's end."""
    asked, started = Ask(new_tokens, ignore_eos=True, strategy=strategy or model.default_strategy), time.perf_counter()
    async with trio.open_nursery() as nursery:
        for prompt in prompts:
            nursery.start_soon(model.generate, prompt, asked)
    return len(prompts) * new_tokens / (time.perf_counter() - started)


def decoding(rig: Rig, model: DeployedModel) -> Contestant:
    """Tokens per second after the first, one request."""

    async def turn() -> float:
        (prompt,) = rig.prompts(1, rig.sizes.prompt_tokens)
        asked = Ask(rig.sizes.new_tokens, ignore_eos=True, strategy=model.default_strategy)
        return (await model.generate(prompt, asked)).tokens_per_second

    return turn


def prefilling(rig: Rig, model: DeployedModel, count: int, tokens: int) -> Contestant:
    """Prompt tokens per second of `count` prompts at once, until each has its first token."""

    async def turn() -> float:
        return await together(model, rig.prompts(count, tokens), 1) * tokens

    return turn


def cpu_figures(cpu: Rounds, name: str) -> dict[str, object]:
    """Of `metered_rounds`: processor time for each token, and the ratio to transformers (above 1: we take less)."""
    return {
        f"{name}_cpu_vs_transformers": cpu.ratio("sealed", "transformers").figures(),
        "cpu_ms_per_token": {rival: round(1000 / cpu.median(rival), 3) for rival in cpu.rates if "memory" not in rival},
    }


Section = Callable[[Rig], Awaitable[dict[str, object]]]
