"""`sotto history`: the records of this user's requests, shown, drawn, written to a file and read from one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sotto.commands.common import DataDir, Json, errors, only_behind, print_json

if TYPE_CHECKING:
    from client.metalearning.record import Record
    from node.history import History

WIDTH = 160  # of a table that does not go to a terminal

app = typer.Typer(invoke_without_command=True, help="What your requests took, and with which strategy.")
Where = Annotated[
    list[str] | None,
    typer.Option("--where", "-w", help="A condition, such as model=target or hops>=2; all that are given must hold."),
]
Last = Annotated[int, typer.Option(min=1, help="The newest so many.")]


@app.callback(epilog="Example: sotto history --where model=target --last 20")
def history(
    context: typer.Context,
    where: Where = None,
    last: Last = 20,
    plot: Annotated[Path | None, typer.Option(help="Draw them into this PNG file instead.")] = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Show what your requests took, the newest last. No prompts or answers are kept.

    Rows leave this machine only by 'export', summaries of them only with --share-records.
    """
    if context.invoked_subcommand is not None:
        with errors():
            only_behind(context)
        return
    with errors(as_json):
        from client.metalearning.record import to_row

        records = _found(data_dir, where, last)
        if plot is not None:
            from sotto.commands.history_plot import draw

            draw(records, plot)
        if as_json:
            print_json({"records": [to_row(record) for record in records], **({"plot": str(plot)} if plot else {})})
        elif plot is not None:
            print(f"{len(records)} requests drawn: {plot}")
        else:
            _print_table(records)


@app.command(epilog="Example: sotto history export requests.csv --where chosen_by=auto")
def export(
    file: Annotated[Path, typer.Argument(help="A .csv or a .parquet file, written anew.")],
    where: Where = None,
    last: Annotated[int | None, typer.Option(min=1, help="The newest so many. Default: all.")] = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Write records to a file, one column for each feature and figure."""
    with errors(as_json):
        from node.tables import write_table

        records = _found(data_dir, where, last)
        write_table(file, records)
        _say({"records": len(records), "file": str(file)}, f"{len(records)} records: {file}", as_json)


@app.command("import", epilog="Example: sotto history import requests.csv")
def import_(
    file: Annotated[Path, typer.Argument(help="What 'sotto history export' wrote.")],
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Add the records of a file. Those that are there already are not added again."""
    with errors(as_json):
        from node.tables import read_table

        records = read_table(file)
        with _open(data_dir) as history:
            added = history.add(records)
        said = f"{added} records added, {len(records) - added} were there already"
        _say({"added": added, "known": len(records) - added}, said, as_json)


def _open(data_dir: Path | None) -> History:
    from node.history import History
    from node.paths import data_dir as folder
    from node.paths import history_file

    return History(history_file(folder(data_dir)))


def _found(data_dir: Path | None, where: list[str] | None, last: int | None) -> list[Record]:
    from node.history import parse_condition

    conditions = [parse_condition(text) for text in where or []]
    with _open(data_dir) as history:
        return history.records(conditions, last)


def _print_table(records: list[Record]) -> None:
    from datetime import UTC, datetime

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from protocol.strategy import describe

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("when", no_wrap=True)
    for name, width in (("model", 5), ("strategy", 14), ("end", 6)):
        table.add_column(name, overflow="fold", min_width=width)
    for name in ("hops", "in+out", "first s", "tokens/s", "ms/token", "expected"):
        table.add_column(name, justify="right", no_wrap=True)
    for record in records:
        measured = record.measured
        table.add_row(
            datetime.fromtimestamp(record.at_ms / 1000, UTC).astimezone().strftime("%m-%d %H:%M"),
            escape(record.model),
            escape(describe(record.strategy)) + (f" ({record.why})" if record.why else ""),
            escape(measured.error or measured.finish),
            str(record.route.hops),
            f"{record.task.prompt_tokens}+{measured.tokens}",
            "-" if measured.ttft_s is None else f"{measured.ttft_s:.2f}",
            "-" if measured.tokens_per_s is None else f"{measured.tokens_per_s:.1f}",
            "-" if measured.answer_token_s is None else f"{1000 * measured.answer_token_s:.1f}",
            _expected(record),
        )
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    console.print(table if records else "no requests yet")


def _expected(record: Record) -> str:
    """What was predicted of `ms/token`, the first token's time included, and by how much that is usually off."""
    token_s, spread = record.predicted.answer_token_s, record.predicted.spread
    if token_s is None:
        return "-"
    return f"{1000 * token_s:.1f}" + ("" if spread is None else f" ±{spread:.0%}")


def _say(value: dict[str, Any], line: str, as_json: bool) -> None:
    if as_json:
        print_json(value)
    else:
        print(line)
