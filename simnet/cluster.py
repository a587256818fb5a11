"""Local clusters of real daemons: `sotto worker` processes on loopback, each with its own identity, data and limits,
and where links are shaped, a proxy that carries all that they say to each other and to the client.

A cluster is a folder: `cluster.json` with the processes, one folder for each worker with what it keeps and logs. Every
process is on record as soon as it exists, also while a cluster is still starting. Clusters that must not outlive their
maker (demo, tests) hold a pipe whose end of file makes all their processes stop, even after SIGKILL.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import trio

from node.files import write_atomic
from node.paths import state_dir
from protocol.errors import InputError
from simnet.processes import Process, identify, interrupts_held, spawn, stop, stop_children, wait_ready
from simnet.proxy import dialling_host
from simnet.shape import Shape, Wiring, load_wiring

SETTLE_S = 0.3  # until the proxy has read what the links are now
_RECORD = "cluster.json"
_ANY_PORT = "/ip4/127.0.0.1/tcp/0"


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """Limits of one worker, as its command line takes them. Without a name it is worker-0, worker-1, ... `options` are
    further words of its command line."""

    memory: str = "2GiB"
    kv_memory: str = "512MiB"
    threads: int = 1
    name: str = ""
    options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerProcess(Process):
    """A running worker; `addrs` is empty as long as it does not serve. `command` starts it again."""

    name: str
    folder: str
    command: tuple[str, ...]
    peer: str = ""
    addrs: tuple[str, ...] = ()
    metrics: str = ""

    @property
    def bootstrap(self) -> str:
        """The address to give to `--bootstrap`. Raises InputError."""
        if not self.addrs:
            raise InputError(f"{self.name} does not serve yet: wait until the network is up, or 'sotto sim down'")
        return f"{self.addrs[0]}/p2p/{self.peer}"


@dataclass(frozen=True, slots=True)
class Cluster:
    """A cluster as it was when it was read. `lifeline` is known to its maker only."""

    folder: Path
    workers: tuple[WorkerProcess, ...] = ()
    proxy: Process | None = None
    lifeline: int | None = None

    @property
    def bootstrap(self) -> str:
        """Any worker that runs, the first one first. Raises InputError."""
        running = [worker for worker in self.workers if worker.alive] or self.workers
        return running[0].bootstrap

    @property
    def processes(self) -> tuple[Process, ...]:
        return (*self.workers, self.proxy) if self.proxy else self.workers

    @property
    def wiring(self) -> Wiring | None:
        """The links, where they are shaped."""
        return load_wiring(self.folder)

    def worker(self, name: str) -> WorkerProcess:
        """Raises InputError."""
        for worker in self.workers:
            if worker.name == name:
                return worker
        raise InputError(f"there is no worker {name!r}: name one of {', '.join(each.name for each in self.workers)}")

    def reshape(self, a: str, b: str, shape: Shape) -> None:
        """Change a link under the connections that run over it. Raises InputError."""
        self._rewire(self._shaped().with_link(a, b, shape))

    def reshape_all(self, shape: Shape) -> None:
        """The same for every link. Raises InputError."""
        self._rewire(replace(self._shaped(), default=shape, links={}))

    def _shaped(self) -> Wiring:
        wiring = self.wiring
        if wiring is None or self.proxy is None:
            raise InputError("the links of this network are not shaped: start it with --profile or a file")
        return wiring

    def _rewire(self, wiring: Wiring) -> None:
        wiring.save(self.folder)
        if self.proxy is None or not self.proxy.send(signal.SIGHUP):
            raise InputError("the proxy of this network is gone: run 'sotto sim down', then 'sotto sim up'")

    def save(self) -> None:
        record = {"workers": [asdict(worker) for worker in self.workers], "proxy": self.proxy and asdict(self.proxy)}
        write_atomic(self.folder / _RECORD, json.dumps(record, indent=1).encode())

    def stop(self) -> None:
        """End every process. Returns when all are gone."""
        stop(self.processes)
        (self.folder / _RECORD).unlink(missing_ok=True)


def default_folder() -> Path:
    """Where the one simulation network of this user is recorded."""
    return state_dir() / "sim"


def load(folder: Path) -> Cluster:
    """The cluster recorded in `folder`. Raises InputError."""
    try:
        record = json.loads((folder / _RECORD).read_text())
        workers = tuple(
            WorkerProcess(**{**item, "addrs": tuple(item["addrs"]), "command": tuple(item["command"])})
            for item in record["workers"]
        )
        proxy = Process(**record["proxy"]) if record["proxy"] else None
    except FileNotFoundError:
        raise InputError("no simulation network is up: start one with 'sotto sim up --workers 3'") from None
    except (ValueError, TypeError, KeyError):
        raise InputError(f"{folder / _RECORD} is damaged: stop the workers by hand and delete it") from None
    return Cluster(folder, workers, proxy)


def start(
    folder: Path,
    specs: Sequence[WorkerSpec],
    *,
    wiring: Wiring | None = None,
    lifeline: int | None = None,
    notify: Callable[[str], None],
) -> Cluster:
    """Start one worker for each spec; the first is the bootstrap of the others. All are stopped if one fails.

    `wiring` shapes the links between workers of these names. `lifeline` is a file descriptor to inherit: its end of
    file ends the processes. Raises InputError with the last words of what did not start.
    """
    if wiring is not None and sys.platform != "linux":
        raise InputError("links can be shaped on Linux only, where each worker can dial from an address of its own")
    if (folder / _RECORD).exists() and any(process.alive for process in load(folder).processes):
        raise InputError("a simulation network is up already: stop it with 'sotto sim down'")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    specs = [replace(spec, name=spec.name or f"worker-{index}") for index, spec in enumerate(specs)]
    launch = _Launch(Cluster(folder, lifeline=lifeline))
    try:
        ports = launch.proxy(wiring) if wiring else {}
        for index, spec in enumerate(specs):
            bootstrap = launch.cluster.workers[0].bootstrap if index else None
            launch.worker(spec, _worker_command(folder, index, spec, ports.get(spec.name), bootstrap))
            if index == 0:  # the others need its address; they start side by side
                launch.wait(0)
        for index in range(1, len(specs)):
            launch.wait(index)
    except BaseException:
        stop_children(launch.children)
        (folder / _RECORD).unlink(missing_ok=True)
        raise
    for worker in launch.cluster.workers:
        notify(f"{worker.name}: process {worker.pid}, peer {worker.peer}")
    return launch.cluster


@contextlib.contextmanager
def running(
    folder: Path,
    specs: Sequence[WorkerSpec],
    notify: Callable[[str], None] = lambda _: None,
    wiring: Wiring | None = None,
) -> Iterator[Cluster]:
    """A cluster for the length of a `with` block, and not a moment longer, however this process ends."""
    read_end, write_end = os.pipe()
    try:
        cluster = start(folder, specs, wiring=wiring, lifeline=read_end, notify=notify)
        try:
            yield cluster
        finally:
            _now(cluster).stop()
    finally:
        os.close(read_end)
        os.close(write_end)


def restart(cluster: Cluster, name: str) -> Cluster:
    """Start a worker that ended again, with its identity, data and address. Raises InputError."""
    cluster = _now(cluster)
    worker = cluster.worker(name)
    if worker.alive:
        raise InputError(f"{name} runs already, as process {worker.pid}")
    launch = _Launch(cluster)
    try:
        launch.again(worker)
    except BaseException:
        stop_children(launch.children)
        raise
    return launch.cluster


async def reshaped(cluster: Cluster, every: Shape) -> None:
    """All links are as `every` when it returns; those of a cluster without a proxy stay as they are."""
    if cluster.proxy is not None:
        cluster.reshape_all(every)
        await trio.sleep(SETTLE_S)


def _now(cluster: Cluster) -> Cluster:
    """The cluster with the workers that were restarted since."""
    try:
        return replace(load(cluster.folder), lifeline=cluster.lifeline)
    except InputError:
        return cluster


@dataclass(slots=True)
class _Launch:
    """Processes coming up, each on record as soon as it exists."""

    cluster: Cluster
    children: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def proxy(self, wiring: Wiring) -> dict[str, int]:
        """The port that stands for each worker."""
        folder = self.cluster.folder
        wiring.save(folder)
        with interrupts_held():
            child = self._spawn(("sim", "proxy", str(folder)), folder / "proxy.log")
            self._record(replace(self.cluster, proxy=identify(child)))
        ports: dict[str, int] = wait_ready("the proxy", child, folder / "proxy.json", folder / "proxy.log")["ports"]
        return ports

    def worker(self, spec: WorkerSpec, command: tuple[str, ...]) -> None:
        folder = self.cluster.folder / spec.name
        folder.mkdir()
        with interrupts_held():  # between a process and our knowing it there is no moment for an interrupt
            known = identify(self._spawn(command, folder / "worker.log"))
            process = WorkerProcess(
                pid=known.pid, started=known.started, name=spec.name, folder=str(folder), command=command
            )
            self._record(replace(self.cluster, workers=(*self.cluster.workers, process)))

    def again(self, worker: WorkerProcess) -> None:
        folder, index = Path(worker.folder), self.cluster.workers.index(worker)
        (folder / "worker.json").unlink(missing_ok=True)  # it was killed, and could not
        shaped = "--announce" in worker.command
        command = worker.command if shaped else tuple(
            worker.addrs[0] if word == _ANY_PORT and worker.addrs else word for word in worker.command
        )  # fmt: skip
        with interrupts_held():
            known = identify(self._spawn(command, folder / "worker.log"))
            self._replace(index, replace(worker, pid=known.pid, started=known.started))
        self.wait(index)

    def wait(self, index: int) -> None:
        """Until worker `index` serves; its address goes on record."""
        worker = self.cluster.workers[index]
        child = next(each for each in self.children if each.pid == worker.pid)
        folder = Path(worker.folder)
        state = wait_ready(worker.name, child, folder / "worker.json", folder / "worker.log")
        self._replace(index, replace(worker, peer=state["peer"], addrs=tuple(state["addrs"]), metrics=state["metrics"]))

    def _spawn(self, command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        child = spawn(command, log, self.cluster.lifeline)
        self.children.append(child)
        return child

    def _replace(self, index: int, worker: WorkerProcess) -> None:
        workers = list(self.cluster.workers)
        workers[index] = worker
        self._record(replace(self.cluster, workers=tuple(workers)))

    def _record(self, cluster: Cluster) -> None:
        self.cluster = cluster
        cluster.save()


def _worker_command(
    folder: Path, index: int, spec: WorkerSpec, port: int | None, bootstrap: str | None
) -> tuple[str, ...]:
    command = ["worker", "--data-dir", str(folder / spec.name), "--listen", _ANY_PORT]
    command += ["--memory", spec.memory, "--kv-memory", spec.kv_memory, "--threads", str(spec.threads)]
    command += ["--metrics", "127.0.0.1:0", "--no-lan"]
    if port is not None:
        command += ["--announce", f"/ip4/127.0.0.1/tcp/{port}", "--dial-from", dialling_host(index)]
    if bootstrap is not None:
        command += ["--bootstrap", bootstrap]
    return (*command, *spec.options)
