"""The tables of docs/PROTOCOL.md, made from the code. `python -m tests.tools.protocol_tables docs/PROTOCOL.md` puts
them between the document's markers; tests/test_docs.py fails when they are not the ones that stand there."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from protocol import limits, messages
from protocol.adverts import Advert, HeldSpan, Rtt, Speed
from protocol.capabilities import Capability
from protocol.invites import Invite, InvitePeer
from protocol.leases import Lease
from protocol.manifest import BlockEntry, ConfigPair, Manifest, TensorEntry
from protocol.messages import CONTROL, FRAME_BYTES_MAX, LINK, MESSAGES, SESSION, SHARD, Message, RefusalReason
from protocol.reports import Comparison, Report
from protocol.schema import Between, Record, Scalar
from protocol.session import TABLES, State
from protocol.signed import Signed
from protocol.tensors import DTYPE_BYTES, FACTOR_BYTES, INT8_BLOCKS, WIRE_BLOCK, TensorHeader
from protocol.tickets import Ticket

TO_WORKER, TO_CLIENT, ON = "client → worker", "worker → client", "hop → next hop"
EITHER_TO_WORKER, BACK = "client or worker → worker", "worker → client or worker"  # workers ping each other
TO_FETCHER, TO_GIVER = "giver → fetcher", "fetcher → giver"
WAYS: dict[type[Message], tuple[tuple[str, str], ...]] = {
    messages.Ping: ((CONTROL, EITHER_TO_WORKER),),
    messages.Pong: ((CONTROL, BACK),),
    **dict.fromkeys((messages.LeaseSpan, messages.RenewLease), ((CONTROL, TO_WORKER),)),
    messages.Refusal: ((CONTROL, TO_CLIENT), (SHARD, "either way")),
    **dict.fromkeys((messages.LoadSpan, messages.ReleaseSpan), ((CONTROL, TO_WORKER),)),
    messages.RevokeCapability: ((CONTROL, TO_WORKER),),
    **dict.fromkeys((messages.SpanLeased, messages.LeaseRenewed), ((CONTROL, TO_CLIENT),)),
    **dict.fromkeys((messages.SpanLoaded, messages.SpanReleased), ((CONTROL, TO_CLIENT),)),
    messages.CapabilityRevoked: ((CONTROL, TO_CLIENT),),
    **dict.fromkeys((messages.ShardOffer, messages.ShardPiece), ((SHARD, TO_FETCHER),)),
    messages.PiecesWanted: ((SHARD, TO_GIVER),),
    messages.ShardAsk: ((SHARD, "worker → worker"),),
    **dict.fromkeys((messages.ShardProgress, messages.ShardStored), ((SHARD, TO_CLIENT),)),
    messages.Attach: ((SESSION, TO_WORKER),),
    **dict.fromkeys((messages.Attached, messages.SessionOpened), ((SESSION, TO_CLIENT),)),
    **dict.fromkeys((messages.StepOutput, messages.StepTimes, messages.SessionFailed), ((SESSION, TO_CLIENT),)),
    **dict.fromkeys((messages.OpenSession, messages.Step), ((SESSION, TO_WORKER), (LINK, ON))),
    messages.CloseSession: ((SESSION, TO_WORKER), (LINK, ON)),
}
BODIES: dict[type[Message], str] = {
    messages.Step: "the tensor",
    messages.StepOutput: "the tensor",
    messages.ShardOffer: "the piece list",
    messages.ShardPiece: "1..PIECE_BYTES bytes",
}
STRUCTURES: tuple[type[Record], ...] = (
    TensorHeader, messages.Source, Signed, Advert, Speed, HeldSpan, Rtt, Report, Comparison, Ticket, Capability, Lease,
    Manifest, BlockEntry, ConfigPair, TensorEntry, Invite, InvitePeer,
)  # fmt: skip


def number(value: int) -> str:
    """Powers of two from 2^16 on by their exponent, the rest in digits."""
    return f"2^{value.bit_length() - 1}" if value >= 1 << 16 and value & (value - 1) == 0 else str(value)


def shape(hint: Any) -> str:
    """A field's type and bounds in words."""
    bound = None
    if get_origin(hint) is Annotated:
        hint, bound = get_args(hint)
    hint = getattr(hint, "__supertype__", hint)
    if get_origin(hint) is tuple:
        return f"array of {_range(bound)} × ({shape(get_args(hint)[0])})"
    if hint == Scalar:
        return "scalar"
    if isinstance(bound, Between):
        return f"int {number(bound.low)}..{number(bound.high)}"
    name = {bytes: "bin", str: "str"}.get(hint, hint.__name__)
    return f"{name} {_range(bound)}" if bound else name


def _range(bound: Any) -> str:
    return number(bound.low) if bound.low == bound.high else f"{number(bound.low)}..{number(bound.high)}"


def fields(kind: type[Record]) -> str:
    hints = get_type_hints(kind, include_extras=True)
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]  # all records are
    return "; ".join(f"`{name}` {shape(hints[name])}" for name in names) or "none"


def message_table() -> list[str]:
    rows = ["| tag | message | goes | fields, in order | body |", "|---|---|---|---|---|"]
    for kind in MESSAGES:
        ways = "; ".join(f"{protocol.split('/')[2]}: {way}" for protocol, way in WAYS[kind])
        rows.append(f"| {kind.TAG} | {kind.__name__} | {ways} | {fields(kind)} | {BODIES.get(kind, 'none')} |")
    return rows


def structure_table() -> list[str]:
    rows = ["| structure | fields, in order |", "|---|---|"]
    return rows + [f"| {kind.__name__} | {fields(kind)} |" for kind in STRUCTURES]


def protocol_table() -> list[str]:
    rows = ["| protocol id | largest `rest`, bytes |", "|---|---|"]
    return rows + [f"| `{protocol}` | {bound} |" for protocol, bound in FRAME_BYTES_MAX.items()]


def dtype_table() -> list[str]:
    return (
        ["| dtype | bytes |", "|---|---|"]
        + [f"| {dtype} | {size} |" for dtype, size in DTYPE_BYTES.items()]
        + [f"| {INT8_BLOCKS} | 1, and {FACTOR_BYTES} for each block of {WIRE_BLOCK} numbers of a row |"]
    )


def reason_table() -> list[str]:
    return [", ".join(f"`{reason.value}`" for reason in RefusalReason) + "."]


def limit_table() -> list[str]:
    """Names, values and the reasons that stand beside them in protocol/limits.py."""
    rows = ["| limit | value | reason |", "|---|---|---|"]
    source = Path(limits.__file__).read_text(encoding="utf-8")
    reasons = dict(re.findall(r"^([A-Z_]+) = [^#\n]*?(?:  # (.*))?$", source, re.MULTILINE))
    for name, value in vars(limits).items():
        if name.isupper() and name not in ("KIB", "MIB"):
            shown = number(value) if isinstance(value, int) else f"{value:g}"
            rows.append(f"| {name} | {shown} | {reasons[name]} |")
    return rows


def state_table() -> list[str]:
    rows = []
    for (role, direction), table in TABLES.items():
        rows += [f"**{role.value} {direction}s**", "", "| state | message → next state |", "|---|---|"]
        for state in State:
            moves = ", ".join(f"{kind.__name__} → {after.value}" for kind, after in table[state].items())
            rows.append(f"| {state.value} | {moves or 'nothing'} |")
        rows.append("")
    return rows[:-1]


TABLES_OF_DOCUMENT: dict[str, Callable[[], list[str]]] = {
    "protocols": protocol_table,
    "messages": message_table,
    "structures": structure_table,
    "dtypes": dtype_table,
    "reasons": reason_table,
    "states": state_table,
    "limits": limit_table,
}


def filled(document: str) -> str:
    """The document with each table as the code has it."""
    for name, table in TABLES_OF_DOCUMENT.items():
        marks = re.compile(rf"(<!-- {name}: .*-->\n)(?:.*\n)*?(<!-- end of {name} -->)")
        places = list(marks.finditer(document))
        if len(places) != 1:
            raise ValueError(f"the document has no place for {name}")
        lines = "\n".join(table())
        document = f"{document[: places[0].end(1)]}{lines}\n{document[places[0].start(2) :]}"
    return document


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
