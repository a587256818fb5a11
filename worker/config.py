"""What a worker is given: its ports and its settings. Plain data; nothing here acts."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from protocol.adverts import Speed
from protocol.errors import LocalProtocolError
from protocol.ports import Clock, Compute, Directory, Entropy, Gossip, ShardStore, Transport
from protocol.signed import Identity
from worker.observer import NullObserver, WorkerObserver

T = TypeVar("T")


class RunSync(Protocol):
    """Runs a function of some 100 ms off the event loop; a thread in production, inline in the simulation."""

    def __call__(self, function: Callable[[], T], /) -> Awaitable[T]: ...


async def run_inline(function: Callable[[], T]) -> T:
    """For tests and simulations, where a thread would break determinism."""
    return function()


class TaskStatus(Protocol):
    """trio's own, as far as it is used here."""

    def started(self) -> None: ...


@dataclass(frozen=True, slots=True)
class WorkerPorts:
    transport: Transport
    gossip: Gossip
    compute: Compute
    store: ShardStore
    clock: Clock
    entropy: Entropy
    observer: WorkerObserver = field(default_factory=NullObserver)
    run_sync: RunSync = run_inline
    directory: Directory | None = None  # without one, nobody is told which shards are here


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """`memory_bytes` is all that the owner gives; `kv_memory_bytes` of it are for KV, the rest is for weights."""

    identity: Identity
    memory_bytes: int
    kv_memory_bytes: int
    speeds: tuple[Speed, ...]
    device: str
    version: str

    def __post_init__(self) -> None:
        if not 0 < self.kv_memory_bytes < self.memory_bytes:
            raise LocalProtocolError("KV memory is a part of the memory, and leaves some for weights")

    @property
    def weight_memory_bytes(self) -> int:
        return self.memory_bytes - self.kv_memory_bytes
