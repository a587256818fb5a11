"""The report of `sotto bench scheduler`: splits, learning curve, ablations, goals; and its pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from client.metalearning import metrics
from client.metalearning.evaluate import OURS, Judged
from protocol.errors import InputError
from simnet.bench import selection_plots as pictures
from simnet.bench.scheduler import ablation, cards, curve
from simnet.bench.scheduler.judge import Judge, figures, goals, judged
from simnet.bench.scheduler.records import SPLITS, Records

SECTIONS = ("curve", "ablation", "text")


@dataclass(frozen=True, slots=True)
class Found:
    """The choices behind a report, by split and selector."""

    records: Records
    whole: Mapping[str, Mapping[str, Judged]]


def run(judge: Judge, sections: Sequence[str], update: Callable[[int, int], None]) -> tuple[dict[str, Any], Found]:
    """The report, in parts that docs/SCHEDULER.md explains, and what it was made from. `sections` are made beside the
    splits. Raises InputError."""
    if unknown := set(sections) - set(SECTIONS):
        raise InputError(f"unknown section {', '.join(sorted(unknown))}: use {', '.join(SECTIONS)}, or none")
    start, records = judge.clock(), judge.records
    no_words = cards.missing() if "text" in sections else "not asked for"
    judge = replace(judge, on_fold=_counting(_steps(judge, sections, no_words), update))
    whole = {split: judged(judge, split) for split in SPLITS}
    splits = {split: figures(records.judged.held_out(split), whole[split]) for split in SPLITS}
    report: dict[str, Any] = {
        "records": records.about,
        "splits": splits,
        "curve": curve.curve(judge, whole) if "curve" in sections else None,
        "ablation": ablation.without_parts(judge, whole) if "ablation" in sections else None,
        "text": None,
        "text_left_out": no_words,
    }
    if no_words is None:
        words = cards.embedded(records, cards.minilm(), judge.clock)
        report["text"] = ablation.with_words(judge, words, whole)
    report |= {"goals": goals(splits), "seconds": round(judge.clock() - start, 1)}
    return report, Found(records, whole)


def _steps(judge: Judge, sections: Sequence[str], no_words: str | None) -> int:
    folds = judge.folds()
    total = folds * len(judge.selectors)
    total += curve.steps(judge) if "curve" in sections else 0
    total += folds * len(ablation.PARTS) * len(ablation.learners(judge)) if "ablation" in sections else 0
    return total + (folds if no_words is None else 0)


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
        paths.append(
            pictures.confusion(
                folder / f"confusion-{split}.png", ours.choices.tolist(), best.tolist(), table.strategies
            )
        )
        expected = np.where(table.measured, ours.expected, np.nan)
        expected = expected / np.nanmax(expected, axis=1, keepdims=True)
        name = folder / f"predicted-{split}.png"
        paths.append(
            pictures.predicted(name, expected[table.measured].tolist(), table.fractions[table.measured].tolist())
        )
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
