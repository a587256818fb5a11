"""`sotto select`: the selectors judged on any table of recorded performance."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sotto.commands.common import Json, errors, print_json, progress_bar, terminate_as_interrupt

if TYPE_CHECKING:
    from client.metalearning.evaluate import Judged
    from client.metalearning.table import Table

METRICS = ("accuracy", "tolerant_accuracy", "macro_f1", "mean_fraction_of_oracle", "worst_decile")
CELLS_OF_MANY = 2000  # tasks x strategies


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
    none: Annotated[
        str | None,
        typer.Option(
            help="The strategy that accelerates nothing, which the others are compared with. Default: 'none', or the "
            "first that the table names."
        ),
    ] = None,
    plots: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Draw regret, confusion and prediction there; needs matplotlib.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Judge every selector on a table of recorded performance, leaving one group of tasks out at a time."""
    with errors(as_json):
        from client.metalearning import evaluate
        from client.metalearning.table import Columns, Scale, read
        from protocol.errors import InputError

        if regret not in ("ratio", "absolute"):
            raise InputError(f"unknown --regret {regret!r}: use ratio or absolute")
        if plots is not None:
            from simnet.bench.plots import require

            require(plots)
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
        plain = none or (evaluate.NONE if evaluate.NONE in recorded.strategies else recorded.strategies[0])
        if plain not in recorded.strategies:
            raise InputError(f"--none {plain!r}: the table has the strategies {', '.join(recorded.strategies)}")
        with terminate_as_interrupt(), progress_bar("folds", bytes_=False, quiet=False) as update:
            judged = evaluate.judge_all(
                recorded, time.process_time, update, evaluate.selectors(plain), _processes(recorded)
            )
        result = evaluate.report(recorded, judged, plain)
        if plots is not None:
            result["plots"] = [str(path) for path in _draw(plots, recorded, judged[evaluate.OURS], result)]
    if as_json:
        print_json(result)
    else:
        _print(result)


def _processes(table: Table) -> int:
    """One per core, up to four; one alone for a table that is done before another would have started."""
    from node.cores import cores

    return min(4, cores()) if table.performance.size >= CELLS_OF_MANY else 1


def _draw(folder: Path, table: Table, ours: Judged, report: dict[str, Any]) -> list[Path]:
    """What every selector loses; what the product's own confused and predicted."""
    from client.metalearning.metrics import truths
    from simnet.bench import selection_plots

    best = truths(table, ours.choices).tolist()
    measured = table.measured
    return [
        selection_plots.regret(folder / "regret.png", report),
        selection_plots.confusion(folder / "confusion.png", ours.choices.tolist(), best, table.strategies),
        selection_plots.predicted(
            folder / "predicted.png", ours.expected[measured].tolist(), table.fractions[measured].tolist()
        ),
    ]


def _print(result: dict[str, Any]) -> None:
    empty, lone = result["rows_without_performance"], result["tasks_with_one_strategy"]
    print(
        f"{result['tasks']} tasks in {result['groups']} groups, left out in {result['folds']} folds, "
        f"{result['strategies']} strategies, {result['measured_share']:.0%} of the cells measured, "
        f"{result['runs_per_cell']:.1f} runs each{f'; {empty} rows without a performance' if empty else ''}"
        f"{f'; {lone} tasks with one strategy alone' if lone else ''}; "
        f"without acceleration: {result['none']}"
    )
    print(f"{'selector':<19}" + "".join(f"{name.replace('_', ' '):>25}" for name in METRICS) + "  against the ranking")
    for name, figures in result["selectors"].items():
        low, high = figures["gain_over_fixed_ranking_interval"]
        cells = "".join(f"{figures[metric]:>25.3f}" for metric in METRICS)
        print(f"{name:<19}{cells}  {low:+.3f} to {high:+.3f}")
    chosen = result["chosen"]
    print(f"chosen: {chosen['name']}, " + ", ".join(f"{name} {chosen[name]:.3f}" for name in METRICS))
    for path in result.get("plots", ()):
        print(f"drawn: {path}")
