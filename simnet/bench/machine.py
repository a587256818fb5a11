"""What this machine can do at best, measured beside the figures that are compared with it, and what it is.

Bandwidth is of one thread over arrays far larger than any cache. The best of several ways to read counts: a limit that
is too low would flatter us. One machine's processes share its memory bus, so that a limit holds for one of them alone.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch
import trio

from node.cores import cores
from node.version import VERSION
from protocol.errors import InputError
from simnet.bench.pipes import TcpPipe, echo, echo_message

ARRAY_BYTES = 256 << 20
COLUMNS = 4096
CLOSE_S = 20.0
ECHOES = 50


def facts() -> dict[str, Any]:
    """What figures depend on."""
    return {
        "processor": _processor(),
        "cores": cores(),
        "versions": {"sotto": VERSION, "torch": torch.__version__, "transformers": _version("transformers")},
        "date": time.strftime("%Y-%m-%d"),
    }


def cpu_seconds(pids: Sequence[int]) -> float:
    """Processor time that this process and those of `pids` have used, all threads."""
    times = [psutil.Process(pid).cpu_times() for pid in (os.getpid(), *pids)]
    return float(sum(each.user + each.system for each in times))


def resident_bytes(pids: Sequence[int]) -> int:
    """Memory that the processes hold."""
    return int(sum(psutil.Process(pid).memory_info().rss for pid in pids))


class Memory:
    """Arrays to read and copy, kept over all rounds: `gb_per_s` is a contestant's turn."""

    def __init__(self, array_bytes: int = ARRAY_BYTES) -> None:
        self._source = torch.ones(max(1, array_bytes // 4 // COLUMNS), COLUMNS)
        self._target = torch.empty_like(self._source)
        self._vector = torch.ones(COLUMNS)

    def read_gb_per_s(self) -> float:
        """The best of a sum and a product with a vector: 10^9 bytes per second of one thread."""
        size = self._source.nbytes
        return (
            max(size / _seconds(lambda: self._source.sum()), size / _seconds(lambda: self._source @ self._vector)) / 1e9
        )

    def copy_gb_per_s(self) -> float:
        """Bytes read and bytes written, 10^9 per second of one thread."""
        return 2 * self._source.nbytes / _seconds(lambda: self._target.copy_(self._source)) / 1e9

    def gb_per_s(self) -> float:
        """The memory limit: the better of reading and copying."""
        torch.set_num_threads(1)
        return max(self.read_gb_per_s(), self.copy_gb_per_s())


@asynccontextmanager
async def raw_tcp() -> AsyncIterator[TcpPipe]:
    """A bare socket to a second process that answers what `echo_us` sends. Raises InputError."""
    command = [sys.executable, "-m", "simnet.bench.far_end"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            line = await trio.to_thread.run_sync(child.stdout.readline)
            if not line:
                raise InputError("the second process of the benchmark did not start: run it from an installed sotto")
            tcp = await trio.open_tcp_stream("127.0.0.1", json.loads(line)["tcp"])
            async with tcp:
                yield TcpPipe(tcp)
        finally:
            child.stdin.close()
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(_ended, child)


async def echo_us(pipe: TcpPipe, message_bytes: int) -> float:
    """Microseconds of one way: half the median time of `message_bytes` there and back."""
    message, taken = echo_message(message_bytes), list[float]()
    for _ in range(ECHOES):
        start = time.perf_counter()
        await echo(pipe, message)
        taken.append(time.perf_counter() - start)
    return 1e6 * sorted(taken)[ECHOES // 2] / 2


def _ended(child: subprocess.Popen[str]) -> None:
    try:
        child.wait(CLOSE_S)
    except subprocess.TimeoutExpired:
        child.kill()


def _seconds(work: Callable[[], object]) -> float:
    """The better of two runs."""
    best = float("inf")
    for _ in range(2):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
