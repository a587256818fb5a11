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
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, TypeVar, get_args, get_origin, get_type_hints

from protocol import limits

Scalar = int | float | str | bool
Plain = Any  # what msgpack holds: nested lists of scalars and bytes


@dataclass(frozen=True, slots=True)
class Between:
    """Inclusive bounds of an int."""

    low: int
    high: int


Count = Annotated[int, Between(0, 1 << 53)]  # no further than a double counts exactly
Milliseconds = Count


@dataclass(frozen=True, slots=True)
class Size:
    """Inclusive bounds of the length of str (characters), bytes or tuple."""

    low: int
    high: int


@dataclass(frozen=True, slots=True)
class Field:
    """How one annotated type is checked and brought to and from plain values. None: it is a plain value."""

    check: Callable[[Any], None]
    to_plain: Callable[[Any], Plain] | None = None
    from_plain: Callable[[Plain], Any] | None = None


@dataclass(frozen=True, slots=True)
class _Layout:
    """What a class's fields come to: every message is checked by it, so nothing is looked up again for each."""

    names: tuple[str, ...]
    values_of: Callable[[Any], tuple[Any, ...]]  # a record's values in declared order
    checks: tuple[Callable[[Any], None], ...]
    to_plain: tuple[tuple[int, Callable[[Any], Plain]], ...]  # by place, for the fields that are not plain
    from_plain: tuple[tuple[int, Callable[[Plain], Any]], ...]


class Record:
    """Base of everything that crosses the wire or is signed."""

    __slots__ = ()
    TAG: ClassVar[int] = 0
    ARRAYS_MAX: ClassVar[int] = limits.HEADER_ARRAYS_MAX  # in one of its kind, itself and all within

    def __post_init__(self) -> None:
        layout: _Layout = _layout_of(type(self))
        for index, value in enumerate(layout.values_of(self)):
            try:
                layout.checks[index](value)
            except ValueError as error:
                raise ValueError(f"{type(self).__name__}.{layout.names[index]}: {error}") from None
        self.check()

    def check(self) -> None:
        """Cross-field rules; raises ValueError."""


R = TypeVar("R", bound=Record)


def to_plain(record: Record) -> list[Plain]:
    """The record's fields in declared order, as msgpack can hold them."""
    layout: _Layout = _layout_of(type(record))
    plain = list(layout.values_of(record))
    for index, dump in layout.to_plain:
        plain[index] = dump(plain[index])
    return plain


def from_plain(kind: type[R], plain: Plain) -> R:
    """Inverse of to_plain; hostile input raises ValueError."""
    layout: _Layout = _layout_of(kind)
    if not isinstance(plain, list) or len(plain) != len(layout.names):
        raise ValueError(f"{kind.__name__}: expected an array of {len(layout.names)}")
    values = list(plain)
    for index, load in layout.from_plain:
        values[index] = load(values[index])
    return kind(*values)


def _lay_out(kind: type[Record]) -> _Layout:
    hints = get_type_hints(kind, include_extras=True)
    names = tuple(field.name for field in dataclasses.fields(kind))  # type: ignore[arg-type]  # all records are
    fields = [_field(hints[name]) for name in names]
    return _Layout(
        names,
        _values_of(names),
        tuple(field.check for field in fields),
        tuple((index, field.to_plain) for index, field in enumerate(fields) if field.to_plain),
        tuple((index, field.from_plain) for index, field in enumerate(fields) if field.from_plain),
    )


_layout_of: Any = functools.cache(_lay_out)  # classes are hashable; mypy reads their instances' __hash__


def _values_of(names: tuple[str, ...]) -> Callable[[Any], tuple[Any, ...]]:
    if len(names) > 1:
        return operator.attrgetter(*names)
    return lambda record: tuple(getattr(record, name) for name in names)  # attrgetter gives a lone value bare


def _field(hint: Any) -> Field:
    bound = None
    if get_origin(hint) is Annotated:
        hint, bound = get_args(hint)
    hint = getattr(hint, "__supertype__", hint)  # NewType
    if get_origin(hint) is tuple:
        return _tuple_field(_field(get_args(hint)[0]), bound)
    if hint == Scalar:
        return Field(_check_scalar)
    if isinstance(hint, type) and issubclass(hint, Record):
        return Field(functools.partial(_check_type, hint), to_plain, functools.partial(from_plain, hint))
    return Field(_atom_check(hint, bound))


def _tuple_field(item: Field, bound: Any) -> Field:
    if not isinstance(bound, Size):
        raise TypeError("a tuple on the wire needs a Size")
    dump, read = item.to_plain, item.from_plain

    def check(value: Any) -> None:
        _check_type(tuple, value)
        _check_size(value, bound)
        for element in value:
            item.check(element)

    def load(plain: Plain) -> tuple[Any, ...]:
        if not isinstance(plain, list) or len(plain) > bound.high:
            raise ValueError("expected a shorter array")
        return tuple(plain) if read is None else tuple(read(element) for element in plain)

    return Field(check, list if dump is None else lambda value: [dump(element) for element in value], load)


def _atom_check(kind: type, bound: Any) -> Callable[[Any], None]:
    """The check of a field of `kind`. Raises TypeError where a bound is missing: when the class is first used."""
    if kind is int:
        if not isinstance(bound, Between):
            raise TypeError("an int on the wire needs a Between")
        return functools.partial(_check_int, bound.low, bound.high)
    if kind in (str, bytes):
        if not isinstance(bound, Size):
            raise TypeError("str and bytes on the wire need a Size")
        return functools.partial(_check_str if kind is str else _check_bytes, bound)
    return _check_float if kind is float else functools.partial(_check_type, kind)


def _check_int(low: int, high: int, value: Any) -> None:
    if type(value) is not int:
        _check_type(int, value)
    if not low <= value <= high:
        raise ValueError(f"{value} is not in {low}..{high}")


def _check_bytes(bound: Size, value: Any) -> None:
    if type(value) is not bytes:
        _check_type(bytes, value)
    if not bound.low <= len(value) <= bound.high:
        _check_size(value, bound)


def _check_str(bound: Size, value: Any) -> None:
    if type(value) is not str:
        _check_type(str, value)
    if not value.isascii():
        _check_utf8(value)
    if not bound.low <= len(value) <= bound.high:
        _check_size(value, bound)


def _check_float(value: Any) -> None:
    _check_type(float, value)
    if not math.isfinite(value):
        raise ValueError("not a finite number")


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
