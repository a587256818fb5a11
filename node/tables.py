"""Tables of records as files: CSV always, Parquet where pyarrow is installed (the extra `parquet`).

A file that is read is somebody else's: its size is bounded, and each row is checked by client/metalearning/record.py.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from client.metalearning.record import COLUMNS, Record, from_row, to_row
from node.files import write_atomic
from protocol.errors import InputError

FILE_BYTES_MAX = 1 << 30
ROW_CHARS_MAX = 64 << 10


def write_table(path: Path, records: Iterable[Record]) -> None:
    """Write `records` to `path`, by its ending .csv or .parquet. Raises InputError, OSError."""
    rows = [to_row(record) for record in records]
    if _is_parquet(path):
        arrow, parquet = _pyarrow()
        kinds = {int: arrow.int64(), bool: arrow.int64(), float: arrow.float64()}
        schema = arrow.schema([(c.name, kinds.get(c.kind, arrow.string())) for c in COLUMNS.values()])
        sink = arrow.BufferOutputStream()
        parquet.write_table(arrow.Table.from_pylist(rows, schema=schema), sink)
        write_atomic(path, sink.getvalue().to_pybytes())
        return
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue().encode())


def read_table(path: Path) -> list[Record]:
    """The records in `path`. Raises InputError naming the first bad row."""
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            raise InputError(f"{path} has more than {FILE_BYTES_MAX >> 20} MiB: split it")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    rows = _parquet_rows(path) if _is_parquet(path) else _csv_rows(path)
    records = []
    for number, row in enumerate(rows, start=2):  # as an editor counts lines, the header being the first
        try:
            records.append(from_row(row))
        except InputError as error:
            raise InputError(f"{path} line {number}: {error}") from None
    return records


def _csv_rows(path: Path) -> Iterable[Mapping[str, object]]:
    csv.field_size_limit(ROW_CHARS_MAX)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from csv.DictReader(file)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no table of comma-separated values ({error})") from None


def _parquet_rows(path: Path) -> Iterable[Mapping[str, object]]:
    arrow, parquet = _pyarrow()
    try:
        there = [name for name in parquet.read_schema(path).names if name in COLUMNS]
        rows: list[dict[str, Any]] = parquet.read_table(path, columns=there).to_pylist()
    except (arrow.ArrowException, OSError) as error:
        raise InputError(f"{path} is no table in Parquet ({' '.join(str(error).split())[:200]})") from None
    return rows


def _is_parquet(path: Path) -> bool:
    if path.suffix not in (".csv", ".parquet"):
        raise InputError(f"{path}: the name must end in .csv or .parquet")
    return path.suffix == ".parquet"


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(
            "Parquet needs pyarrow: pip install -e '.[parquet]' where sotto was cloned, or use a .csv file"
        ) from None
    return pyarrow, pyarrow.parquet
