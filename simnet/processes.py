"""Processes of a cluster: started so that none is lost, known again later, ended for certain.

A process is known by its id and the time at which it was created, so that a recycled id is never taken, or killed, for
it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from protocol.errors import InputError

READY_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10.0
_POLL_S = 0.05
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """`started` is when the process was created, Unix seconds."""

    pid: int
    started: float

    @property
    def alive(self) -> bool:
        return _start_time(self.pid) == self.started

    @property
    def state(self) -> str:
        """up, frozen (stopped by a signal) or down."""
        if not self.alive:
            return "down"
        with contextlib.suppress(psutil.NoSuchProcess):
            return "frozen" if psutil.Process(self.pid).status() == psutil.STATUS_STOPPED else "up"
        return "down"

    def send(self, sign: signal.Signals) -> bool:
        """False when the process is gone."""
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, sign)
                return True
        return False


def identify(child: subprocess.Popen[bytes]) -> Process:
    """A child as it can be found again by other programs. Call it before the child is waited for."""
    return Process(pid=child.pid, started=_start_time(child.pid) or 0.0)


def stop(processes: Sequence[Process]) -> None:
    """SIGTERM, and SIGKILL for those that do not follow. Returns when all are gone."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            process.send(sign)
            process.send(signal.SIGCONT)  # what is frozen hears nothing else
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while any(process.alive for process in processes) and time.monotonic() < deadline:
            time.sleep(_POLL_S)


def stop_children(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """The same for processes of our own, which must also be waited for."""
    for child in children:
        child.terminate()
    for child in children:
        try:
            child.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def spawn(words: Sequence[str], log: Path, lifeline: int | None) -> subprocess.Popen[bytes]:
    """`sotto` with `words`, in the background. `lifeline` is a file descriptor to inherit: its end of file ends it."""
    command = [sys.executable, "-m", "sotto", *words]
    if lifeline is not None:
        command += ["--lifeline", str(lifeline)]
    with log.open("ab") as file:
        # Its own session: an interrupt at the terminal reaches the parent alone, which then stops the rest in order.
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            pass_fds=() if lifeline is None else (lifeline,),
            start_new_session=True,
        )


def wait_ready(name: str, child: subprocess.Popen[bytes], statement: Path, log: Path) -> dict[str, Any]:
    """The process's own `statement`, which it writes once it serves. Raises InputError with its last words."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    while child.poll() is None and time.monotonic() < deadline:
        if statement.exists():
            state: dict[str, Any] = json.loads(statement.read_text())
            return state
        time.sleep(_POLL_S)
    words = log.read_text(errors="replace").strip().splitlines()
    raise InputError(f"{name} did not start: {words[-1] if words else 'it said nothing'}")


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """SIGINT and SIGTERM that come within the block are delivered at its end."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are handled in the main thread only
        return
    held: list[int] = []
    before = {sign: signal.signal(sign, lambda number, _: held.append(number)) for sign in _INTERRUPTS}
    try:
        yield
    finally:
        for sign, handler in before.items():
            signal.signal(sign, handler)
        for number in held:
            signal.raise_signal(number)


def _start_time(pid: int) -> float | None:
    """When the process started, Unix seconds; None when it is gone or a zombie."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.NoSuchProcess:
        return None
