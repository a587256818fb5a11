"""The messages: frozen, typed, bounded. Activations, numbers and names of peers; no field for token ids or text.

Four protocols share the frame. Each lists which way its messages go; session.py says in which order.
  control  request/response: lease, load, renew and release spans, revoke capabilities, ping
  shard    one side gives a sealed shard in pieces, the other says which: client -> worker, worker -> worker
  session  client <-> each hop: attach, open, step (to the first hop), outputs and failures (from all)
  link     hop -> next hop: open, step, close
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, ClassVar

from protocol import limits
from protocol.ids import (
    DIGEST_BYTES,
    ID_BYTES,
    PEER_ID_CHARS,
    DeploymentId,
    PeerId,
    SessionId,
    ShardDigest,
    check_peer_ids,
)
from protocol.pieces import list_bytes
from protocol.schema import Between, Count, Record, Size
from protocol.tensors import TensorHeader

CONTROL, SHARD, SESSION, LINK = "/sotto/control/1", "/sotto/shard/1", "/sotto/session/1", "/sotto/link/1"

Deployment = Annotated[DeploymentId, Size(ID_BYTES, ID_BYTES)]
Session = Annotated[SessionId, Size(ID_BYTES, ID_BYTES)]
Digest = Annotated[ShardDigest, Size(DIGEST_BYTES, DIGEST_BYTES)]
Block = Annotated[int, Between(0, limits.BLOCKS_MAX)]
StepId = Count
Epoch = Annotated[int, Between(0, 1 << 31)]
Position = Annotated[int, Between(0, limits.CONTEXT_TOKENS_MAX)]
Micros = Annotated[int, Between(0, limits.STEP_US_MAX)]
Detail = Annotated[str, Size(0, limits.DETAIL_CHARS_MAX)]
Reason = Annotated[str, Size(1, 32)]
LeaseSeconds = Annotated[int, Between(1, limits.LEASE_S_MAX)]
SignedLease = Annotated[bytes, Size(1, limits.LEASE_BYTES_MAX)]
Shown = Annotated[bytes, Size(0, limits.CAPABILITY_BYTES_MAX)]  # a capability; empty when it is the owner who asks
PageKeys = Annotated[bytes, Size(0, limits.PAGE_KEYS_MAX * limits.PAGE_KEY_BYTES)]  # one after another


class RefusalReason(StrEnum):
    """Why a peer declined; the caller may try another."""

    MEMORY = "memory"  # not enough for the span's weights
    KV_MEMORY = "kv_memory"  # not enough for the session's tokens
    DISK = "disk"  # not enough for the span's shards
    SESSIONS = "sessions"  # too many sessions, of this peer or in all
    UNKNOWN_DEPLOYMENT = "unknown_deployment"
    UNKNOWN_SESSION = "unknown_session"
    MISSING_SHARDS = "missing_shards"
    BAD_MANIFEST = "bad_manifest"
    BAD_SHARD = "bad_shard"
    BAD_TICKET = "bad_ticket"
    BAD_STEP = "bad_step"
    UNSUPPORTED = "unsupported"
    PREEMPTED = "preempted"  # the session's memory went to a client that holds less: open it again, and go on
    HOP_LOST = "hop_lost"  # the next hop cannot be reached
    FORBIDDEN = "forbidden"
    RATE = "rate"  # more requests than a peer may make in the time; the detail says when to come again
    PAUSED = "paused"  # the machine's owner wants no work now; the detail says until when, if that is known
    UNKNOWN_LEASE = "unknown_lease"  # it ended, or never was: lease the span again
    STOPPING = "stopping"
    INTERNAL = "internal"


def _check_reason(reason: str) -> None:
    if reason not in tuple(RefusalReason):
        raise ValueError(f"unknown reason {reason!r}")


def _check_page_keys(keys: bytes) -> None:
    if len(keys) % limits.PAGE_KEY_BYTES:
        raise ValueError("page keys are cut off")


def split_page_keys(keys: bytes) -> tuple[bytes, ...]:
    """The keys of a message, one for each page."""
    return tuple(keys[at : at + limits.PAGE_KEY_BYTES] for at in range(0, len(keys), limits.PAGE_KEY_BYTES))


class Message(Record):
    """A record with a tag of its own."""

    __slots__ = ()


# --- any protocol -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Refusal(Message):
    """The answer "no" to a request of control or shard."""

    TAG: ClassVar[int] = 1
    reason: Reason
    detail: Detail

    def check(self) -> None:
        _check_reason(self.reason)


# --- control ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ping(Message):
    TAG: ClassVar[int] = 10
    nonce: Annotated[bytes, Size(8, 8)]


@dataclass(frozen=True, slots=True)
class Pong(Message):
    TAG: ClassVar[int] = 11
    nonce: Annotated[bytes, Size(8, 8)]


@dataclass(frozen=True, slots=True)
class LeaseSpan(Message):
    """Promise blocks [start, end) of the deployment in `manifest`, and KV room for `kv_tokens` in them, for `lease_s`;
    say which shards are missing. Leasing again replaces one's own lease."""

    TAG: ClassVar[int] = 12
    manifest: Annotated[bytes, Size(1, limits.MANIFEST_BYTES_MAX)]
    start: Block
    end: Block
    kv_tokens: Annotated[int, Between(0, limits.CONTEXT_TOKENS_MAX)]
    lease_s: LeaseSeconds
    capability: Shown

    def check(self) -> None:
        if self.end <= self.start:
            raise ValueError("an empty span")


@dataclass(frozen=True, slots=True)
class SpanLeased(Message):
    TAG: ClassVar[int] = 13
    lease: SignedLease
    missing: Annotated[tuple[Digest, ...], Size(0, limits.BLOCKS_MAX)]


@dataclass(frozen=True, slots=True)
class LoadSpan(Message):
    """Load the leased span from its shards and measure it."""

    TAG: ClassVar[int] = 14
    deployment: Deployment


@dataclass(frozen=True, slots=True)
class SpanLoaded(Message):
    TAG: ClassVar[int] = 15
    weight_bytes: Count
    block_time_us: Count  # one position through one block, batch 1


@dataclass(frozen=True, slots=True)
class ReleaseSpan(Message):
    """End one's own lease. `forget`: end everybody's, and delete the deployment here."""

    TAG: ClassVar[int] = 16
    deployment: Deployment
    forget: bool
    capability: Shown


@dataclass(frozen=True, slots=True)
class SpanReleased(Message):
    TAG: ClassVar[int] = 17


@dataclass(frozen=True, slots=True)
class RenewLease(Message):
    """Let one's own lease last `lease_s` from now."""

    TAG: ClassVar[int] = 18
    deployment: Deployment
    lease_s: LeaseSeconds
    capability: Shown


@dataclass(frozen=True, slots=True)
class LeaseRenewed(Message):
    TAG: ClassVar[int] = 19
    lease: SignedLease


@dataclass(frozen=True, slots=True)
class RevokeCapability(Message):
    """Refuse the capability `serial` of the deployment's owner from now on."""

    TAG: ClassVar[int] = 40
    deployment: Deployment
    serial: Annotated[bytes, Size(ID_BYTES, ID_BYTES)]
    capability: Shown


@dataclass(frozen=True, slots=True)
class CapabilityRevoked(Message):
    TAG: ClassVar[int] = 41


# --- shard ------------------------------------------------------------------------------------------------------------


PieceIndex = Annotated[int, Between(0, limits.PIECES_MAX - 1)]


@dataclass(frozen=True, slots=True)
class Source(Record):
    """A worker that holds a shard, and where to dial it."""

    peer: Annotated[PeerId, Size(PEER_ID_CHARS, PEER_ID_CHARS)]
    addrs: Annotated[tuple[Annotated[str, Size(1, limits.ADDR_CHARS_MAX)], ...], Size(1, limits.ADDRS_MAX)]

    def check(self) -> None:
        check_peer_ids(self.peer)


@dataclass(frozen=True, slots=True)
class ShardOffer(Message):
    """Giver -> fetcher: you may ask me for pieces of this shard. The body is its piece list.

    From a client: `sources` have it too, and `capability` lets the worker read it there and wherever else it finds it.
    """

    TAG: ClassVar[int] = 20
    digest: Digest
    shard_bytes: Annotated[int, Between(1, limits.SHARD_BYTES_MAX)]
    sources: Annotated[tuple[Source, ...], Size(0, limits.SHARD_SOURCES_MAX)]
    capability: Shown


@dataclass(frozen=True, slots=True)
class ShardAsk(Message):
    """Worker -> worker: offer me this shard; `capability` says that its owner allows it."""

    TAG: ClassVar[int] = 21
    digest: Digest
    capability: Shown


@dataclass(frozen=True, slots=True)
class PiecesWanted(Message):
    """Fetcher -> giver: send `count` pieces from `first` on. Answered in order, whatever else was asked."""

    TAG: ClassVar[int] = 22
    digest: Digest
    first: PieceIndex
    count: Annotated[int, Between(1, limits.PIECES_WANTED_MAX)]


@dataclass(frozen=True, slots=True)
class ShardPiece(Message):
    """The body is the piece."""

    TAG: ClassVar[int] = 23
    digest: Digest
    index: PieceIndex


@dataclass(frozen=True, slots=True)
class ShardProgress(Message):
    """Worker -> client: so much of the shard is here and checked, whoever gave it. Also a sign of life."""

    TAG: ClassVar[int] = 24
    digest: Digest
    present_bytes: Annotated[int, Between(0, limits.SHARD_BYTES_MAX)]


@dataclass(frozen=True, slots=True)
class ShardStored(Message):
    """Worker -> client: the shard is whole; the end of its offer."""

    TAG: ClassVar[int] = 25
    digest: Digest


# --- session and link -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Attach(Message):
    """Client -> hop: outputs of this session go to the stream that this came by."""

    TAG: ClassVar[int] = 30
    session: Session


@dataclass(frozen=True, slots=True)
class Attached(Message):
    TAG: ClassVar[int] = 31
    session: Session


@dataclass(frozen=True, slots=True)
class OpenSession(Message):
    """Client -> first hop -> ... -> last: each hop opens the first box and forwards the rest.

    `page_keys` name the session's first pages: what the hop kept under them for this user need not be computed.
    `deterministic`: the same rows come out bit for bit, whatever is computed beside them and however a prompt is cut.
    `alone`: steps share no forward with other sessions'. `micro_batches`: a forward takes the short steps of one in so
    many of the client's open sessions with that number, but of `micro_batch_min` at least, and the others are at other
    hops meanwhile. These hold from the session's first opening on. `request`: the same random bytes for all sessions of
    a request that is preempted: a hop does not do that to one again and again.
    """

    TAG: ClassVar[int] = 32
    session: Session
    tickets: Annotated[tuple[Annotated[bytes, Size(1, limits.TICKET_BYTES_MAX)], ...], Size(1, limits.HOPS_MAX)]
    page_keys: PageKeys = b""
    deterministic: bool = False
    alone: bool = False
    micro_batches: Annotated[int, Between(1, limits.MICRO_BATCHES_MAX)] = 1
    micro_batch_min: Annotated[int, Between(1, limits.SESSIONS_PER_PEER_MAX)] = 1
    request: Annotated[bytes, Size(0, ID_BYTES)] = b""

    def check(self) -> None:
        _check_page_keys(self.page_keys)
        if len(self.request) not in (0, ID_BYTES):
            raise ValueError(f"a request is named by {ID_BYTES} bytes or by none")


@dataclass(frozen=True, slots=True)
class SessionOpened(Message):
    """Hop -> client: the ticket is good, KV is reserved, the next hop is reachable. The first `held_tokens` tokens were
    kept from earlier sessions: steps may begin at any position up to there."""

    TAG: ClassVar[int] = 33
    session: Session
    epoch: Epoch
    kv_tokens: Annotated[int, Between(1, limits.CONTEXT_TOKENS_MAX)]
    held_tokens: Position = 0


class Operation(StrEnum):
    SPAN = "span"  # a pass through the hop's blocks, with KV
    LINEAR = "linear"  # one stateless linear map of one block: y = x W^T (the masked tier)


_OPERATIONS = frozenset(Operation)


@dataclass(frozen=True, slots=True)
class Step(Message):
    """One pass. The body is a tensor [positions, width]; a worker truncates its KV to `position` first.

    `acked`: answers of all steps below it have arrived, and may be forgotten. `tail`: how many trailing positions the
    last hop answers with, all when there are fewer. `block` and `matrix` name the map of Operation.LINEAR and are 0 and
    "" otherwise.
    """

    TAG: ClassVar[int] = 34
    session: Session
    epoch: Epoch
    step: StepId
    position: Position
    acked: StepId
    tail: Annotated[int, Between(1, limits.STEP_TOKENS_MAX)]
    operation: Annotated[str, Size(1, 16)]
    block: Block
    matrix: Annotated[str, Size(0, limits.NAME_CHARS_MAX)]
    tensor: TensorHeader

    def check(self) -> None:
        if self.operation not in _OPERATIONS:
            raise ValueError(f"unknown operation {self.operation!r}")
        if (self.operation == Operation.LINEAR) != bool(self.matrix):
            raise ValueError("a linear step names its matrix, and no other does")
        if self.block and self.operation != Operation.LINEAR:
            raise ValueError("only a linear step names a block")
        if len(self.tensor.shape) != 2 or not 1 <= self.tensor.shape[0] <= limits.STEP_TOKENS_MAX:
            raise ValueError("a step's tensor is [positions, width]")
        if self.tensor.numbers > limits.STEP_NUMBERS_MAX:
            raise ValueError(f"a step of {self.tensor.numbers} numbers; {limits.STEP_NUMBERS_MAX} at most")
        if self.acked > self.step:
            raise ValueError("a step acknowledges an answer that it has not asked for yet")


@dataclass(frozen=True, slots=True)
class StepOutput(Message):
    """Hop -> client. The body is the hop's output: the last hop's answer, or what replay and verification feed on.

    `total_us` is from the step's arrival to this message; of it the forwards that computed the step took `compute_us`,
    and for `queue_us` it waited for other work.
    """

    TAG: ClassVar[int] = 35
    session: Session
    epoch: Epoch
    step: StepId
    compute_us: Micros
    queue_us: Micros
    total_us: Micros
    tensor: TensorHeader


@dataclass(frozen=True, slots=True)
class StepTimes(Message):
    """Hop -> client, from all but the last when their tickets' `returns` is "times": see StepOutput."""

    TAG: ClassVar[int] = 38
    session: Session
    epoch: Epoch
    step: StepId
    compute_us: Micros
    queue_us: Micros
    total_us: Micros


@dataclass(frozen=True, slots=True)
class SessionFailed(Message):
    """Hop -> client: the session is over at this hop."""

    TAG: ClassVar[int] = 36
    session: Session
    reason: Reason
    detail: Detail

    def check(self) -> None:
        _check_reason(self.reason)


@dataclass(frozen=True, slots=True)
class CloseSession(Message):
    """Client -> first hop -> ... -> last: free everything, but keep the first full pages, which `page_keys` name, for
    later sessions of this user."""

    TAG: ClassVar[int] = 37
    session: Session
    page_keys: PageKeys = b""

    def check(self) -> None:
        _check_page_keys(self.page_keys)


MESSAGES: tuple[type[Message], ...] = (
    Refusal, Ping, Pong, LeaseSpan, SpanLeased, LoadSpan, SpanLoaded, ReleaseSpan, SpanReleased,
    RenewLease, LeaseRenewed, RevokeCapability, CapabilityRevoked,
    ShardOffer, ShardAsk, PiecesWanted, ShardPiece, ShardProgress, ShardStored,
    Attach, Attached, OpenSession, SessionOpened, Step, StepOutput, StepTimes, SessionFailed, CloseSession,
)  # fmt: skip
FRAME_BYTES_MAX = {
    CONTROL: limits.CONTROL_BYTES_MAX,
    SHARD: limits.SHARD_FRAME_BYTES_MAX,
    SESSION: limits.STEP_FRAME_BYTES_MAX,
    LINK: limits.STEP_FRAME_BYTES_MAX,
}


def body_fits(message: Message, body_bytes: int) -> bool:
    """Whether a body of `body_bytes` may follow `message`: exactly its tensor, its piece list, a piece, or nothing."""
    match message:
        case Step() | StepOutput():
            return body_bytes == message.tensor.nbytes
        case ShardOffer():
            return body_bytes == list_bytes(message.shard_bytes)
        case ShardPiece():
            return 1 <= body_bytes <= limits.PIECE_BYTES
        case _:
            return body_bytes == 0
