"""No field for token ids or text: every field of each schema is a number, bytes of fixed meaning, or allowed by name.

A field that is added must either be unable to carry a prompt, or be argued for in one of the lists below.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest

from protocol.messages import MESSAGES, Message
from protocol.schema import Record, Scalar, Size
from tests.helpers.protocol_samples import RECORDS

STR_ALLOWED = {
    "Refusal.reason": "one of RefusalReason",
    "Refusal.detail": "from a worker, who has no prompt to tell; for people",
    "SessionFailed.reason": "one of RefusalReason",
    "SessionFailed.detail": "from a worker, who has no prompt to tell; for people",
    "Step.operation": "one of Operation",
    "Step.matrix": "a tensor name of the manifest, at most 64 characters",
    "TensorHeader.dtype": "one of DTYPES",
    "Advert.addrs": "where the worker can be dialled",
    "Advert.device": "kind of device, at most 16 characters",
    "Advert.version": "version of the worker, at most 16 characters",
    "Speed.dtype": "a dtype, at most 16 characters",
    "Ticket.client": "a peer id",
    "Ticket.worker": "a peer id",
    "Ticket.predecessor": "a peer id",
    "Ticket.successor": "a peer id, or nothing",
    "Ticket.successor_addrs": "where the next worker can be dialled",
    "Ticket.returns": "one of RETURNS",
    "Source.peer": "a peer id",
    "Source.addrs": "where a worker can be dialled",
    "Capability.holder": "a peer id",
    "Lease.worker": "a peer id",
    "Lease.holder": "a peer id",
    "Lease.owner": "a peer id",
    "Capability.rights": "of Right",
    "InvitePeer.addrs": "where a peer can be dialled; an invite is made by sotto and handed on by people",
    "Manifest.tier": "one of TIERS",
    "Manifest.dtype": "one of DTYPE_BYTES",
    "ConfigPair.key": "a field of models.config.BlockConfig; the same for every prompt",
    "ConfigPair.value": "a scalar of a block's configuration; the same for every prompt",
    "TensorEntry.name": "a tensor name; the same for every prompt",
}
# Bytes that are not of one fixed length; the fixed ones are ids, nonces, digests, keys and signatures.
BYTES_ALLOWED = {
    "Invite.secret": "a private swarm's key, or nothing",
    "LeaseSpan.manifest": "a signed Manifest, checked by the worker",
    "LeaseSpan.capability": "a signed Capability, checked by the worker",
    "RenewLease.capability": "a signed Capability, checked by the worker",
    "ReleaseSpan.capability": "a signed Capability, checked by the worker",
    "RevokeCapability.capability": "a signed Capability, checked by the worker",
    "Ticket.capability": "a signed Capability, checked by the worker",
    "SpanLeased.lease": "a signed Lease, checked by the client",
    "LeaseRenewed.lease": "a signed Lease, checked by the client",
    "OpenSession.tickets": "sealed Tickets",
    "OpenSession.page_keys": "keyed digests of 16 bytes each, without whose key nobody can test a guess at a prompt",
    "OpenSession.request": "random bytes, or nothing",
    "CloseSession.page_keys": "as OpenSession's",
    "Signed.payload": "an Advert, Report, Ticket, Capability, Lease or Manifest, checked by who verifies it",
    "ShardOffer.capability": "a signed Capability, or nothing",
    "ShardAsk.capability": "a signed Capability",
}
# Series of integers could be token ids.
INTS_ALLOWED = {"TensorHeader.shape": "at most four sizes, that agree with the body"}
FORBIDDEN = re.compile(r"prompt|text|word|string|char|vocab|logit|sampl|ids?$|token(?!s$)", re.IGNORECASE)


@dataclass(frozen=True)
class Leaf:
    path: str
    kind: Any
    bound: Any
    repeated: bool


def leaves(kind: type[Record]) -> Iterator[Leaf]:
    hints = get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        yield from _leaves(f"{kind.__name__}.{field.name}", hints[field.name], False)


def _leaves(path: str, hint: Any, repeated: bool) -> Iterator[Leaf]:
    bound = None
    if get_origin(hint) is Annotated:
        hint, bound = get_args(hint)
    hint = getattr(hint, "__supertype__", hint)
    if get_origin(hint) is tuple:
        yield from _leaves(path, get_args(hint)[0], True)
    elif isinstance(hint, type) and issubclass(hint, Record):
        yield from leaves(hint)
    else:
        yield Leaf(path, hint, bound, repeated)


def objection(leaf: Leaf) -> str | None:
    """Why the field could carry ids or text; None when it could not."""
    name = leaf.path.split(".")[1]
    if FORBIDDEN.search(name):
        return "its name"
    if leaf.kind in (str, Scalar) and leaf.path not in STR_ALLOWED:
        return "a text"
    if leaf.kind is bytes and leaf.path not in BYTES_ALLOWED:
        fixed = isinstance(leaf.bound, Size) and leaf.bound.low == leaf.bound.high <= 64
        return None if fixed else "bytes of any length"
    if leaf.kind is int and leaf.repeated and leaf.path not in INTS_ALLOWED:
        return "a series of integers"
    return None


@pytest.mark.parametrize("kind", RECORDS, ids=lambda kind: kind.__name__)
def test_no_field_can_carry_token_ids_or_text(kind: type[Record]) -> None:
    assert {leaf.path: why for leaf in leaves(kind) if (why := objection(leaf))} == {}


def test_the_lists_name_nothing_that_does_not_exist() -> None:
    paths = {leaf.path for kind in RECORDS for leaf in leaves(kind)}
    assert (STR_ALLOWED.keys() | BYTES_ALLOWED.keys() | INTS_ALLOWED.keys()) - paths == set()


@dataclass(frozen=True, slots=True)
class Chatty(Message):
    ids: Annotated[tuple[int, ...], Size(0, 64)]
    note: Annotated[str, Size(0, 64)]
    blob: Annotated[bytes, Size(0, 64)]
    prompt_digest: Annotated[bytes, Size(32, 32)]
    series: Annotated[tuple[int, ...], Size(0, 64)]
    kv_tokens: int


def test_the_test_notices_an_added_field() -> None:
    objections = {leaf.path.split(".")[1]: objection(leaf) for leaf in leaves(Chatty)}
    assert objections == {
        "ids": "its name",
        "note": "a text",
        "blob": "bytes of any length",
        "prompt_digest": "its name",
        "series": "a series of integers",
        "kv_tokens": None,
    }


def test_every_message_is_looked_at() -> None:
    assert set(MESSAGES) <= set(RECORDS)
