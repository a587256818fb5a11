"""The one path by which wire values are checked: exact types, inclusive bounds, and no schema without bounds."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest

from protocol import limits
from protocol.ids import PeerId
from protocol.messages import Attach, LeaseSpan, OpenSession, Operation, SessionFailed, ShardOffer, Source, Step
from protocol.schema import Between, Record, Scalar, Size, from_plain, to_plain
from protocol.tensors import TensorHeader
from tests.helpers.protocol_samples import DIGEST, RECORDS, SESSION


@dataclass(frozen=True, slots=True)
class Everything(Record):
    count: Annotated[int, Between(-1, 5)]
    rate: float
    flag: bool
    name: Annotated[str, Size(1, 3)]
    data: Annotated[bytes, Size(2, 2)]
    value: Scalar
    many: Annotated[tuple[Annotated[int, Between(0, 9)], ...], Size(1, 2)]


GOOD: dict[str, Any] = {
    "count": 5,
    "rate": 0.5,
    "flag": True,
    "name": "äöü",
    "data": b"xy",
    "value": "v",
    "many": (0, 9),
}


def test_bounds_are_inclusive() -> None:
    for change in ({}, {"count": -1}, {"name": "x"}, {"many": (1,)}, {"value": "v" * 64}, {"value": -(1 << 62) + 1}):
        record = Everything(**(GOOD | change))
        assert from_plain(Everything, to_plain(record)) == record


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("count", -2),
        ("count", 6),
        ("count", True),
        ("count", 1.0),
        ("count", "1"),
        ("count", None),
        ("rate", 1),
        ("rate", float("nan")),
        ("rate", float("inf")),
        ("flag", 1),
        ("name", ""),
        ("name", "abcd"),
        ("name", b"abc"),
        ("name", "\udc80"),
        ("data", b"xyz"),
        ("data", bytearray(b"xy")),
        ("data", "xy"),
        ("value", None),
        ("value", b"v"),
        ("value", "v" * 65),
        ("value", 1 << 62),
        ("value", float("nan")),
        ("value", "\ud800"),
        ("many", ()),
        ("many", (1, 2, 3)),
        ("many", [1]),
        ("many", (10,)),
        ("many", (True,)),
    ],
)
def test_what_is_out_of_bounds_cannot_exist(name: str, bad: Any) -> None:
    with pytest.raises(ValueError, match=f"Everything.{name}"):
        Everything(**(GOOD | {name: bad}))


@pytest.mark.parametrize("plain", [None, 5, b"", "", {}, [], [1], [0] * 8, [[], [], [], [], [], [], []]])
def test_hostile_arrays_raise_value_error(plain: Any) -> None:
    with pytest.raises(ValueError):
        from_plain(Everything, plain)


@pytest.mark.parametrize("hint", [int, str, bytes, tuple[int, ...], Annotated[tuple[int, ...], Size(0, 1)]])
def test_a_schema_without_bounds_is_our_bug(hint: Any) -> None:
    value = {int: 1, str: "", bytes: b""}.get(hint, (1,))
    kind = type("Unbounded", (Record,), {"__annotations__": {"field": hint}, "__module__": __name__})
    with pytest.raises(TypeError, match=r"needs? a"):
        dataclass(frozen=True)(kind)(value)


@pytest.mark.parametrize("kind", RECORDS, ids=lambda kind: kind.__name__)
def test_no_array_is_longer_than_the_codec_takes(kind: type[Record]) -> None:
    assert len(fields(kind)) + 1 <= limits.ARRAY_ITEMS_MAX
    for hint in get_type_hints(kind, include_extras=True).values():
        if get_origin(hint) is Annotated and get_origin(get_args(hint)[0]) is tuple:
            assert get_args(hint)[1].high <= limits.ARRAY_ITEMS_MAX


@pytest.mark.parametrize(
    "change",
    [
        {"operation": "eval"},
        {"operation": Operation.LINEAR},
        {"matrix": "q"},
        {"block": 1},
        {"acked": 8},
        {"tensor": TensorHeader("float32", (4,))},
        {"tensor": TensorHeader("float32", (limits.STEP_TOKENS_MAX + 1, 8))},
        {"tail": 0},
        {"position": limits.CONTEXT_TOKENS_MAX + 1},
        {"session": bytes(15)},
    ],
)
def test_a_step_that_contradicts_itself_cannot_exist(change: dict[str, Any]) -> None:
    tensor = TensorHeader("float32", (2, 8))
    numbers = {"epoch": 0, "step": 7, "position": 0, "acked": 7, "tail": 1, "block": 0}
    good = numbers | {"session": SESSION, "operation": "span", "matrix": "", "tensor": tensor}
    Step(**good)
    with pytest.raises(ValueError):
        Step(**(good | change))


def test_other_rules_across_fields() -> None:
    for make in (
        lambda: LeaseSpan(b"m", 3, 3, 0, 1, b""),
        lambda: LeaseSpan(b"", 0, 3, 0, 1, b""),
        lambda: SessionFailed(SESSION, "tired", ""),
        lambda: ShardOffer(DIGEST, 0, (), b""),
        lambda: Source(PeerId("1" * 52), ("/ip4/192.0.2.8/tcp/4001",)),
        lambda: Attach(SESSION + b"\0"),
    ):
        with pytest.raises(ValueError):
            make()


def test_records_do_not_change() -> None:
    with pytest.raises(AttributeError):
        Attach(SESSION).session = SESSION  # type: ignore[misc]


@pytest.mark.parametrize("length", [1, 15])
def test_a_request_is_named_in_full_or_not_at_all(length: int) -> None:
    with pytest.raises(ValueError, match="16 bytes or by none"):
        OpenSession(SESSION, (b"ticket",), request=bytes(length))
    assert OpenSession(SESSION, (b"ticket",), request=bytes(16)).request != OpenSession(SESSION, (b"ticket",)).request
