"""`sotto bench speculation`: tokens per second against round-trip time, with guesses and without.

Three real workers behind proxies that give every link, the client's and those between workers, the same round trip. A
token without guesses takes two of them: four legs. Two workloads:
- `editing`: a text, and as the answer the same text with a few words changed. The model computes everything, and the
  answer is then dictated; so the text does not depend on what the model is capable of, and how many guesses held is
  stated beside the speed.
- `writing`: the model's own text at a temperature, nothing dictated. A draft model guesses as well as it really does.

The ways of guessing take turns in each round, which has a text of its own. Rates are of decoding, after the first
token.
A plain request is shorter than the others where links are slow: its rate does not depend on its length.
"""

from __future__ import annotations

import random
import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
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
from node.client import ClientOptions, DeployOptions
from node.groups import ungrouped
from node.keys import default_key
from node.model import Ask, DeployedModel
from protocol.errors import InputError
from protocol.strategy import parse
from simnet import cluster
from simnet.bench import plots
from simnet.bench.dictated import Dictated
from simnet.bench.paired import Rounds
from simnet.shape import Shape, Wiring

RTTS_MS = (0.0, 10.0, 30.0, 100.0, 300.0)
HEADLINE_MS, HEADLINE_WAY = 100.0, "lookup"
WORKLOADS = ("editing", "writing")
HOPS = 3
SETTLE_S = 0.3  # until the proxy has read what the links are now
WARM_UP_TOKENS = 4
PLAIN_S = 5.0  # a plain request at least so long, and WARM_UP_TOKENS times 4
TEMPERATURE = 0.8
EDITED_WORDS = 0.04
OPENINGS = ("The Python language", "A function is", "This module provides", "When the file is closed,")

Update = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class SpeculationBench:
    """`tokens`: of each edited text; what the model writes is half as long. `draft`: as node.draft.Draft takes it;
    without one, lookup alone is measured."""

    folder: Path
    model: Path
    draft: str | None = None
    rtts_ms: tuple[float, ...] = RTTS_MS
    tokens: int = 128
    rounds: int = 4
    workloads: tuple[str, ...] = WORKLOADS

    def __post_init__(self) -> None:
        if self.rounds < 2:
            raise InputError("an interval needs two rounds or more: give --rounds 2")
        if unknown := set(self.workloads) - set(WORKLOADS):
            raise InputError(f"unknown --workload {min(unknown)!r}: use {' or '.join(WORKLOADS)}")
        if self.tokens < 4 * WARM_UP_TOKENS or not self.rtts_ms or min(self.rtts_ms) < 0:
            raise InputError(f"give --tokens {4 * WARM_UP_TOKENS} or more, and round trips of 0 ms or more")


@dataclass(frozen=True, slots=True)
class Text:
    """A prompt, and what the answer must be: () lets the model write."""

    prompt: tuple[int, ...]
    output: tuple[int, ...] = ()


@dataclass(slots=True)
class _Cell:
    """One workload at one round-trip time: rates by way of guessing, and how many guesses held."""

    rates: Rounds
    drafted: dict[str, int] = field(default_factory=dict)
    accepted: dict[str, int] = field(default_factory=dict)

    def note(self, way: str, result: GenerationResult) -> None:
        self.rates.rates[way].append(result.tokens_per_second)
        self.drafted[way] = self.drafted.get(way, 0) + result.drafted
        self.accepted[way] = self.accepted.get(way, 0) + result.accepted

    def figures(self) -> dict[str, Any]:
        return {way: self._of(way) for way in self.rates.rates}

    def _of(self, way: str) -> dict[str, Any]:
        figures: dict[str, Any] = {"tokens_per_s": round(self.rates.median(way), 2)}
        if way != "off":
            ratio = self.rates.ratio(way, "off")
            figures |= {"ratio": round(ratio.mean, 3), "half_width": round(ratio.half_width, 3)}
            figures |= {"drafted": self.drafted[way], "accepted": self.accepted[way]}
        return figures


def run(options: SpeculationBench, update: Update = lambda *_: None) -> dict[str, Any]:
    """The report. `update(done, total)` counts requests. Raises InputError."""
    torch.set_num_threads(1)
    names = tuple(f"worker-{index}" for index in range(HOPS))
    wiring = Wiring(names, Shape(), {})
    with cluster.running(
        options.folder / "cluster", [cluster.WorkerSpec(threads=1)] * HOPS, wiring=wiring
    ) as net, ungrouped():  # fmt: skip
        return trio.run(_measure, options, net, update)


async def _measure(options: SpeculationBench, net: cluster.Cluster, update: Update) -> dict[str, Any]:
    async with _deployed(options, net.bootstrap) as model:
        ways = ("off", "lookup", "draft") if await _has_draft(model) else ("off", "lookup")
        total = len(options.rtts_ms) * len(options.workloads) * options.rounds * len(ways)
        done, points = 0, list[dict[str, Any]]()
        for rtt_ms in options.rtts_ms:
            await _reshape(net, rtt_ms)
            warm_up = await _answer(model, "off", _text(model, "writing", 0, options), WARM_UP_TOKENS)
            plain_tokens = min(options.tokens, max(4 * WARM_UP_TOKENS, int(PLAIN_S * warm_up.tokens_per_second)))
            for workload in options.workloads:
                cell = _Cell(Rounds({way: [] for way in ways}))
                for number in range(options.rounds):
                    text = _text(model, workload, number, options)
                    for way in ways:
                        tokens = plain_tokens if way == "off" else _tokens(options, workload)
                        cell.note(way, await _answer(model, way, text, tokens))
                        update(done := done + 1, total)
                points.append({"rtt_ms": rtt_ms, "workload": workload, **cell.figures()})
    return _report(options, points)


def _report(options: SpeculationBench, points: list[dict[str, Any]]) -> dict[str, Any]:
    headline = {
        f"speculation_at_{point['rtt_ms']:g}ms_rtt": {
            name: point[HEADLINE_WAY][name] for name in ("ratio", "half_width", "drafted", "accepted")
        }
        for point in points
        if point["workload"] == "editing" and point["rtt_ms"] == HEADLINE_MS
    }
    ratios = [point[way]["ratio"] for point in points for way in ("lookup", "draft") if way in point]
    return {
        **headline,
        "lowest_ratio": min(ratios),
        "model": options.model.name,
        "hops": HOPS,
        "tokens": options.tokens,
        "rounds": options.rounds,
        "points": points,
    }


@asynccontextmanager
async def _deployed(options: SpeculationBench, way_in: str) -> AsyncIterator[DeployedModel]:
    folder = options.folder / "client"
    async with open_client(ClientOptions(folder, (way_in,), draft=options.draft, chooses=False)) as client:
        sealed = await client.seal(Checkpoint.open(options.model), "float32", default_key(folder), lambda *_: None)
        yield await client.deploy(sealed, DeployOptions(hops_min=HOPS, kv_tokens=1024))


def _tokens(options: SpeculationBench, workload: str) -> int:
    return options.tokens if workload == "editing" else options.tokens // 2


async def _has_draft(model: DeployedModel) -> bool:
    """Raises InputError when the draft model that was named cannot be used."""
    try:
        await trio.to_thread.run_sync(model.draft.open)
    except InputError:
        if model.draft.given is not None:
            raise
        return False
    return True


async def _reshape(net: cluster.Cluster, rtt_ms: float) -> None:
    net.reshape_all(Shape(rtt_ms=rtt_ms))
    await trio.sleep(SETTLE_S)


async def _answer(model: DeployedModel, way: str, text: Text, tokens: int) -> GenerationResult:
    """One request with a session of its own, guesses made as `way` says."""
    sampling, strategy = SamplingParams(TEMPERATURE, seed=len(text.prompt)), parse(f"speculation={way}")
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


def _text(model: DeployedModel, workload: str, number: int, options: SpeculationBench) -> Text:
    if workload == "writing":
        return Text(tuple(model.tokenizer.encode(OPENINGS[number % len(OPENINGS)])))
    room = model.config.max_position - options.tokens
    return editing(model.tokenizer, number, options.tokens, room)


def editing(tokenizer: Tokenizer, seed: int, tokens: int, prompt_tokens_max: int) -> Text:
    """Some of Python's own documentation to be corrected, and its correction, of `tokens` tokens."""
    generator = random.Random(seed)
    pool = [words for words in (prose(topics[name]).split() for name in sorted(topics)) if len(words) >= 400]
    words = pool[generator.randrange(len(pool))][: tokens + tokens // 4]
    while True:
        edited = [generator.choice(words) if generator.random() < EDITED_WORDS else word for word in words]
        prompt = tokenizer.encode(f"Correct this text:\n\n{' '.join(words)}\n\nThe corrected text:\n\n")
        output = tokenizer.encode(" ".join(edited), special=False)
        if len(prompt) <= prompt_tokens_max or len(words) < 8:
            return Text(tuple(prompt), tuple(output[:tokens]))
        words = words[: len(words) * 3 // 4]


def prose(text: str) -> str:
    """The text without its markup."""
    return " ".join(re.sub(r"[*`|=+~^-]{2,}|::|[`*]", " ", text).split())


def plot(report: dict[str, Any], file: Path) -> None:
    """Tokens per second against round-trip time, a panel for each workload. Raises InputError without matplotlib."""
    plots.require()
    from matplotlib.figure import Figure  # not pyplot, which keeps every figure

    workloads = sorted({point["workload"] for point in report["points"]})
    figure = Figure(figsize=(4.5 * len(workloads), 4), layout="constrained")
    panels: Sequence[Any] = figure.subplots(1, len(workloads), squeeze=False)[0]
    for axes, workload in zip(panels, workloads, strict=True):
        points = [point for point in report["points"] if point["workload"] == workload]
        for way in ("off", "lookup", "draft"):
            rates = [(point["rtt_ms"], point[way]["tokens_per_s"]) for point in points if way in point]
            if rates:
                axes.plot(*zip(*rates, strict=True), "o-", label=way)
        axes.set_title(workload)
        axes.set_xlabel("round trip of every link, ms")
        axes.set_ylabel("tokens per second")
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.legend(title="guesses")
    figure.savefig(file, dpi=120)
