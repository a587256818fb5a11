"""The history as a picture: tokens per second and time to the first token, over time, a colour for each strategy."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from client.metalearning.record import Record
from protocol.errors import InputError
from protocol.strategy import describe
from simnet.bench.plots import panels, saved

PANELS = (("tokens_per_s", "tokens/s"), ("ttft_s", "time to first token, s"))


def draw(records: Sequence[Record], file: Path) -> None:
    """Write a PNG. Raises InputError when there is nothing to draw, or matplotlib is missing."""
    if not records:
        raise InputError("there are no such requests to draw: give other conditions")
    figure, axes = panels(len(PANELS), 1, (9, 7))
    for axis, (name, label) in zip(axes, PANELS, strict=True):
        for strategy in sorted({describe(record.strategy) for record in records}):
            points = [
                (datetime.fromtimestamp(record.at_ms / 1000, UTC).astimezone(), getattr(record.measured, name))
                for record in records
                if describe(record.strategy) == strategy and getattr(record.measured, name) is not None
            ]
            axis.plot(*zip(*points, strict=True), "o", markersize=4, label=strategy) if points else None
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
    axes[0].legend(fontsize="small")
    saved(figure, file)
