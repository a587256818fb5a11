"""The worker's composition root: options to a running daemon.

Invariant: nothing here, or below it, imports `equivariant`: no key code in a process that runs on somebody else's
machine. Everything that is started ends with the block it was started in, whatever ends it.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import random
import shutil
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import psutil
import torch
import trio

from models.kernels import SUPPORTED
from models.precision import DEPLOYED
from node.clock import SystemClock
from node.engine_thread import EngineThread
from node.entering import member_ports
from node.entry import STATE_FILE, key_of_worker, read_entry
from node.files import write_atomic
from node.garbage import spare_imports
from node.groups import ungrouped
from node.identity import load_identity
from node.joining import Leads, stay_joined
from node.lan import Presence, allowed, on_lan
from node.lifetime import only_user_of, until_told
from node.metrics import serve_metrics
from node.notebook import FileNotebook
from node.open_files import allow_many
from node.owner import Owner
from node.p2p.dht import Kademlia
from node.p2p.mesh import Mesh, MeshConfig, open_mesh
from node.p2p.reaching import Reaching, ReachOptions
from node.passing import pass_on_reports
from node.private import PrivateDirectory
from node.store import DiskStore
from node.version import VERSION
from node.worker_metrics import WorkerMetrics
from node.worker_socket import Controls, serve_controls
from protocol.errors import InputError
from protocol.membership import SwarmKey, swarm_of
from protocol.signed import Identity
from worker.capacity import measure_speeds
from worker.config import Quotas, WorkerConfig, WorkerPorts
from worker.engine import Engine
from worker.schedule import Schedule
from worker.service import WorkerService

log = logging.getLogger("sotto.worker")
_QUEUE_BYTES_MAX = 2 << 30
STATED_EVERY_S = 1.0  # at most: strangers can provoke changes, and each waits for the disk
MOVE_SEEN_S = 1.0  # how soon the local network hears of another address of this machine


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """What the owner decides. `memory_bytes` is for weights and KV together, `disk_bytes` for shards; `bootstrap` holds
    addresses and invites.

    `private`: True makes the worker's swarm a private one, False keeps it public, None is as its folder or invite says.
    `lan`: find peers on the local network; None: only without `bootstrap`.
    """

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
    private: bool | None
    lan: bool | None
    reach: ReachOptions
    quotas: Quotas
    schedule: Schedule | None
    yields: bool
    dial_from: str | None  # a local address, by which a cluster for experiments tells its workers apart

    @property
    def queue_memory_bytes(self) -> int:
        """What may wait in queues: an eighth, and no more than many large prefills need."""
        return min(self.memory_bytes // 8, _QUEUE_BYTES_MAX)

    def __post_init__(self) -> None:
        if self.kv_memory_bytes + self.queue_memory_bytes >= self.memory_bytes:
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
    spare_imports()
    allow_many()
    entry = read_entry(options.bootstrap)
    with only_user_of(options.data_dir, "worker"), ungrouped():
        key = key_of_worker(options.data_dir, entry, options.private, os.urandom)
        identity = load_identity(options.data_dir)
        async with (
            until_told(options.lifeline),
            open_mesh(MeshConfig(identity.seed, options.listen, options.announce, options.dial_from)) as mesh,
        ):
            await _serve(options, identity, mesh, (key, Leads(entry.addrs)))


async def _serve(options: WorkerOptions, identity: Identity, mesh: Mesh, swarm: tuple[SwarmKey | None, Leads]) -> None:
    """Everything behind the mesh. The engine's thread is the last to go: closing sessions still needs it."""
    key, leads = swarm
    store, metrics = DiskStore(options.data_dir, options.disk_bytes), WorkerMetrics()
    metrics.kv_total(options.kv_memory_bytes)
    engine = Engine(store.path, options.device, options.kv_memory_bytes)
    config = WorkerConfig(
        identity=identity,
        memory_bytes=options.memory_bytes,
        kv_memory_bytes=options.kv_memory_bytes,
        queue_memory_bytes=options.queue_memory_bytes,
        speeds=await trio.to_thread.run_sync(measure_speeds, options.device, DEPLOYED),
        device=options.device,
        version=VERSION,
        quotas=options.quotas,
    )
    with (
        EngineThread(engine, lambda: torch.set_num_threads(options.threads)) as compute,
        serve_metrics(options.metrics, metrics.registry) as metrics_url,
    ):
        transport, gossip = member_ports(mesh, key, metrics.stranger_refused)
        directory = mesh.directory if key is None else Kademlia(transport, mesh.known_addrs)
        ports = WorkerPorts(
            transport=transport,
            gossip=gossip,
            compute=compute,
            store=store,
            clock=SystemClock(),
            entropy=os.urandom,
            observer=metrics,
            run_sync=trio.to_thread.run_sync,
            directory=directory if key is None else PrivateDirectory(directory, key),
            revoked=FileNotebook(options.data_dir / "revoked.json"),
        )
        async with trio.open_nursery() as nursery:
            service = WorkerService(ports, config)
            await nursery.start(service.run)  # type: ignore[arg-type]  # trio-typing's stubs are older than trio
            await pass_on_reports(gossip, ports.clock)
            nursery.start_soon(stay_joined, transport, leads, random.random)
            if options.lan or (options.lan is None and allowed() and not options.bootstrap):
                nursery.start_soon(_meet_neighbours, mesh, key, leads)
            nursery.start_soon(Reaching(mesh, options.reach).run)
            directory.serve()
            nursery.start_soon(directory.run)
            await _start_owner(nursery, service, options)
            # What is loaded by now lives as long as the process. A full collection would look at 250,000 objects, which
            # takes 0.1 s and holds up the loop and the engine.
            gc.freeze()
            facts = {"swarm": swarm_of(key).hex(), "metrics": metrics_url}
            async with _announced(options.data_dir, mesh, facts) as renew:
                mesh.reach.on_change = partial(_reach_changed, service, renew)
                computes = {"threads": options.threads, "kernels": sorted(SUPPORTED)}
                addrs = {"peer": mesh.peer, "addrs": mesh.addrs, "private": key is not None}
                log.info("serving", extra=addrs | computes)
                await trio.sleep_forever()


async def _meet_neighbours(mesh: Mesh, key: SwarmKey | None, leads: Leads) -> None:
    """On the local network, and anew when this machine gets its first address, or another."""
    while True:
        listening = mesh.listening
        async with on_lan(swarm_of(key), Presence(mesh.peer, listening), leads.sighted):
            while mesh.listening == listening:
                await trio.sleep(MOVE_SEEN_S)


def _reach_changed(service: WorkerService, renew: Callable[[], None]) -> None:
    renew()
    service.herald.changed()


async def _start_owner(nursery: trio.Nursery, service: WorkerService, options: WorkerOptions) -> None:
    owner = Owner(service)
    controls = Controls(owner.pause, owner.resume, owner.status)
    await nursery.start(serve_controls, options.data_dir, controls)  # type: ignore[arg-type]  # old stubs, as above
    nursery.start_soon(owner.end_pauses)
    if options.schedule is not None:
        nursery.start_soon(owner.keep_hours, options.schedule)
    if options.yields:
        nursery.start_soon(owner.yield_to_others)


@dataclass(slots=True)
class _Statement:
    """The content of `file`: how the worker's maker, and its owner, find it. A full disk leaves an old one, or none,
    and the worker goes on."""

    file: Path
    mesh: Mesh
    facts: Mapping[str, str]
    _changed: trio.Event = field(default_factory=trio.Event)

    def renew(self) -> None:
        """Something of it has changed."""
        self._changed.set()

    async def keep(self) -> None:
        """Write what changes, in a thread, for ever; of changes that come faster than every STATED_EVERY_S the last."""
        while True:
            await self._changed.wait()
            self._changed = trio.Event()
            await trio.to_thread.run_sync(self.write, self.read())
            await trio.sleep(STATED_EVERY_S)

    def read(self) -> bytes:
        """What there is to state now."""
        mesh = self.mesh
        state = {"pid": os.getpid(), "peer": mesh.peer, "addrs": mesh.addrs, "listening": mesh.listening}
        return json.dumps({**state, "reach": mesh.reach.state.value, **self.facts}).encode()

    def write(self, data: bytes) -> None:
        try:
            write_atomic(self.file, data)
        except OSError as error:
            reason = str(error)
            log.warning("where this worker is found cannot be written", extra={"path": self.file, "reason": reason})


@asynccontextmanager
async def _announced(folder: Path, mesh: Mesh, facts: Mapping[str, str]) -> AsyncIterator[Callable[[], None]]:
    """`worker.json` while the worker serves. Call what it gives to renew it."""
    statement = _Statement(folder / STATE_FILE, mesh, facts)
    statement.file.unlink(missing_ok=True)  # what an earlier process left, where a full disk keeps the new one out
    statement.write(statement.read())
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(statement.keep)
            yield statement.renew
            nursery.cancel_scope.cancel()
    finally:
        statement.file.unlink(missing_ok=True)  # for good: a thread that writes has been waited for
