"""Typed fields with bounds: the one path by which every wire value is checked, whoever made it.

A record is a frozen, slotted dataclass that inherits Record. Its annotations are the schema: int, float, str, bytes,
bool, Scalar, another Record, or tuple[X, ...], each int/str/bytes/tuple with a bound (Annotated). Checks run in
`__post_init__`, so a record that exists is well-formed; a violation raises ValueError, which the codec turns into
RemoteProtocolError. Records are stored and sent as arrays of their fields in declared order: no maps, no names.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, TypeVar, get_args, get_origin, get_type_hints

Scalar = int | float | str | bool
Plain = Any  # what msgpack holds: nested lists of scalars and bytes


@dataclass(frozen=True, slots=True)
class Between:
    """Inclusive bounds of an int."""

    low: int
    high: int


@dataclass(frozen=True, slots=True)
class Size:
    """Inclusive bounds of the length of str (characters), bytes or tuple."""

    low: int
    high: int


@dataclass(frozen=True, slots=True)
class Field:
    """How one annotated type is checked and brought to and from plain values."""

    check: Callable[[Any], None]
    to_plain: Callable[[Any], Plain]
    from_plain: Callable[[Plain], Any]


class Record:
    """Base of everything that crosses the wire or is signed."""

    __slots__ = ()
    TAG: ClassVar[int] = 0

    def __post_init__(self) -> None:
        for name, field in fields_of(type(self)):
            try:
                field.check(getattr(self, name))
            except ValueError as error:
                raise ValueError(f"{type(self).__name__}.{name}: {error}") from None
        self.check()

    def check(self) -> None:
        """Cross-field rules; raises ValueError."""


R = TypeVar("R", bound=Record)


def to_plain(record: Record) -> list[Plain]:
    """The record's fields in declared order, as msgpack can hold them."""
    return [field.to_plain(getattr(record, name)) for name, field in fields_of(type(record))]


def from_plain(kind: type[R], plain: Plain) -> R:
    """Inverse of to_plain; hostile input raises ValueError."""
    fields = fields_of(kind)
    if not isinstance(plain, list) or len(plain) != len(fields):
        raise ValueError(f"{kind.__name__}: expected an array of {len(fields)}")
    return kind(*(field.from_plain(value) for (_, field), value in zip(fields, plain, strict=True)))


def fields_of(kind: type[Record]) -> tuple[tuple[str, Field], ...]:
    """Names and checks of a record class, in declared order."""
    cached: Any = _fields_of  # classes are hashable; mypy reads their instances' __hash__
    fields: tuple[tuple[str, Field], ...] = cached(kind)
    return fields


@functools.cache
def _fields_of(kind: Any) -> tuple[tuple[str, Field], ...]:
    hints = get_type_hints(kind, include_extras=True)
    return tuple((f.name, _field(hints[f.name])) for f in dataclasses.fields(kind))


def _field(hint: Any) -> Field:
    bound = None
    if get_origin(hint) is Annotated:
        hint, bound = get_args(hint)
    hint = getattr(hint, "__supertype__", hint)  # NewType
    if get_origin(hint) is tuple:
        return _tuple_field(_field(get_args(hint)[0]), bound)
    if hint == Scalar:
        return Field(_check_scalar, _same, _same)
    if isinstance(hint, type) and issubclass(hint, Record):
        return Field(functools.partial(_check_type, hint), to_plain, functools.partial(from_plain, hint))
    return Field(functools.partial(_check_atom, hint, bound), _same, _same)


def _tuple_field(item: Field, bound: Any) -> Field:
    if not isinstance(bound, Size):
        raise TypeError("a tuple on the wire needs a Size")

    def check(value: Any) -> None:
        _check_type(tuple, value)
        _check_size(value, bound)
        for element in value:
            item.check(element)

    def load(plain: Plain) -> tuple[Any, ...]:
        if not isinstance(plain, list) or len(plain) > bound.high:
            raise ValueError("expected a shorter array")
        return tuple(item.from_plain(element) for element in plain)

    return Field(check, lambda value: [item.to_plain(element) for element in value], load)


def _check_atom(kind: type, bound: Any, value: Any) -> None:
    _check_type(kind, value)
    if kind is str:
        _check_utf8(value)
    if kind is float:
        if not math.isfinite(value):
            raise ValueError("not a finite number")
    elif kind is int:
        if not isinstance(bound, Between):
            raise TypeError("an int on the wire needs a Between")
        if not bound.low <= value <= bound.high:
            raise ValueError(f"{value} is not in {bound.low}..{bound.high}")
    elif kind in (str, bytes):
        if not isinstance(bound, Size):
            raise TypeError("str and bytes on the wire need a Size")
        _check_size(value, bound)


def _check_type(kind: type, value: Any) -> None:
    # Exact, because bool is an int, but not here; a StrEnum is the str that it travels as.
    if type(value) is not kind and not (kind is str and isinstance(value, str)):
        raise ValueError(f"expected {kind.__name__}, got {type(value).__name__}")


def _check_size(value: Any, bound: Size) -> None:
    if not bound.low <= len(value) <= bound.high:
        raise ValueError(f"length {len(value)} is not in {bound.low}..{bound.high}")


def _check_utf8(value: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("not text that UTF-8 can carry") from None


def _check_scalar(value: Any) -> None:
    if type(value) is str and len(value) <= 64:
        _check_utf8(value)
        return
    if type(value) is bool or (type(value) is int and abs(value) < 1 << 62):
        return
    if type(value) is float and math.isfinite(value):
        return
    raise ValueError("expected a bounded scalar")


def _same(value: Any) -> Any:
    return value
