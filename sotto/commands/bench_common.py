"""What the commands of `sotto bench` have in common: options, where files go, and what is said meanwhile."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from simnet.bench.hear import Hear, nobody
from sotto.commands.common import drawn_bar

PACE_S = 3600.0  # a part of a benchmark takes minutes
Found = Callable[[dict[str, Any]], None]

Data = Annotated[
    Path | None,
    typer.Option(
        envvar="SOTTO_BENCH_DATA",
        exists=True,
        file_okay=False,
        help="Folder with azure_llm_trace_conv_2023.csv for the chat trace and spec_bench_question.jsonl for texts to "
        "edit. What it does not hold is made up. Default: ../shared/data, if there is such.",
    ),
]
DATA_BESIDE = Path("../shared/data")
Out = Annotated[
    Path | None,
    typer.Option(
        help="Append each result to this file as it is measured, one JSON object a line; it survives an interrupt."
    ),
]
Plots = Annotated[Path | None, typer.Option(help="Draw pictures (PNG) into this folder; needs the extra 'plots'.")]
Keep = Annotated[
    Path | None,
    typer.Option(
        help="Leave the workers' files and the requests' records in this new folder: 'sotto history --data-dir' takes "
        "the folders in it that hold client/history.db. Default: nothing stays."
    ),
]
BenchModel = Annotated[
    str, typer.Option("--model", "-m", help="A random model, 30m, 120m or 500m, or a folder in Hugging Face layout.")
]


@contextmanager
def workplace(keep: Path | None) -> Iterator[Path]:
    """The folder of a benchmark's files. Raises InputError where those of another are."""
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="sotto-bench-") as name:
            yield Path(name)
        return
    from protocol.errors import InputError

    folder = keep.expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise InputError(f"--keep {folder} is not empty: name a new folder")
    except OSError as error:
        raise InputError(f"--keep {folder} cannot be used: {error.strerror}") from error
    yield folder


def data_beside() -> Path | None:
    """Where data is when nobody says."""
    return DATA_BESIDE if DATA_BESIDE.is_dir() else None


@contextmanager
def listening(label: str, *, quiet: bool, found: Found = nobody) -> Iterator[Hear]:
    """Who hears a benchmark: on standard error a bar of `label` (what it counts) with what is measured now beside it;
    where there is no terminal, or it shall be `quiet`, lines alone. `found` gets the results."""
    from rich import progress
    from rich.console import Console

    if quiet or not Console(stderr=True).is_terminal:
        yield Hear(found=found, say=lambda text: print(text, file=sys.stderr))
        return
    units = (progress.MofNCompleteColumn(), progress.TimeElapsedColumn())
    with drawn_bar(label, units, pace_s=PACE_S) as (update, say):
        say("")  # it is seen before there is anything to count
        yield Hear(found=found, update=update, say=say)


@contextmanager
def lines(out: Path | None) -> Iterator[Found]:
    """Results go to the file line by line, each at once."""
    if out is None:
        yield nobody
        return
    with out.open("a", encoding="utf-8") as file:

        def write(result: dict[str, Any]) -> None:
            file.write(json.dumps(result) + "\n")
            file.flush()

        yield write


def words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]
