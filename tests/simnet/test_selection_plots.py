"""Pictures of how good choices are: each is drawn, also of little or odd data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="matplotlib is an extra")

from matplotlib import axes

from simnet.bench import selection_plots

FIGURES = {"mean_fraction_of_oracle": 0.9, "worst_decile": 0.5, "mean_fraction_of_oracle_interval": (0.85, 0.93)}
REPORT: dict[str, Any] = {
    "selectors": {
        "sotto": FIGURES,
        "random": {"mean_fraction_of_oracle": 0.6, "worst_decile": 0.2},
        "oracle": {"mean_fraction_of_oracle": 1.0, "worst_decile": 1.0},
    }
}


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


def test_regret_is_what_is_lost_and_the_oracle_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bars = dict[str, float]()
    drawn = axes.Axes.barh

    def noting(self: Any, names: list[str], widths: list[float], **words: Any) -> Any:
        bars.update(zip(names, widths, strict=True))
        return drawn(self, names, widths, **words)

    monkeypatch.setattr(axes.Axes, "barh", noting)
    assert is_png(selection_plots.regret(tmp_path / "new" / "regret.png", REPORT))
    assert bars == pytest.approx({"random": 0.4, "sotto": 0.1})


def test_confusion_counts_best_by_row_and_chosen_by_column(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cells = dict[tuple[int, int], str]()
    monkeypatch.setattr(axes.Axes, "text", lambda self, x, y, text, **_: cells.update({(y, x): text}))
    path = selection_plots.confusion(tmp_path / "confusion.png", [0, 2, 2], [0, 0, 2], ["a", "never", "c"])
    assert is_png(path)
    assert cells == {(0, 0): "1", (0, 1): "1", (1, 0): "0", (1, 1): "1"}


@pytest.mark.parametrize("values", [[], [0.5], [0.0, float("nan"), 1.0], [0.01, 0.2, 1.0]])
def test_prediction_is_drawn_of_whatever_is_there(values: list[float], tmp_path: Path) -> None:
    assert is_png(selection_plots.predicted(tmp_path / "predicted.png", values, values))


def test_many_strategies_are_drawn_without_numbers(tmp_path: Path) -> None:
    numbers = np.arange(40).tolist()
    path = selection_plots.confusion(tmp_path / "many.png", numbers, numbers[::-1], [f"x={n}" * 20 for n in numbers])
    assert is_png(path)


def test_learning_curves_are_drawn(tmp_path: Path) -> None:
    points = {"sotto": [(240.0, 0.97), (30.0, 0.9)], "knn": [(30.0, 0.8)], "nothing": []}
    assert is_png(selection_plots.learning_curve(tmp_path / "curve.png", points))
