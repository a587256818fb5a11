"""How a cost grows: the exponent of a power law, and where it bends.

y = c x^e is a straight line in logarithms, fitted by least squares. A bend is where two lines that meet explain the
points far better than one, by so much that noise cannot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BEND_POINTS_MIN = 5
BEND_EXPONENTS_MIN = 0.15  # a smaller change of the exponent is called none
BEND_ERROR_MAX = 0.3  # of one line's squared error: what the two lines may leave


@dataclass(frozen=True, slots=True)
class Bend:
    """Up to `at` the exponent is `before`, from there on `after`."""

    at: float
    before: float
    after: float


@dataclass(frozen=True, slots=True)
class Growth:
    exponent: float
    bend: Bend | None

    def figures(self) -> dict[str, object]:
        """As reports print it."""
        bend = self.bend and {
            "at": float(f"{self.bend.at:.4g}"),
            "exponent_before": round(self.bend.before, 3),
            "exponent_after": round(self.bend.after, 3),
        }
        return {"exponent": round(self.exponent, 3), "bend": bend}


def growth(xs: Sequence[float], ys: Sequence[float]) -> Growth:
    """The growth of positive `ys` over positive `xs`. Raises ValueError below two different xs."""
    if len(set(xs)) < 2 or len(xs) != len(ys):
        raise ValueError("growth takes two points at least")
    order = np.argsort(np.asarray(xs, float))
    x, y = np.log(np.asarray(xs, float))[order], np.log(np.asarray(ys, float))[order]
    (_, exponent), error = _least_squares(np.stack([np.ones_like(x), x], axis=1), y)
    return Growth(float(exponent), _bend(x, y, error))


def _bend(x: np.ndarray, y: np.ndarray, straight_error: float) -> Bend | None:
    if len(x) < BEND_POINTS_MIN:
        return None
    found: tuple[float, Bend] | None = None
    for at in x[1:-1]:
        hinged = np.stack([np.ones_like(x), x, np.maximum(0.0, x - at)], axis=1)
        (_, before, change), error = _least_squares(hinged, y)
        if found is None or error < found[0]:
            found = error, Bend(float(np.exp(at)), float(before), float(before + change))
    assert found is not None
    error, bend = found
    small = abs(bend.after - bend.before) < BEND_EXPONENTS_MIN
    return None if small or error > BEND_ERROR_MAX * straight_error else bend


def _least_squares(basis: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, float]:
    weights = np.linalg.lstsq(basis, y, rcond=None)[0]
    return weights, float(((basis @ weights - y) ** 2).sum())
