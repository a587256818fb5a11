"""`sotto bench speculation`: tokens per second against round-trip time, with guesses and without.

Three real workers behind proxies that give every link, the client's and those between workers, the same round trip. A
token without guesses takes two of them: four legs. Two workloads:
- `editing`: a text, and as the answer the same text with a few words changed. The model computes everything, and the
  answer is then dictated; so the text does not depend on what the model is capable of, and how many guesses held is
  stated beside the speed.
- `writing`: the model's own text at a temperature, nothing dictated. A draft model guesses as well as it really does.

The ways of guessing take turns in each round, which has a text of its own, forth and back; rounds end when the ratios
are known, or a point's share of the time is over. Rates are of decoding, after the first token. A plain request is
shorter than the others where links are slow: its rate does not depend on its length. Where transformers is installed,
it takes turns, too: as many tokens after the same prompts, in this process, without links, guesses and sealing.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import trio

from client.generate import Generation, GenerationResult
from models.checkpoint import Checkpoint
from models.sampling import SamplingParams
from models.tokenizer import Tokenizer
from node.app_client import open_client
from node.bringing import DeployOptions
from node.client import ClientOptions
from node.groups import ungrouped
from node.keys import default_key
from node.model import Ask, DeployedModel
from protocol.errors import InputError
from protocol.strategy import parse
from simnet import cluster
from simnet.bench import plots
from simnet.bench.dictated import Dictated
from simnet.bench.hear import Hear
from simnet.bench.library import Library
from simnet.bench.paired import Budget, Contestant, Patience, Rounds, take_turns
from simnet.bench.workloads import EDIT_PROMPTS, first_turns
from simnet.shape import Shape, Wiring

RTTS_MS = (0.0, 10.0, 30.0, 100.0, 300.0)
HEADLINE_MS, HEADLINE_WAY = 100.0, "lookup"
WAYS = ("off", "lookup", "draft")
THEIRS = "transformers"
WORKLOADS = ("editing", "writing")
HOPS = 3
WARM_UP_TOKENS = 4
PLAIN_S = 5.0  # a plain request at least so long, and WARM_UP_TOKENS times 4
TEMPERATURE = 0.8
EDITED_WORDS = 0.04
OPENINGS = ("The Python language", "A function is", "This module provides", "When the file is closed,")

GUESSES = ("drafted", "accepted")


@dataclass(frozen=True, slots=True)
class SpeculationBench:
    """`tokens`: of each edited text; what the model writes is half as long. `draft`: as node.draft.Draft takes it;
    without one, lookup alone is measured. `rounds`: of each point at least, more while `minutes` of measuring last and
    a ratio is not known well enough. `data`: a folder with texts to edit."""

    folder: Path
    model: Path
    draft: str | None = None
    rtts_ms: tuple[float, ...] = RTTS_MS
    tokens: int = 128
    rounds: int = 4
    minutes: float = 0.0
    workloads: tuple[str, ...] = WORKLOADS
    data: Path | None = None

    def __post_init__(self) -> None:
        if self.rounds < 2:
            raise InputError("an interval needs two rounds or more: give --rounds 2")
        if unknown := set(self.workloads) - set(WORKLOADS):
            raise InputError(f"unknown --workload {min(unknown)!r}: use {' or '.join(WORKLOADS)}")
        if self.tokens < 4 * WARM_UP_TOKENS or not self.rtts_ms or min(self.rtts_ms) < 0:
            raise InputError(f"give --tokens {4 * WARM_UP_TOKENS} or more, and round trips of 0 ms or more")


@dataclass(frozen=True, slots=True)
class Text:
    """A prompt, and what the answer must be: () lets the model write, by `seed`."""

    prompt: tuple[int, ...]
    output: tuple[int, ...] = ()
    seed: int = 0


@dataclass(slots=True)
class _Cell:
    """One workload at one round-trip time: the ways of guessing take turns, and each has the round's text."""

    ways: tuple[str, ...]
    answer: Callable[[str, int], Awaitable[GenerationResult]]
    theirs: Callable[[int], float] | None = None  # tokens per second of transformers with a round's text
    results: dict[str, list[GenerationResult]] = field(default_factory=dict)

    async def measure(self, patience: Patience, say: Callable[[str], None], count: Callable[[int], None]) -> Rounds:
        """`count` hears how many requests were answered."""
        self.results = {way: [] for way in self.ways}
        contestants: dict[str, Contestant] = {}

        async def turn(way: str) -> float:
            result = await self.answer(way, len(self.results[way]))
            self.results[way].append(result)
            count(sum(map(len, self.results.values())))
            return result.tokens_per_second

        contestants |= {way: partial(turn, way) for way in self.ways}
        if (theirs := self.theirs) is not None:
            rounds = itertools.count()
            contestants[THEIRS] = lambda: trio.to_thread.run_sync(theirs, next(rounds))
        pairs = [(way, self.ways[0]) for way in self.ways[1:]]
        return await take_turns(contestants, patience, say, pairs)

    def figures(self, rounds: Rounds) -> dict[str, Any]:
        """Speed and, beside it, the ratio to no guesses and how many guesses held."""
        figures: dict[str, Any] = {name: {"tokens_per_s": round(rounds.median(name), 2)} for name in rounds.rates}
        for name in rounds.rates:
            if name != self.ways[0]:
                figures[name] |= rounds.ratio(name, self.ways[0]).figures()
        for way in self.ways[1:]:
            figures[way] |= {name: sum(getattr(result, name) for result in self.results[way]) for name in GUESSES}
        return figures


def run(options: SpeculationBench, report: dict[str, Any], hear: Hear) -> None:
    """All that `options` ask for, into `report`; what is cut short leaves what there is. Raises InputError."""
    torch.set_num_threads(1)
    names = tuple(f"worker-{index}" for index in range(HOPS))
    wiring = Wiring(names, Shape(), {})
    report |= {"model": options.model.name, "hops": HOPS, "tokens": options.tokens, "points": []}
    try:
        with cluster.running(
            options.folder / "cluster", [cluster.WorkerSpec(threads=1)] * HOPS, wiring=wiring
        ) as net, ungrouped():  # fmt: skip
            trio.run(_measure, options, net, report, hear)
    finally:
        report |= headlines(report["points"])


async def _measure(options: SpeculationBench, net: cluster.Cluster, report: dict[str, Any], hear: Hear) -> None:
    async with _deployed(options, net.bootstrap) as model:
        texts = Texts.open(options, model.tokenizer, model.config.max_position)
        library = await trio.to_thread.run_sync(_library, options.model)
        report["texts"] = texts.origin
        ways = WAYS if await _has_draft(model) else WAYS[:-1]
        cells = len(options.rtts_ms) * len(options.workloads)
        requests, done = options.rounds * len(ways), 0
        budget = Budget(60 * options.minutes, cells)

        def count(answered: int) -> None:
            hear.update(done * requests + min(answered, requests), cells * requests)

        for rtt_ms in options.rtts_ms:
            await cluster.reshaped(net, Shape(rtt_ms=rtt_ms))
            warm_up = await _answer(model, WAYS[0], texts.text("writing", 0), WARM_UP_TOKENS)
            plain_tokens = min(options.tokens, max(4 * WARM_UP_TOKENS, int(PLAIN_S * warm_up.tokens_per_second)))
            for workload in options.workloads:
                hear.say(f"{workload}, round trips of {rtt_ms:g} ms")
                answer = partial(_turn, model, texts, workload, plain_tokens)
                cell = _Cell(ways, answer, partial(_their_turn, library, texts, workload) if library else None)
                patience = Patience(budget.next(), rounds_min=options.rounds, warm_up=False)
                rounds = await cell.measure(patience, hear.say, count)
                done += 1
                point = {"rtt_ms": rtt_ms, "workload": workload, **cell.figures(rounds)}
                report["points"].append(point)
                hear.found(point)


async def _turn(
    model: DeployedModel, texts: Texts, workload: str, plain_tokens: int, way: str, number: int
) -> GenerationResult:
    tokens = plain_tokens if way == WAYS[0] else texts.tokens(workload)
    return await _answer(model, way, texts.text(workload, number), tokens)


def _library(model: Path) -> Library | None:
    return Library(model, "float32") if find_spec(THEIRS) is not None else None


def _their_turn(library: Library, texts: Texts, workload: str, number: int) -> float:
    text = texts.text(workload, number)
    return library.decode(text.prompt, len(text.output) or texts.tokens(workload))


def headlines(points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What lookup wins where round trips are HEADLINE_MS, and the least that any way of guessing wins anywhere."""
    found: dict[str, Any] = {
        f"speculation_at_{point['rtt_ms']:g}ms_rtt": {
            name: value for name, value in point[HEADLINE_WAY].items() if name != "tokens_per_s"
        }
        for point in points
        if point["workload"] == "editing" and point["rtt_ms"] == HEADLINE_MS
    }
    ratios = [
        {name: point[way][name] for name in ("ratio", "low", "high", "rounds")}
        | {"way": way, "rtt_ms": point["rtt_ms"], "workload": point["workload"]}
        for point in points
        for way in WAYS[1:]
        if way in point
    ]
    return found | ({"lowest_ratio": min(ratios, key=lambda each: float(each["ratio"]))} if ratios else {})


@asynccontextmanager
async def _deployed(options: SpeculationBench, way_in: str) -> AsyncIterator[DeployedModel]:
    folder = options.folder / "client"
    async with open_client(ClientOptions(folder, (way_in,), draft=options.draft, chooses=False)) as client:
        wanted = DeployOptions(hops_min=HOPS, kv_tokens=1024)
        yield await client.bring(Checkpoint.open(options.model), "float32", default_key(folder), wanted)


async def _has_draft(model: DeployedModel) -> bool:
    """Raises InputError when the draft model that was named cannot be used."""
    try:
        await trio.to_thread.run_sync(model.draft.open)
    except InputError:
        if model.draft.given is not None:
            raise
        return False
    return True


async def _answer(model: DeployedModel, way: str, text: Text, tokens: int) -> GenerationResult:
    """One request with a session of its own, guesses made as `way` says."""
    sampling, strategy = SamplingParams(TEMPERATURE, seed=text.seed), parse(f"speculation={way}")
    ask = Ask(tokens, sampling, ignore_eos=True)
    if text.output:
        ask = replace(ask, max_new_tokens=min(tokens, len(text.output)), sampling=SamplingParams())
    host = await model.host(ask, strategy, model.guessing())
    if text.output:
        host = replace(host, choose=Dictated(len(text.prompt), text.output).choose)
    async with model.session(len(text.prompt) + ask.max_new_tokens) as session:
        generation = Generation(session, model.ends, text.prompt, model.params(ask, strategy), host)
        async for _ in generation.tokens():
            pass
        return generation.result()


@dataclass(frozen=True, slots=True)
class Texts:
    """What is asked for in each round. `pool`: the words of texts to be edited; `origin`: where they are from."""

    tokenizer: Tokenizer
    pool: Sequence[Sequence[str]]
    origin: str
    edited_tokens: int
    context: int

    @classmethod
    def open(cls, options: SpeculationBench, tokenizer: Tokenizer, context: int) -> Texts:
        """Texts of the data folder, where it holds such that are long enough. Raises InputError."""
        path = None if options.data is None else options.data / EDIT_PROMPTS
        given = [text.split() for text in first_turns(path)] if path is not None and path.is_file() else []
        pool = [words for words in given if len(words) >= options.tokens + options.tokens // 4]
        return cls(tokenizer, pool or topic_words(), EDIT_PROMPTS if pool else "built-in", options.tokens, context)

    def tokens(self, workload: str) -> int:
        return self.edited_tokens if workload == "editing" else self.edited_tokens // 2

    def text(self, workload: str, number: int) -> Text:
        """That of round `number`."""
        if workload == "writing":
            return Text(tuple(self.tokenizer.encode(OPENINGS[number % len(OPENINGS)])), seed=number)
        return editing(self, number)


def editing(texts: Texts, seed: int) -> Text:
    """A text to be corrected, and its correction, of `edited_tokens` tokens; both fit into the context."""
    generator, tokens = random.Random(seed), texts.edited_tokens
    words = texts.pool[generator.randrange(len(texts.pool))][: tokens + tokens // 4]
    while True:
        edited = [generator.choice(words) if generator.random() < EDITED_WORDS else word for word in words]
        prompt = texts.tokenizer.encode(f"Correct this text:\n\n{' '.join(words)}\n\nThe corrected text:\n\n")
        output = texts.tokenizer.encode(" ".join(edited), special=False)
        if len(prompt) <= texts.context - tokens or len(words) < 8:
            return Text(tuple(prompt), tuple(output[:tokens]))
        words = words[: len(words) * 3 // 4]


def topic_words() -> list[list[str]]:
    """Some of Python's own documentation."""
    return [words for words in (prose(topics[name]).split() for name in sorted(topics)) if len(words) >= 400]


def prose(text: str) -> str:
    """The text without its markup."""
    return " ".join(re.sub(r"[*`|=+~^-]{2,}|::|[`*]", " ", text).split())


def plot(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """Tokens per second against round-trip time, a panel for each workload. Raises InputError without matplotlib."""
    workloads = sorted({point["workload"] for point in report.get("points", [])})
    if not workloads:
        return []
    figure, panels = plots.panels(1, len(workloads), (4.5 * len(workloads), 4))
    for axes, workload in zip(panels, workloads, strict=True):
        points = [point for point in report["points"] if point["workload"] == workload]
        for way in (*WAYS, THEIRS):
            rates = [(point["rtt_ms"], point[way]["tokens_per_s"]) for point in points if way in point]
            if rates:
                axes.plot(*zip(*rates, strict=True), "o-", label=way)
        axes.set_title(workload)
        axes.set_xlabel("round trip of every link, ms")
        axes.set_ylabel("tokens per second")
        axes.set_yscale("log")
        axes.legend(title="guesses")
    return [plots.saved(figure, folder / "speculation.png")]
