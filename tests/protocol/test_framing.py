"""Frames: whole = byte by byte = any split; lengths, header and announced body size are checked before the body."""

from __future__ import annotations

import itertools
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import limits
from protocol.errors import LocalProtocolError, RemoteProtocolError
from protocol.framing import FrameDecoder, encode_frame
from protocol.messages import (
    CONTROL,
    FRAME_BYTES_MAX,
    SESSION,
    Message,
    Ping,
    ShardOffer,
    ShardPiece,
    Step,
    StepOutput,
    body_fits,
)
from protocol.tensors import DTYPES, TensorHeader
from tests.helpers.protocol_samples import SAMPLES, body_of
from tests.helpers.protocol_samples import SESSION as SESSION_ID

FRAMES = [(sample, body_of(sample)) for sample in SAMPLES]
STREAM = b"".join(encode_frame(*frame) for frame in FRAMES)


def feed(*parts: bytes) -> list[tuple[Message, bytes]]:
    decoder = FrameDecoder(FRAME_BYTES_MAX[SESSION])
    frames = [frame for part in parts for frame in decoder.feed(part)]
    assert decoder.idle
    return frames


def test_whole_is_byte_by_byte() -> None:
    assert feed(STREAM) == FRAMES
    assert feed(*(bytes([byte]) for byte in STREAM)) == FRAMES


def test_every_split_in_two() -> None:
    for at in range(len(STREAM) + 1):
        assert feed(STREAM[:at], STREAM[at:]) == FRAMES


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, len(STREAM)), max_size=12).map(sorted))
def test_any_splits(cuts: list[int]) -> None:
    edges = [0, *cuts, len(STREAM)]
    assert feed(*(STREAM[low:high] for low, high in itertools.pairwise(edges))) == FRAMES


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.binary(max_size=80), st.integers(0, 1 << 12))
def test_any_bytes_give_frames_or_a_remote_protocol_error(data: bytes, bound: int) -> None:
    try:
        for message, body in FrameDecoder(bound).feed(data):
            assert encode_frame(message, body) in data
    except RemoteProtocolError:
        pass


def test_reading_what_is_wanted_completes_a_frame() -> None:
    """`wanted` never asks for a byte of the next frame, and never for nothing."""
    decoder, at = FrameDecoder(FRAME_BYTES_MAX[SESSION]), 0
    done: list[tuple[Message, bytes]] = []
    while at < len(STREAM):
        size = decoder.wanted
        assert size >= 1
        done += decoder.feed(STREAM[at : at + size])
        at += size
    assert at == len(STREAM)
    assert done == FRAMES


@pytest.mark.parametrize("protocol", FRAME_BYTES_MAX)
def test_an_oversized_frame_is_refused_at_its_eighth_byte(protocol: str) -> None:
    bound = FRAME_BYTES_MAX[protocol]
    decoder = FrameDecoder(bound)
    assert not list(decoder.feed(struct.pack(">I", bound + 1) + bytes(3)))
    with pytest.raises(RemoteProtocolError, match="at most here"):
        list(decoder.feed(b"\x0a"))


def test_an_oversized_header_is_refused_at_its_length() -> None:
    lengths = struct.pack(">II", limits.HEADER_BYTES_MAX + 5, limits.HEADER_BYTES_MAX + 1)
    with pytest.raises(RemoteProtocolError, match="header of"):
        list(FrameDecoder(1 << 30).feed(lengths))


def test_a_body_of_another_size_than_its_tensor_is_refused_before_it_comes() -> None:
    step = next(sample for sample in SAMPLES if isinstance(sample, Step))
    frame = encode_frame(step, bytes(step.tensor.nbytes))
    header = frame[8 : len(frame) - step.tensor.nbytes]
    for wrong in (0, step.tensor.nbytes - 1, step.tensor.nbytes + 1, 16 * limits.MIB):
        start = struct.pack(">II", 4 + len(header) + wrong, len(header)) + header
        decoder = FrameDecoder(FRAME_BYTES_MAX[SESSION])
        for part in (start, bytes(wrong)):  # and asking again does not make it good
            with pytest.raises(RemoteProtocolError, match="with a body of"):
                list(decoder.feed(part))


def test_only_tensors_pieces_and_piece_lists_have_a_body() -> None:
    for message in SAMPLES:
        fits = {size for size in (0, 1, 16, 32, limits.PIECE_BYTES, limits.PIECE_BYTES + 1) if body_fits(message, size)}
        if isinstance(message, ShardPiece):
            assert fits == {1, 16, 32, limits.PIECE_BYTES}
        elif isinstance(message, ShardOffer):
            assert fits == {32}
        else:
            assert fits == ({message.tensor.nbytes} if hasattr(message, "tensor") else {0})


def test_the_largest_step_fits_into_a_frame() -> None:
    tensor = TensorHeader("float32", (1024, 8192))
    assert tensor.nbytes == limits.STEP_BYTES_MAX
    step = Step(SESSION_ID, 0, 0, 0, 0, 1, "span", 0, "", tensor)
    ((message, body),) = feed(encode_frame(step, bytes(tensor.nbytes)))
    assert message == step
    assert len(body) == tensor.nbytes


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_dtype_makes_a_step_of_more_numbers(dtype: str) -> None:
    with pytest.raises(ValueError, match="numbers"):
        Step(SESSION_ID, 0, 0, 0, 0, 1, "span", 0, "", TensorHeader(dtype, (1025, 8192)))


def test_our_own_oversized_or_mismatched_frame_is_our_bug() -> None:
    tensor = TensorHeader("float32", (2048, 8192))
    with pytest.raises(LocalProtocolError, match="larger"):
        encode_frame(StepOutput(SESSION_ID, 0, 0, 0, 0, 0, tensor), bytes(tensor.nbytes))
    with pytest.raises(LocalProtocolError, match="with a body"):
        encode_frame(Ping(bytes(8)), b"x")


def test_a_violation_comes_after_the_good_frames_before_it() -> None:
    frames = FrameDecoder(FRAME_BYTES_MAX[CONTROL]).feed(encode_frame(Ping(bytes(8))) + b"\xff" * 8)
    assert next(frames) == (Ping(bytes(8)), b"")
    with pytest.raises(RemoteProtocolError):
        next(frames)
