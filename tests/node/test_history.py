"""The history file: migrations, append-only, bounds, two processes, and what may be wrong with a file."""

from __future__ import annotations

import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from client.metalearning.record import COLUMNS, Record, to_row
from node.history import MIGRATIONS, Condition, History, HistoryBusy, _translated, parse_condition
from protocol.errors import InputError
from tests.helpers.records import RECORD, numbered

NO_LONGER = {"predicted_ttft_s"}  # in the table, and not recorded


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "history.db"


def test_what_is_added_is_there_after_the_file_was_closed(path: Path) -> None:
    with History(path) as history:
        assert history.add([numbered(1), numbered(2)]) == 2
    with History(path) as history:
        assert history.records() == [numbered(1), numbered(2)]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_migrations_lead_to_the_columns_of_a_record(path: Path) -> None:
    History(path).close()
    with sqlite3.connect(path) as db:
        table = db.execute("PRAGMA table_info(records)").fetchall()
        assert db.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),)
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    table = [each for each in table if each[1] not in NO_LONGER]
    kinds = {str: "TEXT", int: "INTEGER", bool: "INTEGER", float: "REAL"}
    assert {name: kind for _, name, kind, *_ in table if name != "id"} == {
        column.name: kinds.get(column.kind, "TEXT") for column in COLUMNS.values()
    }
    assert {name for _, name, _, required, *_ in table if not required} - {"id"} == {
        column.name for column in COLUMNS.values() if column.optional
    }


def test_a_record_is_added_once(path: Path) -> None:
    with History(path) as history:
        history.add([RECORD])
        assert history.add([RECORD, numbered(7), RECORD]) == 1
        assert len(history) == 2


def test_rows_are_bounded_and_the_oldest_go_first(path: Path) -> None:
    with History(path, rows_max=3) as history:
        for number in range(5):
            history.add([numbered(number)])
        assert [record.uid for record in history.records()] == [f"{number:032x}" for number in (2, 3, 4)]


def test_only_rows_that_are_there_count_towards_the_bound(path: Path) -> None:
    """Rows that are added again and ignored use up numbers, which are no measure of how many there are."""
    with History(path, rows_max=10) as history:
        for _ in range(3):
            history.add(numbered(number) for number in range(7))
        history.add([numbered(7)])
        assert len(history) == 8


def test_the_newest_are_those_of_the_latest_time(path: Path) -> None:
    """An old export that is imported does not pass for what was measured last."""
    with History(path, rows_max=10) as history:
        history.add(numbered(number, at_ms=1000 + number) for number in range(6))
        history.add(numbered(100 + number, at_ms=number) for number in range(8))
        found = [int(record.uid, 16) for record in history.records()]
        assert found == [104, 105, 106, 107, 0, 1, 2, 3, 4, 5]
        assert [int(record.uid, 16) for record in history.records(last=2)] == [4, 5]


def test_many_rows_are_written_in_parts(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that nobody waits for all of them."""
    monkeypatch.setattr("node.history.ROWS_AT_ONCE", 2)
    with History(path) as history, History(path) as other:

        def seen() -> Iterator[Record]:
            for number in range(5):
                assert len(other) == number // 2 * 2
                yield numbered(number)

        assert history.add(seen()) == 5


def test_while_another_writes_a_reader_reads_and_a_writer_is_told_so(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("node.history.BUSY_S", 0.0)
    with History(path) as history, History(path) as other:
        history.add([RECORD])
        with history._writing():
            with History(path) as reader:
                assert reader.records() == [RECORD]
            with pytest.raises(HistoryBusy, match="try again"):
                other.add([numbered(2)])
        assert other.add([numbered(2)]) == 1


def test_another_that_repairs_the_file_is_waited_for_like_one_that_writes(path: Path) -> None:
    error = sqlite3.OperationalError("database is locked")
    error.sqlite_errorcode = sqlite3.SQLITE_BUSY_RECOVERY
    with pytest.raises(HistoryBusy, match="try again"), _translated(path):
        raise error


def test_what_fails_in_the_middle_is_undone_and_nobody_waits_for_it(path: Path) -> None:
    def halfway(history: History) -> None:
        with history._writing():
            history._db.execute("DELETE FROM records")
            raise KeyboardInterrupt

    with History(path) as history:
        history.add([RECORD])
        with pytest.raises(KeyboardInterrupt):
            halfway(history)
        with History(path) as other:
            assert other.records() == [RECORD]
            assert other.add([numbered(1)]) == 1
        assert history.add([numbered(2)]) == 1


def test_a_row_cannot_be_changed(path: Path) -> None:
    with History(path) as history:
        history.add([RECORD])
        with sqlite3.connect(path) as db, pytest.raises(sqlite3.IntegrityError, match="never changed"):
            db.execute("UPDATE records SET measured_ttft_s = 0.001")


def test_filters(path: Path) -> None:
    with History(path) as history:
        slow = replace(RECORD.measured, tokens_per_s=9.5)
        history.add([numbered(1), numbered(2, model="other"), numbered(3, measured=slow)])

        def found(*conditions: str, last: int | None = None) -> list[int]:
            return [int(str(row["uid"]), 16) for row in history.rows([parse_condition(c) for c in conditions], last)]

        assert found() == [1, 2, 3]
        assert found(last=2) == [2, 3]
        assert found("model=demo") == [1, 3]
        assert found("model != demo") == [2]
        assert found("tokens_per_s>10") == [1, 2]  # as a number: 9.5 is more than 10 as a text
        assert found("model=demo", "measured_tokens_per_s<=9.5") == [3]
        assert found("model=' OR 1=1 --") == []


@pytest.mark.parametrize(
    ("text", "why"),
    [("", "no condition"), ("model", "no condition"), ("secret=1", "no column"), ("token_s>1", "several columns")],
)
def test_conditions_that_cannot_be_meant_are_refused(text: str, why: str) -> None:
    with pytest.raises(InputError, match=why):
        parse_condition(text)


def test_a_condition_names_its_column_with_or_without_the_part() -> None:
    assert parse_condition(" hops >= 2 ") == parse_condition("route_hops>=2") == Condition("route_hops", ">=", "2")


def test_a_file_of_a_newer_version_is_left_alone(path: Path) -> None:
    History(path).close()
    with sqlite3.connect(path) as db:
        db.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    with pytest.raises(InputError, match="newer version"):
        History(path)


def test_a_file_that_is_no_database_is_named_and_kept(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"these are my notes, not yours\n" * 200)
    with pytest.raises(InputError, match=r"history\.db cannot be used .*move it away"):
        History(path)
    assert path.read_bytes().startswith(b"these are my notes")


def test_a_row_that_was_tampered_with_is_refused(path: Path) -> None:
    with History(path) as history:
        history.add([RECORD])
        with sqlite3.connect(path) as db:
            db.execute("DROP TRIGGER append_only")
            db.execute("UPDATE records SET measured_tokens = -5")
        with pytest.raises(InputError, match="measured_tokens"):
            history.records()


def test_two_processes_write_at_the_same_time(path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from node.history import History; "
        "from tests.helpers.records import numbered\n"
        "first = int(sys.argv[2])\n"
        "with History(Path(sys.argv[1])) as history:\n"
        "    for number in range(first, first + 100): history.add([numbered(number)])"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path), first]) for first in ("0", "1000")]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    with History(path) as history:
        assert len(history) == 200
        assert len(set(history.records())) == 200


def test_whoever_opens_a_new_file_waits_for_whoever_makes_it(tmp_path: Path) -> None:
    def opened(number: int) -> None:
        together.wait()
        with History(tmp_path / str(number // 4) / "history.db"):
            pass

    together = threading.Barrier(4)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(opened, range(200)))


def test_a_second_user_in_one_process_keeps_the_locks_of_the_first(path: Path) -> None:
    """The system drops all of a process's locks on a file as soon as it closes any handle of it."""
    code = (
        "import sqlite3, sys; db = sqlite3.connect(sys.argv[1], timeout=0); "
        "print(db.execute('PRAGMA journal_mode = DELETE').fetchone())"  # only who is alone with the file may
    )
    with History(path) as first:
        first.add([RECORD])
        History(path).close()
        other = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
        assert "database is locked" in other.stderr


def test_a_file_of_the_first_schema_keeps_its_rows(path: Path) -> None:
    """What it had no column for is nothing."""
    later = {"why", "price_per_hour", "budget", "predicted_answer_token_s", "predicted_spread"}
    later |= {"measured_preemptions", "measured_losses", "measured_kv_bytes", "task_guess_us", "task_agreement"}
    row = {name: value for name, value in to_row(numbered(1)).items() if name not in later}
    path.parent.mkdir()
    with sqlite3.connect(path) as db:
        db.executescript(MIGRATIONS[0])
        row |= dict.fromkeys(NO_LONGER, 0.25)
        db.execute(f"INSERT INTO records ({', '.join(row)}) VALUES ({', '.join(f':{name}' for name in row)})", row)
        db.execute("PRAGMA user_version = 1")
    db.close()
    with History(path) as history:
        uncounted = replace(RECORD.measured, preemptions=None, losses=None, kv_bytes=None)
        assert history.records() == [replace(numbered(1), measured=uncounted)]
        assert history.add([numbered(2, why="trial", price_per_hour=0.5)]) == 1
        assert not NO_LONGER & set(history.rows()[0])
        assert len(history) == 2
