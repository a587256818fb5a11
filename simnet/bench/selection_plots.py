"""How good choices of a strategy are, as pictures: regret per selector, confusion, prediction, learning curves.

Numbers and names come in, one PNG comes out; nothing here knows how choices are made or measured. matplotlib is an
extra (plots.require).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from simnet.bench.plots import COLOURS, OURS, blank, saved

NAME_CHARS_MAX = 32  # of a strategy beside an axis
NUMBERED_MAX = 12  # strategies up to which each cell of a confusion has its number

Points = Mapping[str, Sequence[tuple[float, float]]]
"""Of each selector, (records learnt from, mean fraction of the oracle)."""


def regret(path: Path, report: Mapping[str, Any]) -> Path:
    """What each selector loses to the oracle, with its 95 % interval, and in the worst tenth of the tasks; `report` has
    the `selectors` of `sotto select --json`."""
    figures = {name: each for name, each in report["selectors"].items() if name != "oracle"}
    order = sorted(figures, key=lambda name: figures[name]["mean_fraction_of_oracle"])
    means = [1 - figures[name]["mean_fraction_of_oracle"] for name in order]
    intervals = [
        figures[name].get("mean_fraction_of_oracle_interval") or (1 - mean,) * 2
        for name, mean in zip(order, means, strict=True)
    ]
    # The interval is bootstrapped: with few groups the mean may lie a hair outside.
    errors = [
        [max(0.0, mean - (1 - high)) for mean, (_, high) in zip(means, intervals, strict=True)],
        [max(0.0, (1 - low) - mean) for mean, (low, _) in zip(means, intervals, strict=True)],
    ]
    picture, axes = blank("What a choice loses to the best strategy", "1 - fraction of the oracle", "")
    colours = [COLOURS[OURS] if name == OURS else COLOURS["theory"] for name in order]
    axes.barh(order, means, xerr=errors, color=colours, capsize=3)
    axes.plot([1 - figures[name]["worst_decile"] for name in order], order, "k|", markersize=10, label="worst tenth")
    axes.legend()
    return saved(picture, path)


def confusion(path: Path, chosen: Sequence[int], best: Sequence[int], names: Sequence[str]) -> Path:
    """How often each strategy was chosen (column) where another was best (row), both as places in `names`. Strategies
    that were neither chosen nor best anywhere are left out."""
    shown = sorted(set(map(int, chosen)) | set(map(int, best)))
    place = {strategy: number for number, strategy in enumerate(shown)}
    counts = np.zeros((len(shown), len(shown)), dtype=int)
    for one, other in zip(best, chosen, strict=True):
        counts[place[int(one)], place[int(other)]] += 1
    picture, axes = blank("Tasks by best and chosen strategy", "chosen", "best")
    axes.grid(visible=False)
    axes.imshow(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    labels = [_short(names[strategy]) for strategy in shown]
    axes.set_xticks(range(len(shown)), labels, rotation=45, ha="right", fontsize="small")
    axes.set_yticks(range(len(shown)), labels, fontsize="small")
    if len(shown) <= NUMBERED_MAX:
        for (row, column), count in np.ndenumerate(counts):
            dark = count > counts[row].sum() / 2
            axes.text(column, row, str(count), ha="center", va="center", color="white" if dark else "black")
    return saved(picture, path)


def _short(name: str) -> str:
    """Both ends of a long name: strategies often differ in the last word alone."""
    half = NAME_CHARS_MAX // 2
    return name if len(name) <= NAME_CHARS_MAX else f"{name[: half - 1]}…{name[-half:]}"


def predicted(path: Path, predicted: Sequence[float], measured: Sequence[float]) -> Path:
    """A point for each pair of finite fractions of the best above zero; on the line they agree."""
    pairs = np.array([predicted, measured], dtype=np.float64).T.reshape(-1, 2)
    pairs = pairs[(np.isfinite(pairs) & (pairs > 0)).all(axis=1)]
    picture, axes = blank(
        "Predicted against measured", "predicted fraction of the best", "measured fraction of the best"
    )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.plot(pairs[:, 0], pairs[:, 1], ".", markersize=4, alpha=0.5, color=COLOURS[OURS])
    if len(pairs):
        ends = [pairs.min(), pairs.max()]
        axes.plot(ends, ends, color=COLOURS["theory"])
    return saved(picture, path)


def learning_curve(path: Path, points: Points) -> Path:
    """Mean fraction of the oracle against the number of recorded contexts, a line for each selector."""
    picture, axes = blank("What more records bring", "recorded contexts", "mean fraction of the oracle")
    axes.set_xscale("log")
    for name, curve in points.items():
        width = 2.5 if name == OURS else 1.2
        axes.plot(*zip(*sorted(curve), strict=True), "o-", markersize=3, linewidth=width, label=name) if curve else None
    axes.legend(fontsize="small")
    return saved(picture, path)
