"""What the commands of `sotto bench` have in common: options, where files go, and what is said meanwhile."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

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


def say_line(text: str) -> None:
    """A line on standard error that says what is measured now."""
    from rich.console import Console

    Console(stderr=True).print(text, markup=False, highlight=False)


@contextmanager
def lines(out: Path | None) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Results go to the file line by line, each at once."""
    if out is None:
        yield lambda _: None
        return
    with out.open("a", encoding="utf-8") as file:

        def write(result: dict[str, Any]) -> None:
            file.write(json.dumps(result) + "\n")
            file.flush()

        yield write


def words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]
