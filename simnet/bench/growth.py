"""`sotto bench growth`: how cost grows with the work, along one axis at a time, with the exponent and where it bends.

Axes: the context that a token looks at, requests at once, hops, the model's size, and the memory of a session. Real
workers on loopback, sealed; beside every point the same work in transformers, in turns with ours. Each point is a
median over turns, so that one busy moment moves it little. A point that `known` holds is not measured again.

Random weights measure speed and memory alone.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import trio

from client.generate import Generation, GenerationHost, GenerationParams
from models.precision import DEPLOYED
from node.groups import ungrouped
from node.model import Ask, DeployedModel, in_thread
from protocol.tensors import DTYPE_BYTES
from simnet import cluster
from simnet.bench.checkpoints import MODELS, checkpoint_of, describe, require
from simnet.bench.fits import growth
from simnet.bench.hear import Hear
from simnet.bench.library import Library
from simnet.bench.machine import facts, resident_bytes
from simnet.bench.paired import Budget
from simnet.bench.rig import Bench, Rig, Sizes, Work, together
from simnet.random_model import RandomModel

GROWING = {
    "30m": MODELS["30m"],
    "60m": RandomModel(640, 1728, 10, 10, 5, max_position_embeddings=16_384, vocab_size=16_000),
    "120m": MODELS["120m"],
    "250m": RandomModel(1024, 2816, 18, 16, 4, max_position_embeddings=16_384, vocab_size=32_000),
    "500m": MODELS["500m"],
}
CONTEXTS = (128, 256, 512, 1024, 2048, 4096, 8192)
CONCURRENCIES = (1, 2, 4, 8, 16, 32, 64)
HOPS = (1, 2, 3, 4, 5, 6)
MEMORY_TOKENS = (1024, 2048, 4096, 8192)
MEMORY_SESSIONS = 4
PROMPT_NEW_TOKENS = 2
TURNS_MAX = 9
Point = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Axis:
    """What grows. `cost`: the figure whose growth is fitted; points hold it, and the same of transformers as
    `library_` and its name, where there is such."""

    name: str
    unit: str
    cost: str
    values: tuple[int, ...]


AXES = {
    axis.name: axis
    for axis in (
        Axis("context", "tokens", "ms_per_token", CONTEXTS),
        Axis("prompt", "tokens", "first_token_ms", CONTEXTS),
        Axis("concurrency", "requests", "ms_per_token", CONCURRENCIES),
        Axis("hops", "hops", "ms_per_token", HOPS),
        Axis("model", "weights", "ms_per_token", tuple(range(len(GROWING)))),
        Axis("memory", "tokens", "mb_per_session", MEMORY_TOKENS),
    )
}


@dataclass(frozen=True, slots=True)
class Options:
    """`axes`: names of AXES. `model`: of all axes but "model". `minutes`: of measuring, in all. `values`: other ones
    of an axis. `known`: points of an earlier run, by axis and value."""

    folder: Path
    tokenizer_from: Path
    model: str = "120m"
    dtype: str = "float32"
    axes: tuple[str, ...] = tuple(AXES)
    minutes: float = 20.0
    new_tokens: int = 16
    values: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    known: Mapping[tuple[str, int], Point] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(self.axes, tuple(AXES), "--axis")
        require((self.dtype,), DEPLOYED, "--dtype")

    def of(self, axis: str) -> tuple[int, ...]:
        return self.values.get(axis, AXES[axis].values)

    def within(self, context: int) -> Options:
        """Without the prompts that do not fit into a model's context of so many tokens, with what comes after them."""
        after = {"context": self.new_tokens, "prompt": PROMPT_NEW_TOKENS, "memory": 1}
        fit = {axis: tuple(value for value in self.of(axis) if value + new <= context) for axis, new in after.items()}
        return replace(self, values={**self.values, **fit})

    @property
    def workers(self) -> int:
        return max([3, *(self.of("hops") if "hops" in self.axes else ())])


class _Run:
    """One run of the benchmark: its points, its clock, its files."""

    def __init__(self, options: Options, net: cluster.Cluster, hear: Hear) -> None:
        self.options, self.net, self.hear = options, net, hear
        self.pids = tuple(worker.pid for worker in net.workers)
        self.points: dict[str, list[Point]] = {axis: [] for axis in options.axes}
        asked = [(axis, value) for axis in options.axes for value in options.of(axis)]
        self._all = len(asked)
        self.budget = Budget(60 * options.minutes, sum(point not in options.known for point in asked))

    def missing(self, axis: str) -> list[int]:
        """Values that have no point yet; those of an earlier run are taken over."""
        values = self.options.of(axis)
        self.points[axis] += [
            self.options.known[axis, value] for value in values if (axis, value) in self.options.known
        ]
        self._update()
        return [value for value in values if (axis, value) not in self.options.known]

    def add(self, axis: str, value: int, figures: Point) -> None:
        point = {"axis": axis, "value": value, "x": value, **figures}
        self.points[axis].append(point)
        self.hear.found(point)
        self._update()

    @asynccontextmanager
    async def rig(self, model: str, sizes: Sizes) -> AsyncIterator[Rig]:
        """`model` over the run's workers, with room for `sizes`. Its files are its own."""
        folder = self.options.folder / f"{model.replace('/', '_')}-{sizes.hops}-{sizes.batch}-{sizes.kv_tokens}"
        checkpoint = _checkpoint(model, self.options.folder, self.options.tokenizer_from)
        bench = Bench(folder, checkpoint, self.net.bootstrap, sizes, self.budget, self.hear.say, None, self.pids)
        async with Rig(bench, self.options.dtype) as rig:
            yield rig

    async def turns(self, *contestants: Callable[[], Awaitable[Point]]) -> list[Point]:
        """Each contestant's figures, medians over turns, which go forth and back; at least two, as long as this point's
        time lasts."""
        end, taken = time.monotonic() + self.budget.next(), [list[Point]() for _ in contestants]
        while len(taken[0]) < 2 or (time.monotonic() < end and len(taken[0]) < TURNS_MAX):
            forth = list(zip(taken, contestants, strict=True))
            for points, run in forth if len(taken[-1]) % 2 == 0 else reversed(forth):
                points.append(await run())
        return [
            {name: float(f"{statistics.median(point[name] for point in points):.5g}") for name in points[0]}
            for points in taken
        ]

    def _update(self) -> None:
        self.hear.update(sum(map(len, self.points.values())), self._all)


def run(options: Options, report: dict[str, Any], hear: Hear) -> None:
    """`measure` with workers of its own. Raises InputError."""
    specs = [cluster.WorkerSpec("8GiB", "3GiB", 1)] * options.workers
    with cluster.running(options.folder / "cluster", specs) as net:
        measure(options, net, report, hear)


def measure(options: Options, net: cluster.Cluster, report: dict[str, Any], hear: Hear) -> None:
    """All that `options` ask for, into `report`. What is cut short leaves what there is. Raises InputError."""
    torch.set_num_threads(1)
    model = _checkpoint(options.model, options.folder, options.tokenizer_from)
    report |= {"model": describe(options.model, model), "dtype": options.dtype, "machine": facts(), "axes": {}}
    fitting = options.within(report["model"]["context"])
    left_out = {axis: sorted(set(options.of(axis)) - set(fitting.of(axis))) for axis in options.axes}
    report["longer_than_context"] = {axis: values for axis, values in left_out.items() if values}
    for axis, values in report["longer_than_context"].items():
        hear.say(f"{axis}: the model's context has no room for {', '.join(map(str, values))}")
    running = _Run(fitting, net, hear)
    try:
        with ungrouped():
            trio.run(_measure, running)
    finally:
        report["axes"] = {axis: _axis_figures(axis, points) for axis, points in running.points.items() if points}


def _axis_figures(name: str, points: Sequence[Point]) -> dict[str, Any]:
    axis, points = AXES[name], sorted(points, key=lambda point: float(point["x"]))
    result: dict[str, Any] = {"unit": axis.unit, "cost": axis.cost, "points": points}
    for cost in (axis.cost, f"library_{axis.cost}"):
        known = [point for point in points if cost in point]
        if len(known) > 1:
            result[cost] = growth([point["x"] for point in known], [point[cost] for point in known]).figures()
    return result


async def _measure(running: _Run) -> None:
    measures = {
        "context": _context,
        "prompt": _prompt,
        "concurrency": _concurrency,
        "hops": _hops,
        "model": _models,
        "memory": _memory,
    }
    for axis in running.options.axes:
        await measures[axis](running, running.missing(axis))


async def _context(running: _Run, values: list[int]) -> None:
    """A token of one request, by how many tokens it looks at."""
    await _one_request(running, "context", values, running.options.new_tokens)


async def _prompt(running: _Run, values: list[int]) -> None:
    """The time to the first token of one request, by its prompt's length."""
    await _one_request(running, "prompt", values, PROMPT_NEW_TOKENS)


async def _one_request(running: _Run, axis: str, values: list[int], new: int) -> None:
    if not values:
        return
    sizes = Sizes(batch=1, long_tokens=max(values), new_tokens=new)
    async with running.rig(running.options.model, sizes) as rig:
        library = await _warm(rig)
        for value in values:
            (prompt,) = rig.prompts(1, value)
            ours, theirs = await running.turns(
                partial(_timed, rig, len(prompt), new), partial(_library_timed, library.one, prompt, new)
            )
            running.add(axis, value, ours | theirs)


async def _concurrency(running: _Run, values: list[int]) -> None:
    """Processing time per new token, prompts included, by how many requests run at once: 1 / throughput."""
    if not values:
        return
    sizes = Sizes(batch=max(values), long_tokens=1, prefill_tokens=1, trace_tokens_max=1)
    async with running.rig(running.options.model, sizes) as rig:
        library = await _warm(rig)
        for value in values:
            prompts, new = rig.prompts(value, sizes.prompt_tokens), running.options.new_tokens
            threads = await rig.library_threads(Work(value, sizes.prompt_tokens, new))
            generate = partial(library.generate, prompts, new, threads)
            ours, theirs = await running.turns(
                partial(_rate, partial(_together, rig, value, new)),
                partial(_rate, partial(trio.to_thread.run_sync, generate)),
            )
            theirs = {f"library_{name}": value for name, value in theirs.items()}
            running.add("concurrency", value, ours | theirs | {"library_threads": threads})


async def _hops(running: _Run, values: list[int]) -> None:
    """A token of one request, by how many workers share the blocks."""
    new = running.options.new_tokens
    for value in values:
        async with running.rig(running.options.model, Sizes(hops=value, batch=1, long_tokens=64)) as rig:
            library = await _warm(rig)
            (prompt,) = rig.prompts(1, 32)
            ours, theirs = await running.turns(
                partial(_timed, rig, len(prompt), new), partial(_library_timed, library.one, prompt, new)
            )
            running.add("hops", value, ours | theirs | {"x": len((await rig.deployed()).route.hops)})


async def _models(running: _Run, values: list[int]) -> None:
    """A token of one request, by the weights that it reads."""
    new = running.options.new_tokens
    for value in values:
        name = list(GROWING)[value]
        async with running.rig(name, Sizes(batch=1, long_tokens=64)) as rig:
            library = await _warm(rig)
            (prompt,) = rig.prompts(1, 32)
            ours, theirs = await running.turns(
                partial(_timed, rig, len(prompt), new), partial(_library_timed, library.one, prompt, new)
            )
            weights = rig.bytes_per_token("float32") // DTYPE_BYTES["float32"]
            running.add("model", value, ours | theirs | {"x": weights, "model": name})


async def _memory(running: _Run, values: list[int]) -> None:
    """What workers' resident memory grows by for a session of so many tokens, beside what its keys and values take."""
    if not values:
        return
    sizes = Sizes(batch=1 + MEMORY_SESSIONS, long_tokens=(1 + MEMORY_SESSIONS) * max(values), new_tokens=2)
    async with running.rig(running.options.model, sizes) as rig:
        model = await rig.deployed()
        kv_bytes = rig.kv_bytes_per_token
        for value in values:
            first, *others = rig.prompts(1 + MEMORY_SESSIONS, value)  # all different: equal ones would share pages
            async with _held(model, [first]):  # what a prompt of this length takes in passing is taken before
                before = resident_bytes(running.pids)
                async with _held(model, others):
                    grown = (resident_bytes(running.pids) - before) / MEMORY_SESSIONS
            figures = {"mb_per_session": max(grown, 1.0) / 1e6, "theory_mb_per_session": kv_bytes * value / 1e6}
            per_1k = {f"{name}_per_1k_tokens": round(1000 * mb / value, 3) for name, mb in figures.items()}
            running.add("memory", value, figures | per_1k)


async def _warm(rig: Rig) -> Library:
    """The rig's opponent, after a first request to it and to the deployed model that does not count."""
    library = await rig.library()
    await _timed(rig, 8, 2)
    await trio.to_thread.run_sync(library.one, rig.prompts(1, 8)[0], 2)
    return library


@asynccontextmanager
async def _held(model: DeployedModel, prompts: Sequence[list[int]]) -> AsyncIterator[None]:
    """A session for each of `prompts`, open, with the prompt in its KV."""
    async with AsyncExitStack() as stack:
        for prompt in prompts:
            session = await stack.enter_async_context(model.session(len(prompt) + 1))
            host = GenerationHost(model.ports.clock, in_thread)
            async for _ in Generation(session, model.ends, prompt, GenerationParams(max_new_tokens=1), host).tokens():
                pass
        yield


async def _timed(rig: Rig, tokens: int, new: int) -> Point:
    (prompt,) = rig.prompts(1, tokens)
    model = await rig.deployed()
    result = await model.generate(prompt, Ask(new, ignore_eos=True, strategy=model.default_strategy))
    return {
        "first_token_ms": 1000 * result.time_to_first_token_s,
        "ms_per_token": 1000 / result.tokens_per_second if result.tokens_per_second else 0.0,
    }


async def _library_timed(
    one: Callable[[Sequence[int], int], tuple[float, float]], prompt: list[int], new: int
) -> Point:
    first_s, token_s = await trio.to_thread.run_sync(one, prompt, new)
    return {"library_first_token_ms": 1000 * first_s, "library_ms_per_token": 1000 * token_s}


async def _together(rig: Rig, count: int, new: int) -> float:
    return await together(await rig.deployed(), rig.prompts(count, rig.sizes.prompt_tokens), new)


async def _rate(run: Callable[[], Awaitable[float]]) -> Point:
    rate = await run()
    return {"tokens_per_s": rate, "ms_per_token": 1000 / rate}


def _checkpoint(model: str, folder: Path, tokenizer_from: Path) -> Path:
    if model in GROWING and model not in MODELS:
        return GROWING[model].write(folder / "model" / model, tokenizer_from, torch.float32)
    return checkpoint_of(model, folder, tokenizer_from)
