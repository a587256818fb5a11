"""`sotto select`: the selectors judged on any table of recorded performance."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from sotto.commands.common import Json, errors, print_json, progress_bar

METRICS = ("accuracy", "tolerant_accuracy", "macro_f1", "mean_fraction_of_oracle", "worst_decile")


def select(
    table: Annotated[Path, typer.Argument(metavar="TABLE.csv", help="A long table: one row per run, with a header.")],
    task_columns: Annotated[
        str, typer.Option(help="The columns that identify a task and are its features, separated by commas.")
    ],
    strategy_column: Annotated[str, typer.Option(help="The column that names the strategy.")],
    performance_column: Annotated[str, typer.Option(help="The column with what was measured.")],
    hold_out: Annotated[
        str, typer.Option(help="The column whose values are held out one by one; no feature, even if a task column.")
    ],
    lower_is_better: Annotated[
        bool, typer.Option("--lower-is-better", help="Performance is a cost: time, bytes, an error.")
    ] = False,
    regret: Annotated[
        str,
        typer.Option(
            help="ratio: performances of a task compare by their ratio. absolute: by their difference, as a share of "
            "the task's range; needed where values are zero or negative."
        ),
    ] = "ratio",
    as_json: Json = False,
) -> None:
    """Judge every selector on a table of recorded performance, leaving one group of tasks out at a time."""
    with errors(as_json):
        from client.metalearning import evaluate
        from client.metalearning.table import Columns, Scale, read
        from protocol.errors import InputError

        if regret not in ("ratio", "absolute"):
            raise InputError(f"unknown --regret {regret!r}: use ratio or absolute")
        columns = Columns(
            tasks=tuple(dict.fromkeys(name.strip() for name in task_columns.split(",") if name.strip())),
            strategy=strategy_column,
            performance=performance_column,
            hold_out=hold_out,
        )
        scale = Scale(lower_is_better=lower_is_better, absolute=regret == "absolute")
        try:
            with table.open(encoding="utf-8-sig", newline="") as lines:
                recorded = read(lines, columns, scale)
        except UnicodeDecodeError:
            raise InputError(f"{table} is not UTF-8 text") from None
        with progress_bar("folds", bytes_=False, quiet=as_json) as update:
            result = evaluate.report(recorded, time.process_time, update)
    if as_json:
        print_json(result)
    else:
        _print(result)


def _print(result: dict[str, Any]) -> None:
    print(
        f"{result['tasks']} tasks in {result['groups']} groups, {result['strategies']} strategies, "
        f"{result['measured_share']:.0%} of the cells measured, {result['runs_per_cell']:.1f} runs each"
    )
    print(f"{'selector':<19}" + "".join(f"{name.replace('_', ' '):>25}" for name in METRICS) + "  against the ranking")
    for name, figures in result["selectors"].items():
        low, high = figures["gain_over_fixed_ranking_interval"]
        cells = "".join(f"{figures[metric]:>25.3f}" for metric in METRICS)
        print(f"{name:<19}{cells}  {low:+.3f} to {high:+.3f}")
    chosen = result["chosen"]
    print(f"chosen: {chosen['name']}, " + ", ".join(f"{name} {chosen[name]:.3f}" for name in METRICS))
