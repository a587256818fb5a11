"""The codec: one byte string for each record, and any other bytes a RemoteProtocolError, in bounded memory."""

from __future__ import annotations

import contextlib
import dataclasses
import tracemalloc
from collections.abc import Callable
from functools import partial
from typing import Annotated, get_args, get_origin, get_type_hints

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocol import limits
from protocol.codec import decode, decode_message, encode, encode_message
from protocol.errors import RemoteProtocolError
from protocol.manifest import Manifest
from protocol.messages import MESSAGES, Message, Refusal, RefusalReason
from protocol.schema import Record, Size, to_plain
from tests.helpers.protocol_samples import MANIFEST, RECORDS, SAMPLES, records

SLOW_TO_DRAW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.binary() | st.text(),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=12,
)


@pytest.mark.parametrize("kind", RECORDS, ids=lambda kind: kind.__name__)
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=SLOW_TO_DRAW)
@given(data=st.data())
def test_every_record_round_trips(kind: type[Record], data: st.DataObject) -> None:
    record = data.draw(records(kind))
    assert decode(kind, encode(record)) == record
    if isinstance(record, Message):
        assert decode_message(encode_message(record)) == record


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.binary(max_size=64) | PLAIN.map(msgpack.packb))
def test_any_bytes_give_a_message_or_a_remote_protocol_error(data: bytes) -> None:
    try:
        message = decode_message(data)
    except RemoteProtocolError:
        return
    assert encode_message(message) == data


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.sampled_from(SAMPLES), st.lists(PLAIN, max_size=12), st.integers(0, 12))
def test_any_fields_give_a_message_or_a_remote_protocol_error(message: Message, fields: list, keep: int) -> None:
    plain = [message.TAG, *to_plain(message)[:keep], *fields]
    with contextlib.suppress(RemoteProtocolError):
        decode_message(msgpack.packb(plain))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.sampled_from([encode_message(sample) for sample in SAMPLES]), st.data())
def test_a_changed_byte_is_another_message_or_refused(data: bytes, draw: st.DataObject) -> None:
    at, flip = draw.draw(st.integers(0, len(data) - 1)), draw.draw(st.integers(1, 255))
    changed = data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :]
    with contextlib.suppress(RemoteProtocolError):
        assert decode_message(changed) != decode_message(data)


@pytest.mark.parametrize("sample", [*SAMPLES, MANIFEST], ids=lambda sample: type(sample).__name__)
def test_every_truncation_and_extension_is_refused(sample: Record) -> None:
    data = encode(sample)
    for wrong in [*(data[:end] for end in range(len(data))), data + b"\0", data + b"\xc0"]:
        with pytest.raises(RemoteProtocolError):
            decode(type(sample), wrong)


@pytest.mark.parametrize(
    "bad",
    [float("nan"), float("inf"), float("-inf")],
)
def test_numbers_that_are_none_are_refused(bad: float) -> None:
    plain = to_plain(MANIFEST)
    plain[4][0][2][1][1] = bad
    with pytest.raises(RemoteProtocolError):
        decode(Manifest, msgpack.packb(plain))


def test_float_32_is_not_canonical() -> None:
    plain = to_plain(MANIFEST)
    plain[4][0][2][1][1] = 0.5
    decode(Manifest, msgpack.packb(plain))
    with pytest.raises(RemoteProtocolError, match="canonical"):
        decode(Manifest, msgpack.packb(plain, use_single_float=True))


def test_a_boolean_is_not_an_integer() -> None:
    with pytest.raises(RemoteProtocolError, match="expected int"):
        decode_message(msgpack.packb([22, bytes(32), True, 1]))


def test_a_reason_may_be_given_as_its_enum() -> None:
    data = encode_message(Refusal(RefusalReason.MEMORY, ""))
    assert data == encode_message(Refusal("memory", ""))
    assert type(decode_message(data).reason) is str  # type: ignore[attr-defined]


def test_text_that_utf8_cannot_carry_is_no_field() -> None:
    with pytest.raises(ValueError, match="UTF-8"):
        Refusal("memory", "\ud800")


@pytest.mark.parametrize("announced", [limits.ARRAY_ITEMS_MAX, 1 << 16, 1 << 19])
def test_nested_announcements_take_no_memory(announced: int) -> None:
    """Each level of an array may announce as many items as there are bytes; room must not be made for all of them."""
    depth = 900
    data = (b"\xdd" + announced.to_bytes(4, "big")) * depth
    data += bytes(limits.HEADER_BYTES_MAX - len(data))
    tracemalloc.start()
    try:
        with pytest.raises(RemoteProtocolError):
            decode_message(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 * limits.MIB


def empty_arrays() -> bytes:
    """A header within its bound: a message whose fields are arrays of 256 arrays of 256 empty arrays."""
    fields = [[[[]] * limits.ARRAY_ITEMS_MAX] * limits.ARRAY_ITEMS_MAX] * 15
    data: bytes = msgpack.packb([12, *fields])
    assert limits.HEADER_BYTES_MAX * 0.9 < len(data) <= limits.HEADER_BYTES_MAX
    return data


@pytest.mark.parametrize(
    ("read", "peak_bytes"), [(decode_message, limits.MIB), (partial(decode, Manifest), 16 * limits.MIB)]
)
def test_a_million_empty_arrays_are_not_built(read: Callable[[bytes], Record], peak_bytes: int) -> None:
    """In one call, which would hold up the event loop: each array is within its bound."""
    data = empty_arrays()
    tracemalloc.start()
    try:
        with pytest.raises(RemoteProtocolError, match="arrays"):
            read(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < peak_bytes


def arrays_in(hint: object) -> int:
    """Of the largest value that a field of this type can have."""
    bound = None
    if get_origin(hint) is Annotated:
        hint, bound, *_ = get_args(hint)
    if get_origin(hint) is tuple:
        assert isinstance(bound, Size)
        return 1 + bound.high * arrays_in(get_args(hint)[0])
    if isinstance(hint, type) and issubclass(hint, Record):
        hints = get_type_hints(hint, include_extras=True)
        return 1 + sum(arrays_in(hints[field.name]) for field in dataclasses.fields(hint))  # type: ignore[arg-type]
    return 0


@pytest.mark.parametrize("kind", RECORDS, ids=lambda kind: kind.__name__)
def test_every_record_may_have_all_its_arrays(kind: type[Record]) -> None:
    largest = arrays_in(kind)
    assert largest <= kind.ARRAYS_MAX
    if kind is not Manifest:
        assert (kind.ARRAYS_MAX, largest < 40) == (limits.HEADER_ARRAYS_MAX, True)


def test_a_header_above_the_bound_is_refused_unread() -> None:
    with pytest.raises(RemoteProtocolError, match="at most"):
        decode_message(bytes(limits.HEADER_BYTES_MAX + 1))


def test_tags_are_unique() -> None:
    tags = [kind.TAG for kind in MESSAGES]
    assert len(set(tags)) == len(tags)
    assert all(0 < tag < 128 for tag in tags)  # one byte each
