"""Records without a network: any slicing of any bytes gives the same records, or a violation."""

from __future__ import annotations

import pytest
from cryptography.exceptions import InvalidTag
from hypothesis import given
from hypothesis import strategies as st

from node.p2p.records import (
    RECEIVE_BYTES_FIRST,
    RECEIVE_BYTES_MAX,
    RECORD_BYTES,
    RECORDS_PER_TURN,
    Inbox,
    Kind,
    Violation,
    seal,
    seal_data,
)

TAG = b"t" * 16


class Clear:
    """A cipher that hides nothing, and tags alike."""

    def encrypt_with_ad(self, ad, plaintext):
        return bytes(plaintext) + TAG

    def decrypt_with_ad(self, ad, ciphertext):
        data = bytes(ciphertext)
        if data[-16:] != TAG:
            raise InvalidTag
        return data[:-16]


def put(inbox, data):
    """As a socket would: as much as there is space for. Gives the rest."""
    space = inbox.space()
    part = data[: len(space)]
    space[: len(part)] = part
    inbox.arrived(len(part))
    return data[len(part) :]


def read(pieces, wanted=1 << 30):
    """What an application reads when the network brings these pieces."""
    inbox, got = Inbox(Clear()), bytearray()
    try:
        for piece in pieces:
            while piece:
                piece = put(inbox, piece)
                while inbox.decrypt(wanted):
                    while inbox.unread_bytes:
                        got += inbox.read(wanted)
                    assert len(inbox._buffer) <= RECEIVE_BYTES_MAX
    except Violation:
        return bytes(got + inbox.read(1 << 30)), inbox.finished, "violation"
    return bytes(got), inbox.finished, inbox.stopped


records = st.lists(
    st.one_of(
        st.binary(min_size=1, max_size=60).map(lambda data: seal(Clear(), Kind.DATA, data)),
        st.sampled_from([Kind.FIN, Kind.STOP, Kind.HEARTBEAT]).map(lambda kind: seal(Clear(), kind)),
        st.builds(lambda kind, data: seal(Clear(), kind, data), st.sampled_from(list(Kind)), st.binary(max_size=4)),
    ),
    max_size=8,
).map(b"".join)


@given(st.one_of(records, st.binary(max_size=80), st.builds(bytes.__add__, records, st.binary(max_size=40))))
def test_any_slicing_reads_alike_and_any_bytes_read_or_violate(data):
    assert read([data]) == read([data[i : i + 1] for i in range(len(data))])


@given(st.binary(min_size=1, max_size=3 * RECORD_BYTES), st.integers(1, 1 << 18), st.integers(1, 1 << 18))
def test_data_of_any_size_comes_back_whole(data, network, wanted):
    wire = b"".join(seal_data(Clear(), memoryview(data)))
    assert read([wire[i : i + network] for i in range(0, len(wire), network)], wanted) == (data, False, False)


def test_the_largest_record_of_anybody_fits():
    plain = bytes([Kind.DATA]) + b"x" * (65535 - 16 - 1)
    wire = b"\xff\xff" + Clear().encrypt_with_ad(None, plain)
    assert read([wire, wire]) == (2 * plain[1:], False, False)


def test_an_idle_connection_holds_little_and_a_busy_one_a_bounded_buffer():
    inbox = Inbox(Clear())
    assert len(inbox._buffer) == RECEIVE_BYTES_FIRST
    rest = b"".join(seal_data(Clear(), memoryview(bytes(1 << 20))))
    while rest:
        rest = put(inbox, rest)
        while inbox.decrypt(1 << 20):
            inbox.read(1 << 20)
    assert len(inbox._buffer) == RECEIVE_BYTES_MAX


def test_no_more_is_decrypted_than_wanted():
    inbox = Inbox(Clear(), b"".join(seal(Clear(), Kind.DATA, b"abc") for _ in range(5)))
    assert inbox.decrypt(4)
    assert inbox.unread_bytes == 6
    assert inbox.read(5) == b"abcab"
    assert inbox.unread_bytes == 1


def test_a_turn_is_bounded():
    inbox = Inbox(Clear(), seal(Clear(), Kind.HEARTBEAT) * (RECORDS_PER_TURN + 1))
    assert inbox.decrypt(1)
    assert inbox._start
    assert inbox.decrypt(1)
    assert not inbox.decrypt(1)


def test_tiny_records_fill_the_room_too():
    inbox = Inbox(Clear(), seal(Clear(), Kind.DATA, b"x") * 5000)
    while inbox.has_room and inbox.decrypt(inbox.unread_bytes + 1):
        pass
    assert inbox.unread_bytes < 2100


@pytest.mark.parametrize("kind", [Kind.OPEN, Kind.ACCEPT, Kind.FIN])
def test_the_first_record_may_be_anything(kind):
    inbox = Inbox(Clear(), seal(Clear(), kind, b"name")[:-1])
    assert inbox.first() is None
    put(inbox, TAG[-1:])
    assert inbox.first() == (kind, b"name")
