"""The keyed stream: golden vectors, a second implementation, and the distributions drawn from it."""

from __future__ import annotations

import json
import struct
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from equivariant.keys import RootKey
from equivariant.stream import CHUNK_BYTES, KeyStream, Stream

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "keystream.json").read_text())
ROOT = RootKey.from_bytes(bytes(range(32)))
STREAM = KeyStream(ROOT, bytes(16))


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])
def test_golden_vectors(vector: dict) -> None:  # type: ignore[type-arg]
    keyed = KeyStream(RootKey.from_bytes(bytes.fromhex(vector["root"])), bytes.fromhex(vector["deployment_id"]))

    def stream() -> Stream:
        return keyed.derive(vector["block"], vector["name"])

    assert stream().read(64).hex() == vector["bytes"]
    assert [int(word) for word in stream().uint64(4)] == vector["uint64"]
    assert stream().permutation(12).tolist() == vector["permutation"]
    assert stream().signs(12).tolist() == vector["signs"]
    assert stream().uniform(3).tolist() == vector["uniform"]
    torch.testing.assert_close(
        stream().normal(4), torch.tensor(vector["normal"], dtype=torch.float64), rtol=1e-14, atol=1e-14
    )


def chacha20_block(key: bytes, counter: int, nonce: bytes) -> bytes:
    """RFC 8439, section 2.3, written out."""
    start = [*struct.unpack("<4I", b"expand 32-byte k"), *struct.unpack("<8I", key), counter]
    start += struct.unpack("<3I", nonce)
    state = list(start)

    def turn(a: int, b: int, c: int, d: int) -> None:
        for x, y, z, bits in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
            state[x] = (state[x] + state[y]) & 0xFFFFFFFF
            mixed = state[z] ^ state[x]
            state[z] = ((mixed << bits) | (mixed >> (32 - bits))) & 0xFFFFFFFF

    for _ in range(10):
        for column in range(4):
            turn(column, column + 4, column + 8, column + 12)
        for column in range(4):
            turn(column, 4 + (column + 1) % 4, 8 + (column + 2) % 4, 12 + (column + 3) % 4)
    return struct.pack("<16I", *((a + b) & 0xFFFFFFFF for a, b in zip(state, start, strict=True)))


def test_the_stream_is_what_the_module_says() -> None:
    place = bytes(range(16)) + b"\x01" + (7).to_bytes(4, "little") + b"value.3"
    key = blake2b(place, digest_size=32, key=ROOT.to_bytes(), person=b"sotto/stream/v01").digest()
    stream = KeyStream(ROOT, bytes(range(16))).derive(7, "value.3")
    first = stream.read(CHUNK_BYTES)
    assert first[:128] == chacha20_block(key, 1, bytes(12)) + chacha20_block(key, 2, bytes(12))
    assert first[-64:] == chacha20_block(key, CHUNK_BYTES // 64, bytes(12))
    assert stream.read(64) == chacha20_block(key, 1, (1).to_bytes(12, "little"))


@given(st.lists(st.integers(0, 3 * CHUNK_BYTES // 2), max_size=5))
def test_reading_in_pieces_gives_the_same_bytes(sizes: list[int]) -> None:
    whole = STREAM.derive(0, "pieces").read(sum(sizes))
    stream = STREAM.derive(0, "pieces")
    assert b"".join(stream.read(size) for size in sizes) == whole


def test_every_part_of_the_place_matters() -> None:
    other_root = KeyStream(RootKey.from_bytes(bytes(32)), bytes(16))
    other_deployment = KeyStream(ROOT, bytes(15) + b"\x01")
    streams = [
        STREAM.derive(None, "q"),
        STREAM.derive(0, "q"),
        STREAM.derive(1, "q"),
        STREAM.derive(256, "q"),
        STREAM.derive(0, "k"),
        STREAM.derive(0, ""),
        STREAM.derive(0, "q\0"),
        other_root.derive(0, "q"),
        other_deployment.derive(0, "q"),
    ]
    assert len({stream.read(32) for stream in streams}) == len(streams)


def test_a_deployment_id_has_sixteen_bytes() -> None:
    with pytest.raises(ValueError, match="16 bytes"):
        KeyStream(ROOT, bytes(15))


def test_secrets_come_from_no_global_generator() -> None:
    torch.manual_seed(1)
    first = STREAM.derive(0, "x").orthogonal(8)
    torch.manual_seed(2)
    np.random.seed(3)
    assert torch.equal(first, STREAM.derive(0, "x").orthogonal(8))


def test_uniform_is_open_and_even() -> None:
    u = STREAM.derive(0, "uniform").uniform(200_000)
    assert 0 < float(u.min()) < 1e-4
    assert 1 - 1e-4 < float(u.max()) < 1
    counts = torch.histc(u, bins=64, min=0, max=1)
    assert float(((counts - 3125) ** 2 / 3125).sum()) < 113  # chi-square, 63 degrees, p = 1e-4


def test_the_largest_word_gives_a_number_below_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stream, "read", lambda self, size: b"\xff" * size)
    assert float(Stream(bytes(32)).uniform(1)) < 1.0
    monkeypatch.setattr(Stream, "read", lambda self, size: b"\0" * size)
    assert float(Stream(bytes(32)).uniform(1)) > 0.0


def test_normal_has_the_moments_of_one() -> None:
    z = STREAM.derive(0, "normal").normal(500, 401)
    assert z.shape == (500, 401)
    assert abs(float(z.mean())) < 5 / z.numel() ** 0.5
    assert abs(float(z.square().mean()) - 1) < 5 * (2 / z.numel()) ** 0.5
    assert abs(float(z.pow(4).mean()) - 3) < 5 * (96 / z.numel()) ** 0.5
    neighbours = (z.flatten()[:-1] * z.flatten()[1:]).mean()
    assert abs(float(neighbours)) < 5 / z.numel() ** 0.5


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_normal_of_odd_sizes(count: int) -> None:
    assert torch.equal(STREAM.derive(0, "odd").normal(count), STREAM.derive(0, "odd").normal(8)[:count])


def test_permutations_are_uniform() -> None:
    stream, counts = STREAM.derive(0, "permutation"), dict[tuple[int, ...], int]()
    for _ in range(4800):
        order = tuple(stream.permutation(4).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24
    assert sum((count - 200) ** 2 / 200 for count in counts.values()) < 58  # chi-square, 23 degrees, p = 1e-4


def test_tied_words_are_all_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = iter([np.array([5, 1, 5], dtype=np.uint64), np.array([9, 7, 8], dtype=np.uint64)])
    monkeypatch.setattr(Stream, "uint64", lambda self, count: next(draws))
    assert Stream(bytes(32)).permutation(3).tolist() == [1, 2, 0]


def test_signs_are_balanced() -> None:
    signs = STREAM.derive(0, "signs").signs(100_001)
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert abs(float(signs.mean())) < 5 / 100_001**0.5


@pytest.mark.parametrize("size", [1, 2, 64])
def test_orthogonal(size: int) -> None:
    q = STREAM.derive(0, "orthogonal").orthogonal(size)
    torch.testing.assert_close(q @ q.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-14 * size)


def test_orthogonal_is_haar_and_not_the_bare_qr() -> None:
    """Haar has E[tr Q] = 0 and E[(tr Q)^2] = 1; Householder QR without the sign fix gives E[tr Q] below -1."""
    stream = STREAM.derive(0, "haar")
    traces = torch.stack([stream.orthogonal(6).trace() for _ in range(400)])
    assert abs(float(traces.mean())) < 5 / 400**0.5
    assert abs(float(traces.square().mean()) - 1) < 5 * (2 / 400) ** 0.5


@pytest.mark.parametrize("condition", [1.5, 10.0])
def test_invertible_keeps_its_bound_and_knows_its_inverse(condition: float) -> None:
    stream = STREAM.derive(0, "invertible")
    for _ in range(10):
        matrix, inverse = stream.invertible(16, condition)
        torch.testing.assert_close(matrix @ inverse, torch.eye(16, dtype=torch.float64), rtol=0, atol=1e-13)
        assert 1.0 < float(torch.linalg.cond(matrix)) < condition


def test_log_uniform_stays_inside() -> None:
    values = STREAM.derive(0, "log").log_uniform(10_000, 0.5, 2.0)
    assert 0.5 < float(values.min()) < 0.51
    assert 1.99 < float(values.max()) < 2.0
    assert abs(float(values.log().mean())) < 5 * 0.4 / 100
