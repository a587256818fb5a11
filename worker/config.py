"""What a worker is given: its ports and its settings. Plain data; nothing here acts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from math import inf
from typing import Protocol, TypeVar

from protocol import limits
from protocol.adverts import Speed
from protocol.errors import LocalProtocolError
from protocol.ports import Clock, Compute, Directory, Entropy, Gossip, RunSync, ShardStore, Transport
from protocol.signed import Identity
from worker.observer import WorkerObserver

T = TypeVar("T")


async def run_inline(function: Callable[[], T]) -> T:
    """For tests and simulations, where a thread would break determinism."""
    return function()


class Notebook(Protocol):
    """A small file that outlives the process."""

    async def read(self) -> bytes:
        """What was written last; b"" when nothing was."""

    async def write(self, data: bytes) -> None:
        """Replace it all. Raises OSError: it may not last then."""


class Blank:
    """Forgets: for tests and simulations."""

    async def read(self) -> bytes:
        return b""

    async def write(self, data: bytes) -> None: ...


@dataclass(frozen=True, slots=True)
class WorkerPorts:
    """`revoked` keeps the revoked capabilities over a restart."""

    transport: Transport
    gossip: Gossip
    compute: Compute
    store: ShardStore
    clock: Clock
    entropy: Entropy
    observer: WorkerObserver = field(default_factory=WorkerObserver)
    run_sync: RunSync = run_inline
    directory: Directory | None = None  # without one, nobody is told which shards are here
    revoked: Notebook = field(default_factory=Blank)


@dataclass(frozen=True, slots=True)
class Quotas:
    """What peers may take of this machine besides memory. Rates per second; bytes count both directions. "peer" is one
    connection's other end, "owner" whoever signed a deployment's manifest."""

    # Of the weight memory, of what leases set aside of KV, and of all places for deployments but one, for one owner.
    owner_memory_share: float = 1.0
    bandwidth: float = inf
    peer_bandwidth: float = inf
    requests: float = 1000.0  # control and shard requests, and sessions attached or put on another route
    peer_requests: float = 50.0
    sessions: int = limits.SESSIONS_MAX
    peer_sessions: int = limits.SESSIONS_PER_PEER_MAX
    peer_queue_share: float = 0.5  # of the bytes that may wait in queues and are not others' already

    def __post_init__(self) -> None:
        if not (0 < self.owner_memory_share <= 1 and 0 < self.peer_queue_share <= 1):
            raise LocalProtocolError("a share is above 0 and at most 1")
        if not all(getattr(self, each.name) > 0 for each in fields(self)):
            raise LocalProtocolError("a quota of nothing would serve nobody")


QUOTAS_DEFAULT = Quotas()


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """`memory_bytes` is all that the owner gives: `kv_memory_bytes` of it are for KV, `queue_memory_bytes` for what
    waits to be computed or sent, the rest is for weights."""

    identity: Identity
    memory_bytes: int
    kv_memory_bytes: int
    queue_memory_bytes: int
    speeds: tuple[Speed, ...]
    device: str
    version: str
    quotas: Quotas = QUOTAS_DEFAULT

    def __post_init__(self) -> None:
        if min(self.kv_memory_bytes, self.queue_memory_bytes, self.weight_memory_bytes) <= 0:
            raise LocalProtocolError("KV and queues are a part of the memory, and leave some for weights")

    @property
    def weight_memory_bytes(self) -> int:
        return self.memory_bytes - self.kv_memory_bytes - self.queue_memory_bytes
