"""One valid instance of every record that travels, and a strategy that draws others from the schema's annotations.

The samples are fixed: the golden vectors in tests/vectors/ are their bytes. The strategy reads the same annotations as
protocol/schema.py but none of its code; rules across fields are met by the amendments below.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from hypothesis import strategies as st

from protocol import limits
from protocol.adverts import Advert, HeldSpan, Rtt, Speed, peer_tag
from protocol.capabilities import Capability, Right, issue_capability, rights_of
from protocol.ids import ID_BYTES, PeerId, SessionId, ShardDigest, deployment_id, public_key_of
from protocol.invites import Invite, InvitePeer
from protocol.leases import Lease, sign_lease
from protocol.manifest import TIERS, BlockEntry, ConfigPair, Manifest, TensorEntry
from protocol.membership import PUBLIC_SWARM, SwarmKey
from protocol.messages import (
    MESSAGES,
    Attach,
    Attached,
    CapabilityRevoked,
    CloseSession,
    LeaseRenewed,
    LeaseSpan,
    LoadSpan,
    Message,
    OpenSession,
    Operation,
    PiecesWanted,
    Ping,
    Pong,
    Refusal,
    RefusalReason,
    ReleaseSpan,
    RenewLease,
    RevokeCapability,
    SessionFailed,
    SessionOpened,
    ShardAsk,
    ShardOffer,
    ShardPiece,
    ShardProgress,
    ShardStored,
    Source,
    SpanLeased,
    SpanLoaded,
    SpanReleased,
    Step,
    StepOutput,
    StepTimes,
)
from protocol.pieces import piece_count
from protocol.reports import RANGES_MAX, Comparison, Report, strategy_tag
from protocol.schema import Between, Record, Scalar, Size
from protocol.signed import Identity, Signed
from protocol.tensors import DTYPE_BYTES, DTYPES, TensorHeader
from protocol.tickets import RETURNS, Ticket

CLIENT, WORKER, NEXT, OTHER = (Identity(bytes([number]) * 32) for number in (1, 2, 3, 4))
SALT = bytes(range(16))
DEPLOYMENT = deployment_id(CLIENT.peer, SALT)
SESSION = SessionId(bytes(range(16, 32)))
DIGEST = ShardDigest(bytes(range(32, 64)))
NOW_MS = 1_760_000_000_000
VECTOR = TensorHeader("bfloat16", (1, 8))

ADVERT = Advert(
    sequence=NOW_MS,
    issued_ms=NOW_MS,
    expires_ms=NOW_MS + 6000,
    addrs=("/ip4/192.0.2.7/tcp/4001",),
    memory_bytes=8 << 30,
    memory_free_bytes=6 << 30,
    kv_free_bytes=1 << 30,
    disk_free_bytes=24 << 30,
    speeds=(Speed("float32", 21.5, 310.0), Speed("bfloat16", 20.25, 150.5)),
    spans=(HeldSpan(DEPLOYMENT, 0, 4, 812),),
    rtts=(Rtt(peer_tag(NEXT.peer), 1.5),),
    device="cpu",
    version="0.1.0",
    accepting=True,
    relayed=False,
    load_percent=25,
)
CAPABILITY = Capability(
    serial=bytes(range(80, 96)),
    deployment=DEPLOYMENT,
    holder=NEXT.peer,
    rights=("fetch", "use"),
    expires_ms=NOW_MS + 86_400_000,
)
REPORT = Report(
    issued_ms=NOW_MS,
    comparisons=(
        Comparison(bytes((0, 1, 2, 1, 0, 2, 1)), strategy_tag("speculation=lookup"), -31, 4, 3),
        Comparison(bytes((0, 1, 2, 1, 0, 2, 1)), strategy_tag("wire=int8"), 8, 2, 5),
    ),
)
INVITE = Invite(
    swarm=PUBLIC_SWARM,
    secret=b"",
    peers=(InvitePeer(public_key_of(WORKER.peer), ("/ip4/192.0.2.7/tcp/4001", "/dns4/worker.example/tcp/4001")),),
)
LEASE = Lease(
    serial=bytes(range(96, 112)),
    worker=WORKER.peer,
    holder=NEXT.peer,
    owner=CLIENT.peer,
    deployment=DEPLOYMENT,
    start=0,
    end=4,
    weight_bytes=1 << 20,
    kv_tokens=4096,
    granted_ms=NOW_MS,
    expires_ms=NOW_MS + 600_000,
)
TICKET = Ticket(
    session=SESSION,
    epoch=0,
    nonce=bytes(range(64, 80)),
    expires_ms=NOW_MS + 60_000,
    client=CLIENT.peer,
    worker=WORKER.peer,
    predecessor=CLIENT.peer,
    successor=NEXT.peer,
    successor_addrs=("/ip4/192.0.2.8/tcp/4001",),
    deployment=DEPLOYMENT,
    start=0,
    end=4,
    kv_tokens=512,
    returns="none",
    capability=b"",
)
BLOCK = BlockEntry(
    digest=DIGEST,
    shard_bytes=400,
    config=(ConfigPair("family", "llama"), ConfigPair("hidden_size", 8), ConfigPair("q_bias", False)),
    tensors=(TensorEntry("down", TensorHeader("float32", (8, 4))), TensorEntry("up", TensorHeader("float32", (4, 8)))),
)
MANIFEST = Manifest(DEPLOYMENT, SALT, "ee", "float32", (BLOCK, BLOCK))
SAMPLES: tuple[Message, ...] = (
    Refusal("memory", "12 MiB are missing"),
    Ping(bytes(8)),
    Pong(bytes(8)),
    LeaseSpan(bytes(3), 0, 4, 4096, 600, b""),
    SpanLeased(sign_lease(LEASE, WORKER), (DIGEST,)),
    LoadSpan(DEPLOYMENT),
    SpanLoaded(1 << 20, 812),
    ReleaseSpan(DEPLOYMENT, False, b""),
    SpanReleased(),
    RenewLease(DEPLOYMENT, 600, issue_capability(CAPABILITY, CLIENT)),
    LeaseRenewed(sign_lease(LEASE, WORKER)),
    RevokeCapability(DEPLOYMENT, CAPABILITY.serial, b""),
    CapabilityRevoked(),
    ShardOffer(DIGEST, 400, (Source(NEXT.peer, ("/ip4/192.0.2.8/tcp/4001",)),), bytes(3)),
    ShardAsk(DIGEST, bytes(3)),
    PiecesWanted(DIGEST, 0, 1),
    ShardPiece(DIGEST, 0),
    ShardProgress(DIGEST, 400),
    ShardStored(DIGEST),
    Attach(SESSION),
    Attached(SESSION),
    OpenSession(SESSION, (bytes(48), bytes(49)), bytes(32), True, False, 3, 5, bytes(16)),
    SessionOpened(SESSION, 0, 512, 64),
    Step(SESSION, 0, 7, 12, 6, 1, "span", 0, "", VECTOR),
    StepOutput(SESSION, 0, 7, 1234, 300, 1700, VECTOR),
    StepTimes(SESSION, 0, 7, 1234, 300, 1700),
    SessionFailed(SESSION, "hop_lost", ""),
    CloseSession(SESSION, bytes(48)),
)
RECORDS: tuple[type[Record], ...] = (*MESSAGES, Advert, Report, Ticket, Capability, Lease, Manifest, Signed, Invite)


def body_of(message: Message) -> bytes:
    """A body that the message may come with."""
    match message:
        case Step() | StepOutput():
            return bytes(range(256)) * (message.tensor.nbytes // 256) + bytes(message.tensor.nbytes % 256)
        case ShardOffer():
            return bytes(range(32)) * piece_count(message.shard_bytes)
        case ShardPiece():
            return b"piece"
        case _:
            return b""


def records(kind: type[Record]) -> st.SearchStrategy[Any]:
    """Valid records of `kind`, small enough to be quick."""
    hints = get_type_hints(kind, include_extras=True)
    drawn = st.fixed_dictionaries({field.name: _values(hints[field.name]) for field in dataclasses.fields(kind)})
    amend = _AMENDMENTS.get(kind)
    return (drawn.flatmap(amend) if amend else drawn).map(lambda values: kind(**values))


def _values(hint: Any) -> st.SearchStrategy[Any]:
    bound = None
    if get_origin(hint) is Annotated:
        hint, bound = get_args(hint)
    hint = getattr(hint, "__supertype__", hint)
    if get_origin(hint) is tuple:
        return st.lists(_values(get_args(hint)[0]), min_size=bound.low, max_size=max(bound.low, 3)).map(tuple)
    if hint == Scalar:
        return st.one_of(st.booleans(), st.integers(-(1 << 61), 1 << 61), _floats(), st.text(max_size=8))
    if isinstance(hint, type) and issubclass(hint, Record):
        return records(hint)
    return _atoms(hint, bound)


def _atoms(kind: type, bound: Any) -> st.SearchStrategy[Any]:
    if kind is int:
        assert isinstance(bound, Between)
        return st.one_of(st.sampled_from([bound.low, bound.high]), st.integers(bound.low, bound.high))
    if kind is float:
        return _floats()
    if kind is bool:
        return st.booleans()
    assert isinstance(bound, Size)
    many = st.binary if kind is bytes else st.text
    return many(min_size=bound.low, max_size=max(bound.low, min(bound.high, 40)))


def _floats() -> st.SearchStrategy[float]:
    return st.floats(allow_nan=False, allow_infinity=False)


Values = dict[str, Any]


def _span(values: Values) -> st.SearchStrategy[Values]:
    ends = st.integers(values["start"] % limits.BLOCKS_MAX + 1, limits.BLOCKS_MAX)
    return ends.map(lambda end: {**values, "start": values["start"] % limits.BLOCKS_MAX, "end": end})


def _ticket(values: Values) -> st.SearchStrategy[Values]:
    peers = st.sampled_from([CLIENT.peer, WORKER.peer, NEXT.peer])
    choice = {"returns": st.sampled_from(RETURNS), "successor": st.one_of(st.just(PeerId("")), peers)}
    choice |= dict.fromkeys(("client", "worker", "predecessor"), peers)
    return _span(values).flatmap(lambda done: st.fixed_dictionaries(choice).map(lambda drawn: done | drawn))


def _capability(values: Values) -> st.SearchStrategy[Values]:
    holders = st.sampled_from([CLIENT.peer, WORKER.peer, NEXT.peer])
    rights = st.sets(st.sampled_from(list(Right)), min_size=1).map(rights_of)
    return st.fixed_dictionaries({"holder": holders, "rights": rights}).map(lambda drawn: values | drawn)


def _invite(values: Values) -> st.SearchStrategy[Values]:
    secrets = st.one_of(st.just(b""), st.binary(min_size=32, max_size=32))
    return secrets.map(
        lambda secret: {**values, "secret": secret, "swarm": SwarmKey(secret).swarm if secret else PUBLIC_SWARM}
    )


def _lease(values: Values) -> st.SearchStrategy[Values]:
    granted = min(values["granted_ms"], 1 << 52)
    peers = st.sampled_from([CLIENT.peer, WORKER.peer, NEXT.peer])
    chosen = st.fixed_dictionaries(
        dict.fromkeys(("worker", "holder", "owner"), peers)
        | {"granted_ms": st.just(granted), "expires_ms": st.integers(granted + 1, granted + limits.LEASE_S_MAX * 1000)}
    )
    return _span(values).flatmap(lambda done: chosen.map(lambda drawn: done | drawn))


def _step(values: Values) -> st.SearchStrategy[Values]:
    linear = values["matrix"] != ""
    shape = values["tensor"].shape
    rows = 1 + (shape[0] if shape else 0) % limits.STEP_TOKENS_MAX
    width = min(shape[-1] if shape else 1, limits.STEP_NUMBERS_MAX // rows)
    tensor = TensorHeader(values["tensor"].dtype, (rows, width))
    fixed = {
        "operation": "linear" if linear else "span",
        "tensor": tensor,
        "acked": min(values["acked"], values["step"]),
    }
    return st.just({**values, **fixed, "block": values["block"] if linear else 0})


def _whole_keys(keys: bytes) -> bytes:
    return keys[: len(keys) // limits.PAGE_KEY_BYTES * limits.PAGE_KEY_BYTES]


def _block(values: Values) -> st.SearchStrategy[Values]:
    def unique(items: Any, key: str) -> tuple[Any, ...]:
        named = {getattr(item, key): item for item in items}
        return tuple(named[name] for name in sorted(named))

    tensors = tuple(dataclasses.replace(entry, header=TensorHeader("int8", (1,))) for entry in values["tensors"])
    fixed = {"config": unique(values["config"], "key"), "tensors": unique(tensors, "name")}
    return st.just({**values, **fixed, "shard_bytes": max(values["shard_bytes"], len(tensors))})


def _advert(values: Values) -> st.SearchStrategy[Values]:
    memory, issued = values["memory_bytes"], min(values["issued_ms"], 1 << 52)
    fixed = {name: min(values[name], memory) for name in ("memory_free_bytes", "kv_free_bytes")}
    lives = st.integers(1, int(limits.ADVERT_LIFE_MAX_S * 1000))
    return lives.map(lambda life: {**values, **fixed, "issued_ms": issued, "expires_ms": issued + life})


def _report(values: Values) -> st.SearchStrategy[Values]:
    named = {(each.kind, each.strategy): each for each in values["comparisons"]}
    return st.just({**values, "comparisons": tuple(named.values())})


def _choose(**choices: tuple[str, ...]) -> Callable[[Values], st.SearchStrategy[Values]]:
    drawn = st.fixed_dictionaries({name: st.sampled_from(values) for name, values in choices.items()})
    return lambda values: drawn.map(lambda chosen: values | chosen)


def _amend(**fix: Callable[[Any], Any]) -> Callable[[Values], st.SearchStrategy[Values]]:
    return lambda values: st.just(values | {name: change(values[name]) for name, change in fix.items()})


_AMENDMENTS: dict[type[Record], Callable[[Values], st.SearchStrategy[Values]]] = {
    Refusal: _choose(reason=tuple(reason.value for reason in RefusalReason)),
    SessionFailed: _choose(reason=tuple(reason.value for reason in RefusalReason)),
    LeaseSpan: _span,
    Lease: _lease,
    Source: _choose(peer=(CLIENT.peer, WORKER.peer, NEXT.peer)),
    HeldSpan: _span,
    Capability: _capability,
    TensorHeader: _choose(dtype=DTYPES),
    Speed: _amend(read_gb_s=lambda value: abs(value) + 0.5, gflop_s=lambda value: abs(value) + 0.5),
    Rtt: _amend(rtt_ms=abs),
    Step: _step,
    OpenSession: _amend(page_keys=_whole_keys, request=lambda named: named and named.ljust(ID_BYTES, named[-1:])),
    CloseSession: _amend(page_keys=_whole_keys),
    BlockEntry: _block,
    Manifest: _choose(tier=TIERS, dtype=tuple(DTYPE_BYTES)),
    Ticket: _ticket,
    Invite: _invite,
    Advert: _advert,
    Comparison: _amend(kind=lambda ranges: bytes(number % RANGES_MAX for number in ranges)),
    Report: _report,
}
assert {operation.value for operation in Operation} == {"span", "linear"}  # what _step chooses between
