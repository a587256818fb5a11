"""Canonical msgpack: one byte string for each record, and no other accepted.

A message is [tag, fields...]; a record inside it, or under a signature, is [fields...]. Decoding bounds every container
before building it, and their number while it builds them, rebuilds typed records (schema.py), and refuses input that
does not re-encode to the same bytes, so a digest or signature over bytes is one over meaning. Any bytes give a value or
RemoteProtocolError.
"""

from __future__ import annotations

from collections.abc import Callable

import msgpack

from protocol import limits
from protocol.errors import RemoteProtocolError
from protocol.messages import MESSAGES, Message
from protocol.schema import Plain, R, Record, from_plain, to_plain

_BY_TAG: dict[int, type[Message]] = {kind.TAG: kind for kind in MESSAGES}


def encode(record: Record) -> bytes:
    """Canonical bytes of a record without a tag (payloads of signatures)."""
    return _pack(to_plain(record))


def decode(kind: type[R], data: bytes) -> R:
    """Inverse of encode. Raises RemoteProtocolError."""
    plain = _unpack(data, kind.ARRAYS_MAX)
    try:
        record = from_plain(kind, plain)
    except ValueError as error:
        raise RemoteProtocolError(str(error)) from None
    # A field's plain value is the only one that gives its typed value, so these are the record's own bytes.
    if _pack(plain) != data:
        raise RemoteProtocolError(f"{kind.__name__} is not in canonical form")
    return record


def encode_message(message: Message) -> bytes:
    """Canonical bytes of a message with its tag."""
    return _pack([message.TAG, *to_plain(message)])


def decode_message(data: bytes) -> Message:
    """Inverse of encode_message. Raises RemoteProtocolError, for an unknown tag too."""
    plain = _unpack(data, Message.ARRAYS_MAX)
    if not isinstance(plain, list) or not plain or type(plain[0]) is not int:
        raise RemoteProtocolError("a message is an array that starts with its tag")
    kind = _BY_TAG.get(plain[0])
    if kind is None:
        raise RemoteProtocolError(f"unknown message {plain[0]}")
    try:
        message = from_plain(kind, plain[1:])
    except ValueError as error:
        raise RemoteProtocolError(str(error)) from None
    if _pack(plain) != data:
        raise RemoteProtocolError(f"{kind.__name__} is not in canonical form")
    return message


# One for all threads: msgpack.packb makes one for each call, with room for 256 KiB. Of plain values it runs no Python,
# so threads do not come between.
_pack: Callable[[Plain], bytes] = msgpack.Packer(use_bin_type=True).pack


def _unpack(data: bytes, arrays_max: int) -> Plain:
    if len(data) > limits.HEADER_BYTES_MAX:
        raise RemoteProtocolError(f"a header of {len(data)} bytes; {limits.HEADER_BYTES_MAX} at most")
    # An array takes a byte at least: the headers of steps are too short for too many, and not slowed by counting.
    count = _at_most(arrays_max) if len(data) > arrays_max else None
    try:
        # Strings are bounded by len(data); an array's room is taken when it is announced, so that has a bound of its
        # own. Maps and extension types have no meaning here; empty ones pass this and fail as a field of no type.
        return msgpack.unpackb(
            data, raw=False, strict_map_key=True, max_array_len=limits.ARRAY_ITEMS_MAX, max_map_len=0, max_ext_len=0,
            list_hook=count,
        )  # fmt: skip
    except (ValueError, RecursionError, msgpack.exceptions.UnpackException) as error:
        raise RemoteProtocolError(f"not msgpack: {type(error).__name__}") from None


def _at_most(arrays_max: int) -> Callable[[list[Plain]], list[Plain]]:
    """A hook for each array that was built."""
    left = arrays_max

    def count(array: list[Plain]) -> list[Plain]:
        nonlocal left
        left -= 1
        if left < 0:
            raise RemoteProtocolError(f"more than {arrays_max} arrays")
        return array

    return count
