"""The ports: what the roles need from the world, as structural types.

Two adapters exist for each network port: libp2p (`node/p2p/`) and the virtual network (`simnet/network.py`). One
conformance suite runs over both. Nothing here starts a task, reads a clock or draws randomness.

Errors. Adapters translate foreign exceptions at the edge and raise only the tree of `protocol.errors`:
TransportError (peer unreachable, stream reset or closed while in use) or LocalProtocolError (misuse).
Cancellation (trio) passes through every call; callers own timeouts.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence, Set
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

from protocol.ids import DeploymentId, PeerId, SessionId, ShardDigest
from protocol.manifest import Manifest
from protocol.messages import Operation
from protocol.pieces import PieceList
from protocol.tensors import Payload

T = TypeVar("T")


class Stream(Protocol):
    """A reliable, ordered, authenticated byte stream to one peer. One task sends and one task receives at a time."""

    @property
    def remote(self) -> PeerId:
        """The peer at the other end, as proven by the transport's handshake."""

    async def send(self, data: bytes) -> None:
        """Send all of `data` in one write; returns when the transport took it (backpressure).

        A receiver that stops reading makes this wait, for as long as it takes (no time limit of the adapter's own).
        Raises TransportError once the stream is reset or closed by either side.
        """

    async def receive(self, max_bytes: int) -> bytes:
        """At least one and at most `max_bytes` bytes; b"" once the remote finished sending. Raises TransportError."""

    async def finish(self) -> None:
        """No more bytes from this side (half-close); receiving goes on. Idempotent."""

    async def aclose(self) -> None:
        """Close both directions, reset if need be. Idempotent, never raises, needs no network round trip."""


@runtime_checkable
class PromptStream(Stream, Protocol):
    """A stream that can often take a small message at once: no task has to be woken to write it."""

    @property
    def at_once_bytes(self) -> int:
        """The longest message that `send_at_once` takes now; 0 for none."""

    def send_at_once(self, data: bytes) -> bool:
        """Send all of `data` without waiting. False when that cannot be: nothing was sent then, and `send` either does
        it or says why not. Never between two parts of what another task sends. Never raises."""


StreamHandler = Callable[[Stream], Awaitable[None]]


class Transport(Protocol):
    """The node's own place in the mesh: opens streams to peers and hands incoming ones to handlers."""

    @property
    def peer(self) -> PeerId:
        """This node's identity."""

    @property
    def addrs(self) -> tuple[str, ...]:
        """Multiaddrs (without /p2p suffix) under which this node can be dialled; they follow its reachability,
        so in part they are what others say."""

    @property
    def own_addrs(self) -> tuple[str, ...]:
        """Addresses that show how far away this node is reached, whatever others say: where it listens, or its owner
        announces it. Where it does neither, those of neighbours, as connections have or had them, without a port; of
        each scope (protocol/scopes.py) one."""

    @property
    def relayed(self) -> bool:
        """True while others reach this node through a relay only."""

    def handle(self, protocol: str, handler: StreamHandler) -> None:
        """Give each incoming stream of `protocol` to `handler`, in a task of the adapter's.

        The stream is closed when the handler returns. A handler that raises costs its stream (reset), never the node.
        """

    async def open(self, peer: PeerId, addrs: Sequence[str], protocol: str) -> Stream:
        """Open a stream to `peer`, connecting over `addrs` (multiaddrs) when there is no connection yet.

        Raises TransportError: unreachable, wrong peer at the address, protocol not spoken there.
        """

    async def connect(self, *addrs: str) -> PeerId:
        """Dial a peer by name: multiaddrs that end in its /p2p/<peer id>, tried beside each other. Raises InputError,
        TransportError."""

    def connected(self) -> tuple[PeerId, ...]:
        """Peers with a live connection now, sorted."""

    def shun(self, peer: PeerId, seconds: float) -> None:
        """End all connections to `peer` at once, and have none for some seconds, whoever dials: `open` and `connect`
        raise TransportError. Best effort: adapters remember a bounded number of peers."""


class GossipMessage(Protocol):
    """One validated message of a topic."""

    @property
    def data(self) -> bytes: ...
    @property
    def received_from(self) -> PeerId:
        """The neighbour that forwarded it; equals `author` when it came first-hand, own id for own messages."""

    @property
    def author(self) -> PeerId:
        """Who published it (proven by gossipsub's signature)."""


Validator = Callable[[GossipMessage], bool]


class Subscription(Protocol):
    async def receive(self) -> GossipMessage:
        """The next valid message; waits. Bounded: when the reader lags, the oldest are dropped."""


class Gossip(Protocol):
    """Low-rate broadcast (a few messages a second in all)."""

    async def publish(self, topic: str, data: bytes) -> None:
        """Best effort. Raises LocalProtocolError when `data` exceeds limits.GOSSIP_BYTES_MAX."""

    async def subscribe(self, topic: str, validator: Validator) -> Subscription:
        """Messages for which `validator` returns False are neither delivered nor forwarded. It must be quick, sync
        and total; if it raises, the message counts as invalid. One subscription per topic and node. Own messages are
        not delivered."""


@dataclass(frozen=True, slots=True)
class Provider:
    """A peer that says it holds something. Hearsay: a digest, or a handshake, must bear it out."""

    peer: PeerId
    addrs: tuple[str, ...]  # multiaddrs without /p2p suffix, as the directory has them; may be empty


class Directory(Protocol):
    """Who holds what, kept by the peers together. Best effort: records expire, are lost, and may be lies."""

    async def provide(self, key: bytes) -> None:
        """Say that this node holds `key` (protocol.directory.shard_key). Lasts limits.PROVIDER_LIFE_S; repeat sooner.

        Raises TransportError when nobody took the record.
        """

    async def providers(self, key: bytes) -> tuple[Provider, ...]:
        """Other peers that hold `key`: each once, at most limits.PROVIDERS_MAX, () when none is found or none answers
        in time (the adapter's own deadline). Never this node itself."""


class Clock(Protocol):
    def time(self) -> float:
        """Unix time in seconds: for statements that travel (adverts, tickets)."""

    def monotonic(self) -> float:
        """Seconds that never go back: for durations."""


Entropy = Callable[[int], bytes]
"""`entropy(n)` gives n unpredictable bytes (os.urandom in production, seeded in the simulation)."""


class RunSync(Protocol):
    """Runs a function that takes long (some 100 ms) off the event loop: in a thread, or inline in the simulation."""

    def __call__(self, function: Callable[[], T], /) -> Awaitable[T]: ...


class TaskStatus(Protocol):
    """trio's own, as far as it is used here."""

    def started(self) -> None: ...


@dataclass(frozen=True, slots=True)
class SpanSpec:
    """Blocks [start, end) of a deployment, to be loaded from shards that the store holds."""

    manifest: Manifest
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class LoadedSpan:
    """What loading cost, and how fast it is."""

    weight_bytes: int
    block_time_us: int  # one position through one block, batch 1


@dataclass(frozen=True, slots=True)
class SessionSpec:
    """What a session is opened with over a loaded span; OpenSession says what the last five mean. It finds and leaves
    the `tenant`'s pages of KV. Steps of one `client` share its part of the engine's time, and are divided together."""

    deployment: DeploymentId
    client: PeerId
    tenant: PeerId
    kv_tokens: int
    page_keys: tuple[bytes, ...] = ()
    deterministic: bool = False
    alone: bool = False
    micro_batches: int = 1
    micro_batch_min: int = 1


@dataclass(frozen=True, slots=True)
class StepWork:
    """One admitted step for the engine: truncate KV to `position`, then apply `operation` to `payload`.

    `forward_tail` > 0 keeps only that many trailing positions of the result (the last hop); `returns` is the dtype of a
    second copy for the client, or "none". `keeps` False: the session's route has changed, and its keys name no page
    that is full from now on.
    """

    session: SessionId
    position: int
    operation: Operation
    block: int
    matrix: str
    payload: Payload
    forward_tail: int
    returns: str
    keeps: bool = True


@dataclass(frozen=True, slots=True)
class StepResult:
    """`forward` goes to the next hop (to the client at the last); `returned` to the client, off the critical path.
    `queue_us`: how long the step waited for other work. `company`: others ended with it. `busy_s`: how long the engine
    has computed in all, for whomever, when the step ended."""

    forward: Payload
    returned: Payload | None
    compute_us: int
    queue_us: int = 0
    company: bool = False
    busy_s: float = 0.0


class Compute(Protocol):
    """The engine, in a thread or process of its own: calls wait without blocking the event loop.

    Steps of several sessions may be computed together; a session has one step under way at a time. A running forward
    is never interrupted: cancelling the call abandons its result, and the engine stays consistent.
    Raises Refused (UNSUPPORTED, BAD_SHARD, MEMORY) for what the peer asked, LocalProtocolError for our own misuse.
    """

    async def load(self, span: SpanSpec) -> LoadedSpan:
        """Read the span's shards, check names, shapes and dtypes against the manifest, and time one position."""

    async def unload(self, deployment: DeploymentId) -> None:
        """Free the span. Idempotent. No session of it may be open."""

    async def open(self, session: SessionId, spec: SessionSpec) -> int:
        """Take KV for a session over the loaded span. Gives how many of its first tokens are held already: full pages
        that earlier sessions of the tenant left under the first of `page_keys`."""

    def step(self, work: StepWork) -> Awaitable[StepResult]:
        """Compute one step. An engine may begin when this is called, before the result is waited for; whatever is
        wrong is raised by waiting. Dropping what this gives abandons the result."""

    async def close(self, session: SessionId, page_keys: tuple[bytes, ...] = ()) -> None:
        """Free the session's KV when its running step commits; its first full pages are kept under `page_keys`, as long
        as their memory is not needed. Idempotent."""


Keep = Callable[[], Collection[ShardDigest]]
"""`keep()` names the shards that are needed now; called on the event loop."""


class ShardStore(Protocol):
    """Sealed shards by digest, within a budget, and the spans that were loaded from them.

    A shard is whole or partial. Only pieces that are in the shard's list get in, and a shard becomes whole at once, so
    that a crash at any moment loses at most what was not yet whole. Raises Refused(DISK) when there is no room, or the
    disk fails.
    """

    @property
    def bytes_max(self) -> int:
        """The budget: all shards here, whole or partial, take no more."""

    async def size(self, digest: ShardDigest) -> int | None:
        """Bytes of a whole shard; None when it is not here."""

    async def begin(self, pieces: PieceList, keep: Keep) -> Set[int]:
        """Make room for a shard and say which of its pieces are here already, each checked by this process.

        What was used least recently goes first; nothing that `keep` names goes.
        """

    async def write(self, pieces: PieceList, index: int, piece: bytes) -> bool:
        """Check a piece of a begun shard and put it into its place. False, and nothing written, when it is wrong."""

    async def commit(self, pieces: PieceList) -> None:
        """All pieces were written or found: make the shard whole, durably. Idempotent."""

    async def verify(self, digest: ShardDigest) -> bool:
        """Is the whole shard here, to the last byte? Read only once in the life of a process; a damaged one is partial
        from now on, and one that cannot be read now stays what it is. Counts as a use."""

    async def pieces(self, digest: ShardDigest) -> PieceList | None:
        """The list of a whole shard; None when it is not here."""

    async def read(self, pieces: PieceList, index: int) -> bytes:
        """One piece of a whole shard. Raises Refused(MISSING_SHARDS) when it has gone."""

    async def save_span(self, deployment: DeploymentId, span: bytes) -> None:
        """Remember a span that was loaded, over restarts."""

    async def forget_span(self, deployment: DeploymentId) -> None:
        """Idempotent."""

    async def saved_spans(self) -> tuple[tuple[DeploymentId, bytes], ...]:
        """What was remembered, the newest first: bytes from a disk, to be read as if a stranger had sent them."""
