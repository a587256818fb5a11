"""Piece lists: what the digest binds, and that no piece but the right one is taken for it."""

from __future__ import annotations

import struct
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import limits
from protocol.errors import LocalProtocolError, RemoteProtocolError
from protocol.ids import ShardDigest
from protocol.messages import ShardOffer, Source
from protocol.pieces import PieceList, list_bytes, piece_count
from tests.helpers.protocol_samples import NEXT, records

PIECE = limits.PIECE_BYTES
SHARD = bytes(range(256)) * (PIECE // 128) + b"the rest"  # two whole pieces and a short one


def test_the_digest_is_the_one_that_the_document_states() -> None:
    hashes = b"".join(sha256(SHARD[at : at + PIECE]).digest() for at in range(0, len(SHARD), PIECE))
    assert PieceList.of_bytes(SHARD).hashes == hashes
    stated = sha256(b"sotto:shard/1\0" + struct.pack(">Q", len(SHARD)) + hashes).digest()
    assert PieceList.of_bytes(SHARD).digest == stated


@pytest.mark.parametrize("size", [1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE])
def test_places_cover_the_shard(size: int) -> None:
    pieces = PieceList.of_bytes(bytes(size))
    places = [pieces.place(index) for index in range(pieces.count)]
    assert pieces.count == piece_count(size) == list_bytes(size) // 32
    assert [offset for offset, _ in places] == list(range(0, size, PIECE))
    assert sum(length for _, length in places) == size
    for outside in (-1, pieces.count):
        with pytest.raises(LocalProtocolError):
            pieces.place(outside)


def test_a_piece_is_held_only_at_its_own_place() -> None:
    pieces = PieceList.of_bytes(SHARD)
    first, last = SHARD[:PIECE], SHARD[2 * PIECE :]
    assert pieces.holds(0, first)
    assert pieces.holds(2, last)
    assert not pieces.holds(2, first)
    assert not pieces.holds(0, first[:-1] + b"?")
    assert not pieces.holds(2, last + b"\0")
    assert not pieces.holds(2, b"")


def test_a_list_opens_only_under_its_own_digest_and_size() -> None:
    made = PieceList.of_bytes(SHARD)
    assert PieceList.open(made.digest, len(SHARD), made.hashes) == made
    garbled = made.hashes[:-1] + bytes([made.hashes[-1] ^ 1])
    for digest, size, hashes in (
        (ShardDigest(bytes(32)), len(SHARD), made.hashes),
        (made.digest, len(SHARD) - 1, made.hashes),  # as many pieces
        (made.digest, len(SHARD), garbled),
        (made.digest, len(SHARD), made.hashes[:-32]),
        (made.digest, len(SHARD), made.hashes + bytes(32)),
        (made.digest, 0, b""),
        (made.digest, limits.SHARD_BYTES_MAX + 1, made.hashes),
    ):
        with pytest.raises(RemoteProtocolError):
            PieceList.open(digest, size, hashes)


@given(st.binary(max_size=200), st.integers(-1, 1 << 40), st.binary(min_size=32, max_size=32))
def test_no_bytes_do_worse_than_be_refused(hashes: bytes, size: int, digest: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        PieceList.open(ShardDigest(digest), size, hashes)


@pytest.mark.parametrize("pieces", [[], [b""], [b"x", b"y"], [bytes(PIECE + 1)], [bytes(PIECE), b"x", b"y"]])
def test_a_list_is_made_of_whole_pieces(pieces: list[bytes]) -> None:
    with pytest.raises(LocalProtocolError):
        PieceList.of(pieces)


def test_the_largest_list_and_the_longest_offer_fit_into_a_frame() -> None:
    assert piece_count(limits.SHARD_BYTES_MAX) == limits.PIECES_MAX
    assert list_bytes(limits.SHARD_BYTES_MAX) == 256 * limits.KIB
    addrs = ("a" * limits.ADDR_CHARS_MAX,) * limits.ADDRS_MAX
    sources = (Source(NEXT.peer, addrs),) * limits.SHARD_SOURCES_MAX
    offer = ShardOffer(ShardDigest(bytes(32)), limits.SHARD_BYTES_MAX, sources, bytes(limits.CAPABILITY_BYTES_MAX))
    assert len(repr(offer)) + list_bytes(limits.SHARD_BYTES_MAX) < limits.SHARD_FRAME_BYTES_MAX


@given(records(ShardOffer))
def test_offers_name_peers(offer: ShardOffer) -> None:
    assert all(len(source.peer) == 52 for source in offer.sources)
