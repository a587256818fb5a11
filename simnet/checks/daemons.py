"""Single daemons and commands for checks: `sotto` in processes of its own, ended with their block."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import trio

from node.app_client import observe, open_client
from node.client import Client, ClientOptions
from node.groups import ungrouped
from protocol.ids import PeerId
from simnet.checks.core import CheckFailed
from simnet.processes import spawn, stop_children, wait_ready

T = TypeVar("T")
DEADLINE_S = 120.0
LIMITS = (
    "--listen", "/ip4/127.0.0.1/tcp/0", "--memory", "400MiB", "--kv-memory", "100MiB", "--threads", "1",
    "--metrics", "127.0.0.1:0", "--no-lan",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Daemon:
    """A running worker."""

    folder: Path
    peer: PeerId
    addrs: tuple[str, ...]
    metrics: str

    @property
    def address(self) -> str:
        return f"{self.addrs[0]}/p2p/{self.peer}"


@contextmanager
def daemon(folder: Path, *words: str, limits: tuple[str, ...] = LIMITS) -> Iterator[Daemon]:
    """`sotto WORDS` as a worker with its data in `folder`, however this process ends. Raises InputError."""
    folder.mkdir(parents=True, exist_ok=True)
    read_end, write_end = os.pipe()
    command = [*words, "--data-dir", str(folder), *limits]
    child = spawn(command, folder / "worker.log", read_end)
    try:
        state = wait_ready(folder.name, child, folder / "worker.json", folder / "worker.log")
        yield Daemon(folder, PeerId(state["peer"]), tuple(state["addrs"]), state["metrics"])
    finally:
        stop_children([child])
        os.close(write_end)
        os.close(read_end)


def command(*words: str, as_json: bool = True) -> Any:
    """What `sotto WORDS` prints: its one object, or its text. Raises CheckFailed when it fails."""
    line = [sys.executable, "-m", "sotto", *words, *(["--json"] if as_json else [])]
    done = subprocess.run(line, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    if done.returncode:
        said = (done.stdout + done.stderr).strip()
        raise CheckFailed(f"'sotto {words[0]}' failed: {said}")
    return json.loads(done.stdout) if as_json else done.stdout.strip()


def with_client(data_dir: Path, way_in: str, work: Callable[[Client], Awaitable[T]]) -> T:
    """Run `work` with a client that deploys."""
    return _with(open_client, data_dir, way_in, work)


def with_observer(data_dir: Path, way_in: str, work: Callable[[Client], Awaitable[T]]) -> T:
    """Run `work` with a client that only looks."""
    return _with(observe, data_dir, way_in, work)


def _with(opener: Any, data_dir: Path, way_in: str, work: Callable[[Client], Awaitable[T]]) -> T:
    async def main() -> T:
        with trio.fail_after(DEADLINE_S):
            async with opener(ClientOptions(data_dir, (way_in,), discover_s=8.0)) as client:
                return await work(client)

    with ungrouped():
        return trio.run(main)
