"""`--strategy auto` beside every fixed strategy, on live swarms that are in no record.

Five workloads, each with a model and a route of its own that the grid does not have, on real workers behind shaped
links. All strategies take a turn in each round, with requests of the same lengths and likeness in tokens of their own;
rounds go forth and back. Rounds are dealt out in turn to two halves: one says which fixed strategy is the best here,
which nobody knows beforehand; on the other everything is compared with `auto`, as ratios within a round. It ends when
`auto` is known to 2 % beside that best one, or with the round in which its time is over; a warm-up and eight rounds are
made whatever the time.

`auto` is the product's: the prior, its caution, its trials, and what it learns from its own requests as the rounds go
on. Where a workload asks for exact answers, strategies that lose precision take no part.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import trio

from client.metalearning.advice import Advisor
from client.metalearning.candidates import CANDIDATES, name_of
from node.groups import ungrouped
from node.model import Ask, DeployedModel, in_thread
from protocol.errors import InputError, SottoError
from protocol.strategy import Auto, parse
from simnet import cluster
from simnet.bench.collect import cell as cells
from simnet.bench.collect.design import Design
from simnet.bench.collect.grid import NEW_TOKENS, Cell, Context, DraftName, RoutePoint, TaskPoint
from simnet.bench.collect.run import WORKER, Options, deployed, drawn, workers
from simnet.bench.collect.table import allowed, cost
from simnet.bench.hear import Hear
from simnet.bench.paired import Ratio, Rounds, student_95
from simnet.random_model import RandomModel

AUTO = "auto"
ENOUGH = 0.02
ROUNDS_MIN = 4  # of a half
WORSE_MAX = 0.05
MINUTES = 30.0

MODELS: Mapping[str, RandomModel | None] = {
    "llama-15m": RandomModel(352, 960, 9, 11, 11, vocab_size=6_000),
    "qwen2-24m": RandomModel(448, 1216, 9, 7, 7, vocab_size=8_000, family="qwen2"),
    "mistral-40m": RandomModel(576, 1536, 9, 9, 3, vocab_size=8_000, family="mistral"),
}
ROUTES: Mapping[str, RoutePoint] = {
    "desk-1": RoutePoint(1, 0, 0, 1),
    "office-2": RoutePoint(2, 4, 300, 1),
    "region-3": RoutePoint(3, 20, 60, 1),
    "overseas-2": RoutePoint(2, 80, 40, 1),
    "homes-3": RoutePoint(3, 40, 12, 1),
}
WORKLOADS: Mapping[str, tuple[str, str, TaskPoint]] = {
    "chat": ("qwen2-24m", "region-3", TaskPoint(2, 3, 180, 0.5, 0.2, "latency", exact=True, agreement=0.7)),
    "agents": ("llama-15m", "office-2", TaskPoint(6, 6, 320, 0.8, 0.3, "throughput", exact=False, agreement=0.5)),
    "editing": ("qwen2-24m", "overseas-2", TaskPoint(1, 2, 260, 0.0, 0.8, "latency", exact=True, agreement=0.4)),
    "batch": ("llama-15m", "desk-1", TaskPoint(12, 12, 70, 0.0, 0.0, "throughput", exact=False, agreement=0.6)),
    "narrow": ("mistral-40m", "homes-3", TaskPoint(1, 2, 350, 0.3, 0.4, "latency", exact=False, agreement=0.6)),
}
DRAFTS: Mapping[str, DraftName] = {"llama-15m": "draft", "qwen2-24m": "draft", "mistral-40m": "target"}


@dataclass(frozen=True, slots=True)
class Live:
    """`minutes`: for each workload, from the warm-up on; after them no round begins but the first eight. `advisor`: the
    prior; without one `auto` has its requests alone."""

    folder: Path
    tokenizer_from: Path
    minutes: float = MINUTES
    only: tuple[str, ...] = tuple(WORKLOADS)
    advisor: Advisor | None = None
    worker: cluster.WorkerSpec = WORKER

    def __post_init__(self) -> None:
        if unknown := set(self.only) - set(WORKLOADS):
            raise InputError(f"unknown workload {min(unknown)!r}: use {', '.join(WORKLOADS)}")

    @property
    def design(self) -> Design:
        made = tuple(Cell(0, Context(at, *WORKLOADS[name]), AUTO) for at, name in enumerate(WORKLOADS))
        return Design(MODELS, ROUTES, made, NEW_TOKENS, "live", DRAFTS)


@dataclass(slots=True)
class Races:
    """Rates of a workload by strategy, one for each round; and what `auto` took."""

    rounds: Rounds
    taken: Counter[str] = field(default_factory=Counter)

    def half(self, which: int) -> Rounds:
        """0: by which the best fixed strategy is chosen; 1: by which all are compared."""
        return Rounds({name: rates[which::2] for name, rates in self.rounds.rates.items()})

    def best(self) -> str | None:
        """The fixed strategy with the highest geometric mean of its rates on the first half; None before a round."""
        means = {name: statistics.fmean(map(math.log, rates)) for name, rates in self.half(0).rates.items() if rates}
        means.pop(AUTO, None)
        return max(means, key=lambda name: means[name]) if means else None

    def known(self) -> bool:
        """Whether `auto` is known well enough beside that."""
        half, best = self.half(1), self.best()
        if best is None or len(half.rates[AUTO]) < ROUNDS_MIN:
            return False
        return half.ratio(AUTO, best).half_width < ENOUGH

    def report(self) -> dict[str, Any]:
        """`ratios`: how many times as fast as each fixed strategy `auto` was, on the second half."""
        half, best = self.half(1), self.best()
        if best is None or len(half.rates[AUTO]) < 2:
            return {"rounds": len(self.rounds.rates[AUTO]), "error": "too few rounds for an interval"}
        ratios = {name: half.ratio(AUTO, name).figures() for name in half.rates if name != AUTO}
        return {
            "rounds": len(self.rounds.rates[AUTO]),
            "best_fixed": best,
            "auto_vs_best_fixed": ratios[best],
            "ratios": ratios,
            "tokens_per_s": self.rounds.medians(),
            "auto_took": dict(self.taken),
        }


def run(live: Live, report: dict[str, Any], hear: Hear) -> None:
    """Fills `report`, workload by workload; what was measured stays in it when it is cut short. Raises
    SottoError: workers that do not start, a request that failed, requests that took too long."""
    torch.set_num_threads(1)
    found: dict[str, Races] = {}
    report |= {"prior": live.advisor is not None, "workloads": {}}
    asked = [(name, cell) for name, cell in zip(WORKLOADS, live.design.cells, strict=True) if name in live.only]
    for done, (name, each) in enumerate(asked):
        hear.update(done, len(asked))
        say = partial(_say, hear, name)
        options = Options(live.folder, live.tokenizer_from, live.design, worker=live.worker)
        found[name] = Races(Rounds({strategy: [] for strategy in strategies(each.context.task)}))
        try:
            say("starting workers")
            with workers(options, each.context.route) as net, ungrouped():
                trio.run(_race, live, net, each, found[name], say)
        finally:
            report["workloads"][name] = found[name].report()
            report |= summary(found)
    hear.update(len(asked), len(asked))


def _say(hear: Hear, workload: str, text: str) -> None:
    hear.say(f"{workload}: {text}")


def strategies(task: TaskPoint) -> list[str]:
    """`auto`, and the fixed ones that the workload allows."""
    return [AUTO, *(name for name in CANDIDATES if allowed(name, exact=task.exact))]


async def _race(live: Live, net: cluster.Cluster, cell: Cell, races: Races, say: Callable[[str], None]) -> None:
    options = Options(live.folder, live.tokenizer_from, live.design, worker=live.worker)
    say("deploying")
    async with deployed(options, net, [cell]) as model:
        model.choosing.chooser.advisor = live.advisor
        names = list(races.rounds.rates)
        for name in names:  # a round that does not count
            await _turn(model, live, cell, (0, name))
        end, done = time.monotonic() + 60 * live.minutes, 0
        while not races.known() and (done < 2 * ROUNDS_MIN or time.monotonic() < end):
            done += 1
            # Forth and back by pairs of rounds, so that both halves have as many of each.
            order = names if done // 2 % 2 == 0 else names[::-1]
            rates = {}
            for name in order:
                rates[name], taken = await _turn(model, live, cell, (done, name))
                races.taken.update(taken if name == AUTO else ())
            for name, rate in rates.items():
                races.rounds.rates[name].append(rate)
            say(f"round {done}, auto {rates[AUTO]:.4g} tokens/s, the best fixed {max(rates.values()):.4g}")


async def _turn(model: DeployedModel, live: Live, cell: Cell, turn: tuple[int, str]) -> tuple[float, list[str]]:
    """Tokens per second by the workload's objective, and the strategy of each request."""
    number, name = turn
    task = cell.context.task
    strategy = Auto(lossy=not task.exact) if name == AUTO else parse(name)
    ask = Ask(ignore_eos=True, strategy=strategy, objective=task.objective, exact=task.exact)
    requests = await in_thread(partial(drawn, model, Cell(number, cell.context, name), live.design))
    kept = cells.Kept(model.recorder.journal)
    try:
        with trio.fail_after(cells.CELL_S_MAX):
            measured = await cells.measure(model, ask, task, requests, kept)
    except trio.TooSlowError:
        raise SottoError(f"requests with {name} took more than {cells.CELL_S_MAX:g} s together") from None
    records = kept.records()  # the client's folder is gone when it ends
    if any(record.measured.error for record in records):
        raise SottoError(f"a request with {name} failed")
    return 1 / cost(task, measured), [name_of(record.strategy) or "another" for record in records]


def summary(found: Mapping[str, Races]) -> dict[str, Any]:
    """Over workloads: how many times as fast as each fixed strategy `auto` was, where that may be used; and goals."""
    ready = {name: races for name, races in found.items() if len(races.half(1).rates[AUTO]) >= 2}
    overall, passed, failed = {}, list[str](), list[str]()
    for strategy in CANDIDATES:
        ratios = [races.half(1).ratio(AUTO, strategy) for races in ready.values() if strategy in races.rounds.rates]
        if ratios:
            overall[strategy] = {**_mean(ratios), "workloads": len(ratios)}
            good = overall[strategy]["ratio"] >= 1
            (passed if good else failed).append(f"auto's geometric mean at least that of {strategy}")
    for name, races in ready.items():
        best = races.best()
        assert best is not None
        high = races.half(1).ratio(AUTO, best).figures()["high"]
        (passed if high >= 1 - WORSE_MAX else failed).append(f"{name}: not worse than the best fixed by 5 %")
    return {"geometric_mean_of_ratios": overall, "goals": {"passed": passed, "failed": failed}}


def _mean(ratios: list[Ratio]) -> dict[str, float]:
    """Geometric mean over workloads, which are not a sample: the interval is that of measuring them."""
    mean = math.exp(statistics.fmean(math.log(ratio.mean) for ratio in ratios))
    # Each half-width is Student's for its own rounds; as deviations of logarithms they add as squares.
    errors = [math.log1p(ratio.half_width) / student_95(ratio.rounds - 1) for ratio in ratios]
    spread = student_95(sum(ratio.rounds - 1 for ratio in ratios)) * math.hypot(*errors) / len(ratios)
    ends = {"low": mean * math.exp(-spread), "high": mean * math.exp(spread)}
    return {name: float(f"{value:.4g}") for name, value in {"ratio": mean, **ends}.items()}
