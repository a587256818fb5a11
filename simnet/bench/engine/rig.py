"""What the sections of `sotto bench engine` measure with: one checkpoint in one precision, deployed as they ask, and
the opponents beside it.

Everything is opened when it is first asked for and closed with the rig. A deployment has a data folder of its own: one
client would take the route that it already holds, however many hops it was asked for.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import trio

from client.generate import GenerationResult
from models.checkpoint import Checkpoint
from node.app_client import open_client
from node.client import ClientOptions, DeployOptions
from node.cores import cores
from node.keys import default_key
from node.model import Ask, DeployedModel
from protocol.strategy import Strategy
from protocol.tensors import DTYPE_BYTES
from simnet.bench.dictated import Dictated
from simnet.bench.library import Library
from simnet.bench.machine import Memory, cpu_seconds
from simnet.bench.paired import Contestant, Pair, Patience, Rounds, take_turns
from simnet.bench.workloads import Request, Source

CPU_TICK_S = 0.01
LIBRARY_DTYPES = ("float32", "bfloat16")


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
    enough: float = 0.03

    @property
    def kv_tokens(self) -> int:
        """Room for each of `batch` sessions, so that all of any section fit."""
        long = -(-max(self.long_tokens, self.prefix_tokens + self.own_tokens) // self.batch)
        return (
            max(self.prompt_tokens + self.new_tokens, self.prefill_tokens + 1, self.trace_tokens_max, long)
            + 16
            + self.new_tokens
        )


@dataclass(slots=True)
class Budget:
    """Time for so many sets of rounds; what one leaves over is the others'."""

    seconds: float
    sets: int
    started: float = field(default_factory=time.monotonic)
    _set: tuple[float, float] = (0.0, 0.0)  # when the newest began, and its seconds

    def next(self) -> float:
        """Seconds for the next set."""
        now = time.monotonic()
        left = max(0.0, self.seconds - (now - self.started))
        self.sets = max(1, self.sets)
        self.sets -= 1
        self._set = now, left / (self.sets + 1)
        return self._set[1]

    def end(self) -> None:
        """The newest set is over."""
        self._set = (0.0, 0.0)

    def share(self) -> float:
        """Of the time of the set under way, how much is over: 0 to 1; 0 where none is."""
        began, seconds = self._set
        return min(1.0, (time.monotonic() - began) / seconds) if seconds > 0 else 0.0


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
        self._libraries: dict[tuple[str, bool], Library] = {}
        self._seeds = itertools.count()
        self._threads: dict[int, int] = {}
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
            key = default_key(folder) if privacy == "ee" else None
            sealed = await client.seal(self.checkpoint, self.dtype, key, lambda *_: None)
            room = DeployOptions(hops_min=hops, concurrency=self.sizes.batch, kv_tokens=self.sizes.kv_tokens)
            self._deployed[privacy, hops] = await client.deploy(sealed, room)
        return self._deployed[privacy, hops]

    async def library(self, same_kernel: bool = False) -> Library:
        """transformers on the same checkpoint."""
        dtype = self.library_dtype
        if (dtype, same_kernel) not in self._libraries:
            made = partial(Library, self.bench.model, dtype, same_kernel)
            self._libraries[dtype, same_kernel] = await trio.to_thread.run_sync(made)
        return self._libraries[dtype, same_kernel]

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

    async def library_threads(self, batch: int) -> int:
        """What transformers gets against all workers together: as many threads as they have, no more than there are
        cores; or one, where that is faster (few rows, or a busy machine, where threads that wait for each other lose
        much more than they win)."""
        most = min(self.sizes.hops, cores())
        if batch not in self._threads:
            library, prompts = await self.library(), self.prompts(batch, 32)
            tried = partial(_fastest_threads, library, prompts, sorted({1, most}))
            self._threads[batch] = await trio.to_thread.run_sync(tried)
        return self._threads[batch]


def _fastest_threads(library: Library, prompts: list[list[int]], counts: list[int]) -> int:
    rates = {threads: max(library.generate(prompts, 4, threads) for _ in range(3)) for threads in counts}
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
