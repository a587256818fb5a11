"""What a node keeps on disk: atomic, private where it must be, and whole after any crash."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from pathlib import Path

import pytest

from node.files import parse_bytes, read_private, show_bytes, write_atomic, write_private
from node.identity import load_identity
from node.keys import default_key, key_file, load_key, new_key
from node.lifetime import only_user_of, running_worker
from protocol.errors import InputError


def test_an_atomic_write_leaves_the_old_content_or_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "deep" / "file"
    write_atomic(file, b"old")
    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, step, lambda *_: (_ for _ in ()).throw(OSError("disk full")))
            with pytest.raises(OSError, match="disk full"):
                write_atomic(file, b"new")
        assert file.read_bytes() == b"old"
        assert [path.name for path in file.parent.iterdir()] == ["file"]
    write_atomic(file, b"new")
    assert file.read_bytes() == b"new"


def test_private_files(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    write_private(file, b"mine")
    assert file.stat().st_mode & 0o777 == 0o600
    with pytest.raises(InputError, match="exists already"):
        write_private(file, b"other")
    assert read_private(file) == b"mine"
    file.chmod(0o640)
    with pytest.raises(InputError, match="chmod 600"):
        read_private(file)


@pytest.mark.parametrize("reason", [errno.EPERM, errno.EOPNOTSUPP])
def test_private_files_can_be_written_where_there_are_no_links(
    reason: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a stick with FAT or exFAT, where a key is exported to."""

    def link(*_: object) -> None:
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(os, "link", link)
    file = tmp_path / "secret"
    write_private(file, b"mine")
    assert file.stat().st_mode & 0o777 == 0o600
    assert read_private(file) == b"mine"
    with pytest.raises(InputError, match="exists already"):
        write_private(file, b"other")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"mine"]
    steps = iter((None, OSError("disk full")))  # the file that is linked is whole, the one beside it is not

    def fsync(_: int) -> None:
        if (error := next(steps)) is not None:
            raise error

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="disk full"):
        write_private(tmp_path / "another", b"mine")
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]


def test_identities_and_keys(tmp_path: Path) -> None:
    assert load_identity(tmp_path).peer == load_identity(tmp_path).peer
    (tmp_path / "identity.key").write_bytes(b"short")
    with pytest.raises(InputError, match="damaged"):
        load_identity(tmp_path)
    assert default_key(tmp_path) == default_key(tmp_path) == load_key(tmp_path, "default")
    assert new_key(tmp_path, "work") != default_key(tmp_path)
    with pytest.raises(InputError, match="exists already"):
        new_key(tmp_path, "work")
    for name in ("../work", "a/b", "", ".hidden", "x" * 65):
        with pytest.raises(InputError, match="no key name"):
            key_file(tmp_path, name)


@pytest.mark.parametrize(("text", "size"), [("512MiB", 512 << 20), ("1.5G", 3 << 29), ("7", 7), ("2 kb", 2000)])
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "-1", "4 parsecs", "GiB", "1e9", "nan"])
def test_nonsense_sizes(text: str) -> None:
    with pytest.raises(InputError, match="512MiB"):
        parse_bytes(text)


def test_show_bytes() -> None:
    assert [show_bytes(count) for count in (7, 1536, 5 << 20, 3 << 40)] == ["7 B", "1.5 KiB", "5.0 MiB", "3.00 TiB"]


def test_one_process_for_one_folder(tmp_path: Path) -> None:
    second = only_user_of(tmp_path, "worker")
    with only_user_of(tmp_path, "worker"), pytest.raises(InputError, match="another sotto worker"), second:
        pass
    with only_user_of(tmp_path, "worker"):
        pass


def test_who_asks_whether_a_worker_runs_keeps_none_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker starts while the other looks."""
    with only_user_of(tmp_path, "worker"):
        pass  # its file is there
    flock, tried, outcomes = fcntl.flock, threading.Event(), []

    def start() -> None:
        try:
            with only_user_of(tmp_path, "worker"):
                outcomes.append("runs")
        except InputError as error:
            outcomes.append(str(error))

    worker = threading.Thread(target=start)

    def watched(handle: int, operation: int) -> None:
        if threading.current_thread() is worker:
            if not operation & fcntl.LOCK_NB:
                tried.set()  # it may have to wait
            try:
                flock(handle, operation)
            finally:
                tried.set()
            return
        flock(handle, operation)
        if operation & fcntl.LOCK_SH:
            worker.start()
            assert tried.wait(60)

    monkeypatch.setattr(fcntl, "flock", watched)
    assert running_worker(tmp_path) is None
    worker.join(60)
    assert outcomes == ["runs"]
