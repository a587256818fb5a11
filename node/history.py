"""The history: one row for each finished request, in one SQLite file of the client's data folder.

Invariant: rows are only ever added, and dropped when there are more than ROWS_MAX, the oldest by their time first; a
trigger refuses any change. Any number of processes may use the file (WAL: a writer waits for another, readers for
nobody). The schema has a number, and MIGRATIONS leads from each to the next. What a row means is
client/metalearning/record.py's. Synchronous: callers on an event loop use a thread (node/recording.py does).
"""

from __future__ import annotations

import os
import re
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from client.metalearning.record import COLUMNS, Record, Scalar, from_row, to_row
from node.lifetime import one_at_a_time
from protocol.errors import InputError

ROWS_MAX = 200_000  # about 100 MB
BUSY_S = 5.0  # how long to wait for another writer, whose transactions take milliseconds
ROWS_AT_ONCE = 500  # of a transaction: an import of a hundred thousand rows would else lock requests out for longer
DROP_OLDEST = """
    DELETE FROM records WHERE (at_ms, id) <=
        (SELECT at_ms, id FROM records ORDER BY at_ms DESC, id DESC LIMIT 1 OFFSET ?)
"""
OPERATORS = ("<=", ">=", "!=", "=", "<", ">")

# Never edit one that was released: add the next. What is no longer recorded stays in the table, empty: SQLite drops
# columns from 3.35 on, which Python 3.11 may come without. That is predicted_ttft_s, which nobody ever predicted.
MIGRATIONS = (
    """
    CREATE TABLE records (
        id INTEGER PRIMARY KEY AUTOINCREMENT, uid TEXT NOT NULL UNIQUE, at_ms INTEGER NOT NULL,
        origin TEXT NOT NULL, simulated INTEGER NOT NULL, version TEXT NOT NULL, torch TEXT NOT NULL,
        hardware TEXT NOT NULL, model TEXT NOT NULL, tier TEXT NOT NULL, chosen_by TEXT NOT NULL,
        strategy TEXT NOT NULL,
        model_family TEXT NOT NULL, model_layers INTEGER NOT NULL, model_width INTEGER NOT NULL,
        model_mlp_width INTEGER NOT NULL, model_heads INTEGER NOT NULL, model_kv_heads INTEGER NOT NULL,
        model_vocabulary INTEGER NOT NULL, model_context INTEGER NOT NULL, model_parameters INTEGER NOT NULL,
        model_weight_bytes REAL NOT NULL,
        route_hops INTEGER NOT NULL, route_span_us TEXT NOT NULL, route_leg_rtt_ms TEXT NOT NULL,
        route_compute_us REAL NOT NULL, route_compute_us_max REAL NOT NULL, route_rtt_ms REAL NOT NULL,
        route_rtt_ms_max REAL NOT NULL, route_bandwidth_mbit_s REAL, route_read_gb_s_min REAL NOT NULL,
        route_gflop_s_min REAL NOT NULL, route_gpus INTEGER NOT NULL, route_kv_free_tokens INTEGER NOT NULL,
        route_load_percent_max INTEGER NOT NULL, route_relayed INTEGER NOT NULL,
        task_prompt_tokens INTEGER NOT NULL, task_max_new_tokens INTEGER NOT NULL,
        task_concurrency INTEGER NOT NULL, task_shared_prefix REAL NOT NULL, task_repetition REAL NOT NULL,
        task_temperature REAL NOT NULL, task_objective TEXT NOT NULL, task_exact INTEGER NOT NULL,
        predicted_token_s REAL, predicted_ttft_s REAL,
        measured_tokens INTEGER NOT NULL, measured_ttft_s REAL, measured_token_s REAL,
        measured_total_s REAL NOT NULL, measured_tokens_per_s REAL, measured_bytes_out INTEGER NOT NULL,
        measured_bytes_in INTEGER NOT NULL, measured_drafted INTEGER NOT NULL, measured_accepted INTEGER NOT NULL,
        measured_prefix_tokens INTEGER NOT NULL, measured_finish TEXT NOT NULL, measured_error TEXT NOT NULL
    );
    CREATE TRIGGER append_only BEFORE UPDATE ON records BEGIN SELECT RAISE(ABORT, 'rows are never changed'); END;
    """,
    "ALTER TABLE records ADD COLUMN measured_preemptions INTEGER;",
    """
    ALTER TABLE records ADD COLUMN why TEXT NOT NULL DEFAULT '';
    ALTER TABLE records ADD COLUMN price_per_hour REAL;
    ALTER TABLE records ADD COLUMN budget REAL;
    ALTER TABLE records ADD COLUMN predicted_answer_token_s REAL;
    ALTER TABLE records ADD COLUMN predicted_spread REAL;
    """,
    "ALTER TABLE records ADD COLUMN measured_losses INTEGER;",
    "CREATE INDEX by_time ON records (at_ms, id);",
    "ALTER TABLE records ADD COLUMN measured_kv_bytes INTEGER;",
    """
    ALTER TABLE records ADD COLUMN task_guess_us REAL;
    ALTER TABLE records ADD COLUMN task_agreement REAL;
    """,
)


class HistoryBusy(InputError):
    """Another process has been writing for longer than BUSY_S. Nothing is wrong with the file."""


@dataclass(frozen=True, slots=True)
class Condition:
    """`column` `operator` `value`, as `--where` has it."""

    column: str
    operator: str
    value: str


def parse_condition(text: str) -> Condition:
    """'model=demo', 'measured_tokens_per_s>10'. A column may be named without its part where only one has that name.

    Raises InputError naming the columns that there are.
    """
    match = re.fullmatch(r"\s*(\w+)\s*(<=|>=|!=|=|<|>)\s*(.*?)\s*", text)
    if match is None:
        raise InputError(f"{text!r} is no condition: write NAME=VALUE, with one of {' '.join(OPERATORS)}")
    name = match[1]
    found = [name] if name in COLUMNS else [each for each in COLUMNS if each.partition("_")[2] == name]
    if len(found) != 1:
        known = found or COLUMNS
        raise InputError(f"{name!r} names {'several columns' if found else 'no column'}: use one of {', '.join(known)}")
    return Condition(found[0], match[2], match[3])


class History:
    """An open file. Use as a context manager, or `close`. One thread at a time."""

    def __init__(self, path: Path, rows_max: int = ROWS_MAX) -> None:
        """Open or make the file, and bring its schema up to date. Raises InputError saying what to do."""
        self.path, self._rows_max = path, rows_max
        with _translated(path):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            _create(path)
            self._db = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
        try:
            # SQLite does not wait to change the journal of a new file: the second to come hears "database is locked".
            with _translated(path), one_at_a_time(path.parent):
                self._db.row_factory = sqlite3.Row
                self._migrate()
        except BaseException:
            self._db.close()
            raise

    def __enter__(self) -> History:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Idempotent."""
        self._db.close()

    def add(self, records: Iterable[Record]) -> int:
        """Append those that are not there yet; how many. Durable but for a power cut. Raises InputError."""
        places = ", ".join(f":{name}" for name in COLUMNS)
        insert = f"INSERT OR IGNORE INTO records ({', '.join(COLUMNS)}) VALUES ({places})"
        added, rows = 0, map(to_row, records)
        with _translated(self.path):
            while some := list(islice(rows, ROWS_AT_ONCE)):
                with self._writing():
                    before = self._db.total_changes
                    self._db.executemany(insert, some)
                    added += self._db.total_changes - before
                    self._db.execute(DROP_OLDEST, (self._rows_max,))
        return added

    def rows(self, where: Sequence[Condition] = (), last: int | None = None) -> list[dict[str, Scalar]]:
        """The rows that all of `where` hold for, the oldest first; only the `last` of them. Raises InputError."""
        tests = " AND ".join(f"{each.column} {each.operator} ?" for each in where) or "TRUE"
        query = f"SELECT {', '.join(COLUMNS)} FROM records WHERE {tests} ORDER BY at_ms DESC, id DESC LIMIT ?"
        with _translated(self.path):
            found = self._db.execute(query, (*(each.value for each in where), -1 if last is None else last)).fetchall()
        return [dict(row) for row in reversed(found)]

    def records(self, where: Sequence[Condition] = (), last: int | None = None) -> list[Record]:
        """`rows` as records. Raises InputError on a row that was tampered with."""
        return [from_row(row) for row in self.rows(where, last)]

    def __len__(self) -> int:
        with _translated(self.path):
            return int(self._db.execute("SELECT COUNT(*) FROM records").fetchone()[0])

    def _migrate(self) -> None:
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")
        if self._version() == len(MIGRATIONS):
            return  # a reader waits for nobody
        with self._writing():
            done = self._version()  # another may have been at it meanwhile
            if done > len(MIGRATIONS):
                raise InputError(
                    f"{self.path} was written by a newer version of sotto: use that, or move the file away"
                )
            for script in MIGRATIONS[done:]:
                for statement in _statements(script):
                    self._db.execute(statement)
            self._db.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")

    def _version(self) -> int:
        return int(self._db.execute("PRAGMA user_version").fetchone()[0])

    @contextmanager
    def _writing(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")


def _create(path: Path) -> None:
    """Make the file where there is none: SQLite gives its other files the same mode. One that exists is left alone, for
    to close any handle of it would drop the locks that SQLite holds for this process."""
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))


def _statements(script: str) -> Iterator[str]:
    """Each statement by itself: executescript would commit between them."""
    statement = ""
    for part in script.split(";"):
        statement += f"{part};"
        if part.strip() and sqlite3.complete_statement(statement):
            yield statement
            statement = ""


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise HistoryBusy(f"the history {path} is being written by another process: try again later") from None
        raise _unusable(path, error) from None
    except sqlite3.DatabaseError as error:
        raise _unusable(path, error) from None
    except OSError as error:
        raise InputError(f"cannot open the history {path}: {error.strerror}") from None


def _unusable(path: Path, error: sqlite3.DatabaseError) -> InputError:
    return InputError(f"the history {path} cannot be used ({error}): move it away, and a new one is begun")
