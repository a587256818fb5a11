"""The records of a collection: one JSON object for each run, in a file that is only ever added to.

The first line says what the rows were made with. Another grid, method, version or machine gives rows that must not
stand beside them: such a file is refused, and left as it is. A last line that an end by force tore is dropped. One
process at a time has a file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from node.lifetime import only_user_of
from node.recording import hardware
from node.version import VERSION
from protocol.errors import InputError
from simnet.bench.collect.tasks import METHOD

FILE = "runs.jsonl"
Row = dict[str, Any]
Key = tuple[int, int, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What rows of one file have in common."""

    grid: str
    method: int = METHOD
    version: str = VERSION
    torch: str = torch.__version__
    hardware: str

    @classmethod
    def here(cls, grid: str) -> Origin:
        return cls(grid=grid, torch=str(torch.__version__), hardware=hardware())


class Store:
    """The rows so far. Made by `opened`. `done`: what need not be run; runs that failed earlier are tried again."""

    def __init__(self, file: BinaryIO, rows: list[Row]) -> None:
        self._file = file
        self.rows = rows
        self.done: set[Key] = {key(row) for row in rows if "error" not in row}

    def add(self, row: Row) -> None:
        """On disk when this returns."""
        _write(self._file, row)
        self.rows.append(row)
        self.done.add(key(row))


@contextmanager
def opened(folder: Path, origin: Origin) -> Iterator[Store]:
    """The file in `folder`, made where there is none. Raises InputError (other origin, another process, damage)."""
    with only_user_of(folder, "collection"):
        path = folder / FILE
        with path.open("a+b") as file:
            file.seek(0)
            lines = file.read().splitlines(keepends=True)
            if lines and not lines[-1].endswith(b"\n"):
                file.truncate(sum(map(len, lines[:-1])))
                lines.pop()
            if not lines:
                _write(file, asdict(origin))
            else:
                require_same(path, _origin(path, lines[0]), origin)
            yield Store(file, _rows(path, lines[1:]))


def read(folder: Path) -> tuple[Origin, list[Row]]:
    """The rows of a collection, also while it runs. Raises InputError."""
    path = folder / FILE
    try:
        lines = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    except FileNotFoundError:
        lines = []
    if not lines:
        raise InputError(f"there are no records in {folder}: collect some with 'sotto bench collect' first")
    return _origin(path, lines[0]), _rows(path, lines[1:])


def key(row: Row) -> Key:
    return row["block"], row["context"], row["strategy"]


def require_same(path: Path, whose: Origin, origin: Origin) -> None:
    """Raises InputError unless the records in `path`, which are of `whose`, are of `origin`."""
    then, now = asdict(whose), asdict(origin)
    differing = [f"{name} {then[name]}, now {now[name]}" for name in now if then[name] != now[name]]
    if differing:
        raise InputError(
            f"{path} holds records of something else ({'; '.join(differing)}): name another --folder, they must not mix"
        )


def _origin(path: Path, line: bytes) -> Origin:
    try:
        return Origin(**json.loads(line))
    except (ValueError, TypeError):
        raise InputError(f"{path} is no file of records: name another --folder") from None


def _rows(path: Path, lines: list[bytes]) -> list[Row]:
    try:
        rows: list[Row] = [json.loads(line) for line in lines]
        for row in rows:
            key(row)
    except (ValueError, TypeError, KeyError):
        raise InputError(f"{path} is damaged: move it away, or name another --folder") from None
    return rows


def _write(file: BinaryIO, row: Row) -> None:
    file.write(json.dumps(row).encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())
