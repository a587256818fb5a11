"""Mutations of valid bytes: what a hostile peer gets by changing what an honest one would send.

An input is a corpus entry and a list of edits, small integers all of them; so Hypothesis can draw and shrink the same
inputs that the long run draws from a random source.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgpack

INTERESTING = (0, 1, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0xFFFF, 1 << 16, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
PLAIN: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 1 << 53, -(1 << 63), (1 << 64) - 1, 0.0, 1e308, float("nan"), float("inf"),
    "", "x" * 65, b"", b"x" * 33, [], [[]], [0] * 300, {}, "\x00", "\u202e",
)  # fmt: skip
INPUT_BYTES_MAX = 1 << 16


class Edit(NamedTuple):
    """`at` and `size` are taken modulo what is there; `value` chooses what to write."""

    kind: int
    at: int
    size: int
    value: int


def random_edit(source: random.Random) -> Edit:
    return Edit(
        source.randrange(len(EDITS)),
        source.randrange(1 << 16),
        source.choice((1, 2, 4, 8, 40, 300)),
        source.getrandbits(32),
    )


def apply(data: bytes, edits: Sequence[Edit], corpus: Sequence[bytes]) -> bytes:
    """`data` after all edits, at most INPUT_BYTES_MAX long."""
    for edit in edits:
        data = EDITS[edit.kind % len(EDITS)](data, edit, corpus)[:INPUT_BYTES_MAX]
    return data


def _flip(data: bytes, edit: Edit, _: Sequence[bytes]) -> bytes:
    at = edit.at % max(1, len(data))
    return data[:at] + bytes(byte ^ (1 << edit.value % 8) for byte in data[at : at + 1]) + data[at + 1 :]


def _overwrite(data: bytes, edit: Edit, _: Sequence[bytes]) -> bytes:
    at = edit.at % max(1, len(data))
    word = edit.value.to_bytes(4, "big")[: edit.size % 5]
    return data[:at] + word + data[at + len(word) :]


def _insert(data: bytes, edit: Edit, _: Sequence[bytes]) -> bytes:
    at = edit.at % (len(data) + 1)
    return data[:at] + edit.value.to_bytes(4, "big") * (edit.size % 64) + data[at:]


def _remove(data: bytes, edit: Edit, _: Sequence[bytes]) -> bytes:
    at = edit.at % max(1, len(data))
    return data[:at] + data[at + edit.size :]


def _truncate(data: bytes, edit: Edit, _: Sequence[bytes]) -> bytes:
    return data[: edit.at % (len(data) + 1)]


def _repeat(data: bytes, edit: Edit, _: Sequence[bytes]) -> bytes:
    at = edit.at % max(1, len(data))
    return data[:at] + data[at : at + edit.size] * (edit.value % 9) + data[at:]


def _splice(data: bytes, edit: Edit, corpus: Sequence[bytes]) -> bytes:
    other = corpus[edit.value % len(corpus)]
    return data[: edit.at % (len(data) + 1)] + other[edit.size % (len(other) + 1) :]


def _length_lie(data: bytes, edit: Edit, _: Sequence[bytes]) -> bytes:
    """An interesting number where a length may stand, in either byte order."""
    at, width = edit.at % max(1, len(data)), (1, 2, 4, 8)[edit.size % 4]
    number = INTERESTING[edit.value % len(INTERESTING)] & ((1 << 8 * width) - 1)
    return data[:at] + number.to_bytes(width, "little" if edit.value & 1 << 20 else "big") + data[at + width :]


def _field(data: bytes, edit: Edit, _: Sequence[bytes]) -> bytes:
    """Another value somewhere in the first msgpack value, whose bytes may follow a frame's two lengths."""
    skip = 8 if edit.value & 1 else 0
    try:
        plain = msgpack.unpackb(data[skip:], raw=False)
    except (ValueError, msgpack.exceptions.UnpackException):
        return _flip(data, edit, ())
    where, at = plain, edit.at
    while isinstance(where, list) and where:
        index = at % len(where)
        if not isinstance(where[index], list) or not where[index] or edit.size == 2:
            where[index] = PLAIN[edit.value // 2 % len(PLAIN)]
            break
        where, at = where[index], at // len(where)
    packed: bytes = msgpack.packb(plain, use_bin_type=True)
    if not skip:
        return packed
    return (4 + len(packed)).to_bytes(4, "big") + len(packed).to_bytes(4, "big") + packed


EDITS = (_flip, _overwrite, _insert, _remove, _truncate, _repeat, _splice, _length_lie, _field, _field)
