"""Local clusters of real daemons: N `sotto worker` processes on loopback, each with its own identity, data and limits.

A cluster is a folder: `cluster.json` with the processes, `worker-0/`, ... with what they keep and log. A process is
recorded with its start time, so that a recycled process id is never taken, or killed, for a worker. Clusters that must
not outlive their maker (demo, tests) hold a pipe whose end of file makes the workers stop, even after SIGKILL.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from node.files import write_atomic
from node.paths import state_dir
from protocol.errors import InputError

READY_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10.0
_POLL_S = 0.05
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """Limits of one worker, as its command line takes them."""

    memory: str = "2GiB"
    kv_memory: str = "512MiB"
    threads: int = 1


@dataclass(frozen=True, slots=True)
class WorkerProcess:
    """A running worker. `started` is when the process was created, Unix seconds."""

    folder: str
    pid: int
    started: float
    peer: str
    addrs: tuple[str, ...]
    metrics: str

    @property
    def alive(self) -> bool:
        return _start_time(self.pid) == self.started

    @property
    def bootstrap(self) -> str:
        """The address to give to `--bootstrap`."""
        return f"{self.addrs[0]}/p2p/{self.peer}"


@dataclass(frozen=True, slots=True)
class Cluster:
    folder: Path
    workers: tuple[WorkerProcess, ...]

    @property
    def bootstrap(self) -> str:
        return self.workers[0].bootstrap

    def save(self) -> None:
        record = {"workers": [asdict(worker) for worker in self.workers]}
        write_atomic(self.folder / "cluster.json", json.dumps(record, indent=1).encode())

    def stop(self) -> None:
        """End every worker: SIGTERM, and SIGKILL for those that do not follow. Returns when all are gone."""
        for sign, wait_s in ((signal.SIGTERM, STOP_TIMEOUT_S), (signal.SIGKILL, STOP_TIMEOUT_S)):
            for worker in self.workers:
                if worker.alive:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(worker.pid, sign)
            deadline = time.monotonic() + wait_s
            while any(worker.alive for worker in self.workers) and time.monotonic() < deadline:
                time.sleep(_POLL_S)
        (self.folder / "cluster.json").unlink(missing_ok=True)


def default_folder() -> Path:
    """Where the one simulation network of this user is recorded."""
    return state_dir() / "sim"


def load(folder: Path) -> Cluster:
    """The cluster recorded in `folder`. Raises InputError."""
    try:
        record = json.loads((folder / "cluster.json").read_text())
        workers = tuple(WorkerProcess(**{**item, "addrs": tuple(item["addrs"])}) for item in record["workers"])
    except FileNotFoundError:
        raise InputError("no simulation network is up: start one with 'sotto sim up --workers 3'") from None
    except (ValueError, TypeError, KeyError):
        raise InputError(f"{folder / 'cluster.json'} is damaged: stop the workers by hand and delete it") from None
    return Cluster(folder, workers)


def start(
    folder: Path, specs: Sequence[WorkerSpec], *, lifeline: int | None = None, notify: Callable[[str], None]
) -> Cluster:
    """Start one worker for each spec; the first is the bootstrap of the others. All are stopped if one fails.

    `lifeline` is a file descriptor to inherit: its end of file ends the workers. Raises InputError with the worker's
    own last words.
    """
    if (folder / "cluster.json").exists() and any(worker.alive for worker in load(folder).workers):
        raise InputError("a simulation network is up already: stop it with 'sotto sim down'")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    children: list[subprocess.Popen[bytes]] = []
    ready: list[WorkerProcess] = []
    try:
        for index, spec in enumerate(specs):
            bootstrap = ready[0].bootstrap if ready else None
            with _interrupts_held():  # between a process and our knowing it there is no moment for an interrupt
                children.append(_spawn(folder / f"worker-{index}", spec, bootstrap, lifeline))
            if index == 0:  # the others need its address; they start side by side
                ready.append(_wait_ready(folder / "worker-0", children[0]))
        ready += [_wait_ready(folder / f"worker-{i}", child) for i, child in enumerate(children) if i > 0]
        for index, worker in enumerate(ready):
            notify(f"worker {index}: process {worker.pid}, peer {worker.peer}")
        cluster = Cluster(folder, tuple(ready))
        cluster.save()
    except BaseException:
        _stop_children(children)
        raise
    return cluster


def restart(worker: WorkerProcess, spec: WorkerSpec, bootstrap: str | None = None) -> WorkerProcess:
    """Start a worker that has ended again, with what its folder holds. The caller stops it. Raises InputError."""
    folder = Path(worker.folder)
    (folder / "worker.json").unlink(missing_ok=True)  # SIGKILL left it
    child = _spawn(folder, spec, bootstrap, None)
    try:
        return _wait_ready(folder, child)
    except BaseException:
        _stop_children([child])
        raise


@contextlib.contextmanager
def running(
    folder: Path, specs: Sequence[WorkerSpec], notify: Callable[[str], None] = lambda _: None
) -> Iterator[Cluster]:
    """A cluster for the length of a `with` block, and not a moment longer, however this process ends."""
    read_end, write_end = os.pipe()
    try:
        cluster = start(folder, specs, lifeline=read_end, notify=notify)
        try:
            yield cluster
        finally:
            cluster.stop()
    finally:
        os.close(read_end)
        os.close(write_end)


def _spawn(folder: Path, spec: WorkerSpec, bootstrap: str | None, lifeline: int | None) -> subprocess.Popen[bytes]:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "sotto", "worker", "--data-dir", str(folder), "--listen", "/ip4/127.0.0.1/tcp/0"]
    command += ["--memory", spec.memory, "--kv-memory", spec.kv_memory, "--threads", str(spec.threads)]
    command += ["--metrics", "127.0.0.1:0", "--no-lan"]
    if bootstrap is not None:
        command += ["--bootstrap", bootstrap]
    if lifeline is not None:
        command += ["--lifeline", str(lifeline)]
    with (folder / "worker.log").open("wb") as log:
        # Its own session: an interrupt at the terminal reaches the parent alone, which then stops the workers in order.
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=() if lifeline is None else (lifeline,),
            start_new_session=True,
        )


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
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


def _wait_ready(folder: Path, child: subprocess.Popen[bytes]) -> WorkerProcess:
    """The worker's own statement, written once it listens. Raises InputError with its last words."""
    file, deadline = folder / "worker.json", time.monotonic() + READY_TIMEOUT_S
    while child.poll() is None and time.monotonic() < deadline:
        if file.exists():
            state = json.loads(file.read_text())
            started = _start_time(child.pid)
            if started is not None:
                return WorkerProcess(
                    str(folder), child.pid, started, state["peer"], tuple(state["addrs"]), state["metrics"]
                )
        time.sleep(_POLL_S)
    words = (folder / "worker.log").read_text(errors="replace").strip().splitlines()
    raise InputError(f"a worker did not start ({folder.name}): {words[-1] if words else 'it said nothing'}")


def _stop_children(children: Sequence[subprocess.Popen[bytes]]) -> None:
    for child in children:
        child.terminate()
    for child in children:
        try:
            child.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _start_time(pid: int) -> float | None:
    """When the process started, Unix seconds; None when it is gone or a zombie."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.NoSuchProcess:
        return None
