"""The report of `sotto bench scheduler`: splits, learning curve, ablations, goals; and its pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from client.metalearning import metrics
from client.metalearning.evaluate import OURS, Judged
from protocol.errors import InputError
from simnet.bench import selection_plots as pictures
from simnet.bench.scheduler import ablation, cards, curve
from simnet.bench.scheduler.judge import SELECTORS, Judge, figures, goals, judged
from simnet.bench.scheduler.records import SPLITS, Records

SECTIONS = ("curve", "ablation", "text")


@dataclass(frozen=True, slots=True)
class Options:
    """`sections`: what is made beside the splits. `clock`: processor time in seconds."""

    clock: Callable[[], float]
    sections: tuple[str, ...] = SECTIONS

    def __post_init__(self) -> None:
        if unknown := set(self.sections) - set(SECTIONS):
            raise InputError(f"unknown section {', '.join(sorted(unknown))}: use {', '.join(SECTIONS)}")


@dataclass(frozen=True, slots=True)
class Found:
    """The choices behind a report, by split and selector."""

    records: Records
    whole: Mapping[str, Mapping[str, Judged]]


def run(records: Records, options: Options, update: Callable[[int, int], None]) -> tuple[dict[str, Any], Found]:
    """The report, in sections that docs/SCHEDULER.md explains, and what it was made from."""
    start = options.clock()
    judge, words = Judge(records, options.clock), cards.missing() if "text" in options.sections else "not asked for"
    judge = replace(judge, on_fold=_counting(_steps(judge, options, words), update))
    whole = {split: judged(judge, split) for split in SPLITS}
    splits = {split: figures(records.judged.held_out(split), whole[split]) for split in SPLITS}
    report: dict[str, Any] = {"records": records.about, "splits": splits, "curve": None, "ablation": None}
    if "curve" in options.sections:
        report["curve"] = curve.curve(judge, whole)
    if "ablation" in options.sections:
        report["ablation"] = ablation.without_parts(judge, whole)
    report |= {"text": None, "text_left_out": words}
    if words is None:
        text = cards.embedded(records, cards.minilm(), options.clock)
        report["text"] = ablation.with_words(judge, text, whole)
    report |= {"goals": goals(splits), "seconds": round(options.clock() - start, 1)}
    return report, Found(records, whole)


def _steps(judge: Judge, options: Options, words: str | None) -> int:
    folds = judge.folds()
    total = folds * len(SELECTORS)
    total += curve.steps(judge) if "curve" in options.sections else 0
    total += folds * len(ablation.PARTS) if "ablation" in options.sections else 0
    return total + (folds if words is None else 0)


def _counting(total: int, update: Callable[[int, int], None]) -> Callable[[], None]:
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        update(done, total)

    update(0, total)
    return step


def plot(report: Mapping[str, Any], found: Found, folder: Path) -> list[Path]:
    """Regret, confusion and prediction of each split, and learning curves. Raises InputError without matplotlib."""
    table = found.records.judged
    paths = []
    for split in SPLITS:
        ours = found.whole[split][OURS]
        best = metrics.truths(table, ours.choices)
        paths.append(pictures.regret(folder / f"regret-{split}.png", report["splits"][split]))
        paths.append(pictures.confusion(folder / f"confusion-{split}.png", ours.choices, best, table.strategies))
        expected = np.where(table.measured, ours.expected, np.nan)
        expected = expected / np.nanmax(expected, axis=1, keepdims=True)
        name = folder / f"predicted-{split}.png"
        paths.append(pictures.predicted(name, expected[table.measured], table.fractions[table.measured]))
        if report["curve"]:
            paths.append(pictures.learning_curve(folder / f"curve-{split}.png", _points(report, split)))
    return paths


def _points(report: Mapping[str, Any], split: str) -> dict[str, list[tuple[float, float]]]:
    every = report["records"]["contexts"]
    lines: dict[str, list[tuple[float, float]]] = {}
    for point in report["curve"]:
        if point["split"] == split:
            at = every if point["contexts"] == "all" else point["contexts"]
            lines.setdefault(point["selector"], []).append((at, point["mean_fraction_of_oracle"]))
    return lines
