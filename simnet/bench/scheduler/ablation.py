"""What each group of features is worth: selectors without it, on the same folds.

The product's selector keeps to the ranking where features gain it nothing, and then loses nothing without them; so a
learner that always follows its features stands beside it.

A description in words (cards.py) is the opposite: added, and worth keeping only if choices get better by it. What is
reported is a difference of the same contexts, so that what all have in common drops out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from client.metalearning.crossfit import Parts
from client.metalearning.evaluate import OURS, Judged, Make
from client.metalearning.resampling import Draws
from simnet.bench.scheduler.auto import Auto
from simnet.bench.scheduler.cards import Described, Embedded, with_text
from simnet.bench.scheduler.judge import Judge
from simnet.bench.scheduler.records import SPLITS, seeing

PARTS = ("model", "route", "task")
LEARNERS = ("gradient_boosting", OURS)
LOSS_MAX = 0.005  # on any split, for a description to be worth its megabytes


def learners(judge: Judge) -> list[str]:
    return [name for name in LEARNERS if name in judge.selectors]


def without_parts(judge: Judge, whole: Mapping[str, Mapping[str, Judged]]) -> dict[str, Any]:
    """By selector, group of features and split: figures without it, and by how much it is better to have it."""
    report: dict[str, dict[str, Any]] = {name: {} for name in learners(judge)}
    for part in PARTS:
        records = seeing(judge.records, lambda name, part=part: not name.startswith(f"{part}_"))  # type: ignore[misc]
        for name, found in report.items():
            made = judge.selectors[name]
            found[f"without_{part}"] = _compared(replace(judge, records=records), made, (name, whole), -1.0)
    return report


def with_words(judge: Judge, embedded: Embedded, whole: Mapping[str, Mapping[str, Judged]]) -> dict[str, Any]:
    """By split; `earned`: it gains beyond doubt somewhere, and loses nowhere."""
    richer = replace(judge, records=with_text(judge.records, embedded))
    splits = _compared(richer, lambda: Auto(Described(judge.product(), embedded.width)), (OURS, whole), 1.0)
    gains = [each["gain_interval"] for each in splits.values()]
    earned = any(low > 0 for low, _ in gains) and all(low >= -LOSS_MAX for low, _ in gains)
    return {"earned": earned, "embedding_ms": embedded.ms, "splits": splits}


def _compared(
    judge: Judge, make: Make, beside: tuple[str, Mapping[str, Mapping[str, Judged]]], sign: float
) -> dict[str, Any]:
    """`gain`: of having the features in question, in the mean fraction of the oracle, over the choices of the selector
    that `beside` names."""
    report, (name, whole) = {}, beside
    for split in SPLITS:
        table = judge.records.judged.held_out(split)
        draws, halves = Draws.of(table.groups), Parts.of(table)
        assert halves is not None
        choices = judge.choices(split, make).choices
        fractions = halves.fractions(choices)
        gain = sign * (fractions - halves.fractions(whole[split][name].choices))
        report[split] = {
            "tolerant_accuracy": float(halves.tolerant(choices).mean()),
            "mean_fraction_of_oracle": float(fractions.mean()),
            "gain": float(gain.mean()),
            "gain_interval": list(draws.mean(gain)),
        }
    return report
