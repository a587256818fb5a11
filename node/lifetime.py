"""How long a process lives: until a signal, or until the process that made it is gone."""

from __future__ import annotations

import fcntl
import json
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import trio

from protocol.errors import InputError


@asynccontextmanager
async def until_told(lifeline: int | None) -> AsyncIterator[None]:
    """A block that is cancelled by SIGINT, SIGTERM or the end of file of `lifeline` (an inherited pipe whose other end
    the maker holds). From the first line of the block on no signal is lost."""
    async with trio.open_nursery() as nursery:
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            nursery.start_soon(_signal, signals, nursery.cancel_scope)
            if lifeline is not None:
                nursery.start_soon(_end_of_file, lifeline, nursery.cancel_scope)
            yield
        nursery.cancel_scope.cancel()


async def _signal(signals: AsyncIterator[int], done: trio.CancelScope) -> None:
    async for _ in signals:
        done.cancel()


async def _end_of_file(lifeline: int, done: trio.CancelScope) -> None:
    async with trio.lowlevel.FdStream(os.dup(lifeline)) as pipe:
        while await pipe.receive_some(1):
            pass
    done.cancel()


def running_worker(folder: Path) -> dict[str, Any] | None:
    """What the worker that runs on `folder` states of itself (worker.json); None when none runs."""
    if not (folder / "lock").exists():
        return None
    try:
        with one_at_a_time(folder), open(folder / "lock", "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        pass
    except OSError:
        return None
    try:
        state = json.loads((folder / "worker.json").read_text())
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) else None


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Wait until no other process is in such a block with `folder`, made if need be. Blocks the thread."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def only_user_of(folder: Path, role: str) -> Iterator[None]:
    """Hold `folder` for this process alone: two nodes must not speak with one identity. Raises InputError."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            with one_at_a_time(folder):  # who asks whether a worker runs holds the lock for a moment
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"another sotto {role} uses {folder}: wait for it, or give this one its own --data-dir"
            ) from None
        yield
    finally:
        os.close(handle)
