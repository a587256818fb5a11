"""The worker's composition root: options to a running daemon.

Invariant: nothing here, or below it, imports `equivariant`: no key code in a process that runs on somebody else's
machine. Everything that is started ends with the block it was started in, whatever ends it.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import trio

from node.clock import SystemClock
from node.engine_thread import EngineThread
from node.files import write_atomic
from node.groups import ungrouped
from node.identity import load_identity
from node.joining import stay_joined
from node.lifetime import only_user_of, until_told
from node.metrics import WorkerMetrics, serve_metrics
from node.p2p.mesh import Mesh, MeshConfig, open_mesh
from node.store import DiskStore
from node.version import VERSION
from protocol.errors import InputError
from protocol.signed import Identity
from worker.capacity import measure_speeds
from worker.config import WorkerConfig, WorkerPorts
from worker.engine import Engine
from worker.service import WorkerService

log = logging.getLogger("sotto.worker")
_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """What the owner decides. `memory_bytes` is for weights and KV together, `disk_bytes` for shards."""

    data_dir: Path
    listen: tuple[str, ...]
    announce: tuple[str, ...]
    bootstrap: tuple[str, ...]
    memory_bytes: int
    kv_memory_bytes: int
    disk_bytes: int
    threads: int
    device: str
    metrics: tuple[str, int] | None
    lifeline: int | None

    def __post_init__(self) -> None:
        if self.kv_memory_bytes >= self.memory_bytes:
            raise InputError("--kv-memory is part of --memory, and must leave room for weights: give less of it")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise InputError("torch sees no CUDA device here: use --device cpu, or install a CUDA build of torch")
        if self.device not in ("cpu", "cuda"):
            raise InputError(f"unknown device {self.device!r}: use cpu or cuda")


def default_memory_bytes() -> int:
    """Half of what is free now: the owner's machine stays usable."""
    return int(psutil.virtual_memory().available // 2)


def default_disk_bytes(data_dir: Path, memory_bytes: int) -> int:
    """Four times the memory, so that what made room can come back without an upload; never over half of the disk's
    room, what is held already counted as room."""
    folder = next(path for path in (data_dir, *data_dir.parents) if path.exists())
    held = sum(path.stat().st_blocks * 512 for name in ("shards", "partial") for path in (data_dir / name).glob("*"))
    return min(4 * memory_bytes, (shutil.disk_usage(folder).free + held) // 2)


async def run_worker(options: WorkerOptions) -> None:
    """Serve until told to stop. Raises InputError for what the owner must change (port in use, bad address...)."""
    torch.set_num_threads(options.threads)
    with only_user_of(options.data_dir, "worker"), ungrouped():
        identity = load_identity(options.data_dir)
        async with (
            until_told(options.lifeline),
            open_mesh(MeshConfig(identity.seed, options.listen, options.announce)) as mesh,
        ):
            await _serve(options, identity, mesh)


async def _serve(options: WorkerOptions, identity: Identity, mesh: Mesh) -> None:
    """Everything behind the mesh. The engine's thread is the last to go: closing sessions still needs it."""
    store, metrics = DiskStore(options.data_dir, options.disk_bytes), WorkerMetrics()
    metrics.kv_total(options.kv_memory_bytes)
    engine = Engine(store.path, options.device)
    config = WorkerConfig(
        identity=identity,
        memory_bytes=options.memory_bytes,
        kv_memory_bytes=options.kv_memory_bytes,
        speeds=await trio.to_thread.run_sync(measure_speeds, options.device, _DTYPES),
        device=options.device,
        version=VERSION,
    )
    with (
        EngineThread(engine, lambda: torch.set_num_threads(options.threads)) as compute,
        serve_metrics(options.metrics, metrics.registry) as metrics_url,
    ):
        ports = WorkerPorts(
            transport=mesh,
            gossip=mesh,
            compute=compute,
            store=store,
            clock=SystemClock(),
            entropy=os.urandom,
            observer=metrics,
            run_sync=trio.to_thread.run_sync,
        )
        async with trio.open_nursery() as nursery:
            service = WorkerService(ports, config)
            await nursery.start(service.run)  # type: ignore[arg-type]  # trio-typing's stubs are older than trio
            nursery.start_soon(stay_joined, mesh, options.bootstrap)
            with _announced(options.data_dir, mesh.peer, mesh.addrs, metrics_url):
                log.info("serving", extra={"peer": mesh.peer, "addrs": mesh.addrs})
                await trio.sleep_forever()


@contextmanager
def _announced(folder: Path, peer: str, addrs: tuple[str, ...], metrics: str) -> Iterator[None]:
    """`worker.json` while the worker serves: how its maker, and its owner, find it."""
    file = folder / "worker.json"
    state = {"pid": os.getpid(), "peer": peer, "addrs": addrs, "metrics": metrics}
    write_atomic(file, json.dumps(state).encode())
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
