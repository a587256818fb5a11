"""A channel over a scripted stream: chunks become messages, ends become None or TransportError. No event loop needed:
the scripted stream never waits, so each coroutine runs to its end at once."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest

from protocol import limits
from protocol.channel import Channel
from protocol.errors import LocalProtocolError, RemoteProtocolError, TransportError
from protocol.framing import encode_frame
from protocol.ids import ShardDigest
from protocol.messages import CONTROL, FRAME_BYTES_MAX, SESSION, SHARD, Message, Ping, Pong, ShardPiece, Step
from protocol.tensors import TensorHeader
from tests.helpers.protocol_samples import SAMPLES, WORKER, body_of
from tests.helpers.protocol_samples import SESSION as SESSION_ID

T = TypeVar("T")
PING, PONG = Ping(bytes(8)), Pong(bytes(8))


class Script:
    """A Stream that gives what it was told to give and keeps what it was sent."""

    def __init__(self, *chunks: bytes) -> None:
        self.chunks = list(chunks)
        self.sent: list[bytes] = []
        self.largest_asked = 0
        self.remote = WORKER.peer

    async def send(self, data: bytes) -> None:
        self.sent.append(data)

    async def receive(self, max_bytes: int) -> bytes:
        self.largest_asked = max(self.largest_asked, max_bytes)
        if not self.chunks:
            return b""
        chunk = self.chunks.pop(0)
        if len(chunk) > max_bytes:
            self.chunks.insert(0, chunk[max_bytes:])
        return chunk[:max_bytes]

    async def finish(self) -> None: ...

    async def aclose(self) -> None: ...


def done(work: Coroutine[Any, Any, T]) -> T:
    try:
        work.send(None)
    except StopIteration as stop:
        result: T = stop.value
        return result
    raise AssertionError("it waited")


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
def test_messages_come_in_order_then_the_end(size: int) -> None:
    data = b"".join(encode_frame(sample, body_of(sample)) for sample in SAMPLES)
    channel = Channel(Script(*(data[at : at + size] for at in range(0, len(data), size))), SESSION)
    assert [done(channel.receive()) for _ in SAMPLES] == [(sample, body_of(sample)) for sample in SAMPLES]
    assert done(channel.receive()) is None
    assert channel.received_bytes == len(data)


def test_messages_of_one_chunk_are_decoded_one_at_a_time() -> None:
    channel = Channel(Script(2 * encode_frame(PING) + b"\xff" * 8), CONTROL)
    assert [done(channel.receive()) for _ in range(2)] == [(PING, b"")] * 2
    with pytest.raises(RemoteProtocolError):
        done(channel.receive())


def test_what_is_here_of_a_frame_is_told_when_its_rest_is_asked_for_and_not_while_a_message_is_dealt_with() -> None:
    frame, told = encode_frame(PING), list[int]()
    channel = Channel(Script(2 * frame + frame[:3], frame[3:5], frame[5:]), CONTROL, told.append)
    assert [done(channel.receive()) for _ in range(3)] == [(PING, b"")] * 3
    assert told == [0, 0, 0, 3, 5, 0]


def test_a_frame_is_one_write() -> None:
    script = Script()
    channel = Channel(script, CONTROL)
    done(channel.send(PING))
    assert script.sent == [encode_frame(PING)]
    assert channel.sent_bytes == len(script.sent[0])


def test_several_frames_are_one_write_and_the_same_frames() -> None:
    script, steps = Script(), [(PING, b""), (ShardPiece(ShardDigest(bytes(32)), 0), b"piece"), (PONG, b"")]
    channel = Channel(script, SHARD)
    done(channel.send_all(steps))
    assert script.sent == [b"".join(encode_frame(message, body) for message, body in steps)]
    assert channel.sent_bytes == len(script.sent[0])


def test_what_one_read_brought_is_counted() -> None:
    frame = encode_frame(PING)
    channel = Channel(Script(3 * frame, frame[:5], frame[5:] + frame), CONTROL)
    given = []
    while done(channel.receive()) is not None:
        given.append(channel.given)
    assert given == [1, 2, 3, 1, 2]


@pytest.mark.parametrize("end", range(1, len(encode_frame(PING))))
def test_an_end_inside_a_frame_is_the_networks_fault(end: int) -> None:
    with pytest.raises(TransportError, match="inside a frame"):
        done(Channel(Script(encode_frame(PING)[:end]), CONTROL).receive())


def test_a_call_gives_the_answer() -> None:
    assert done(Channel(Script(encode_frame(PONG)), CONTROL).call(PING)) == PONG
    with pytest.raises(TransportError, match="instead of answering"):
        done(Channel(Script(), CONTROL).call(PING))
    with pytest.raises(RemoteProtocolError, match="with a body"):
        done(Channel(Script(encode_frame(ShardPiece(ShardDigest(bytes(32)), 0), b"x")), SHARD).call(PING))


def test_reads_are_bounded_by_a_transport_chunk() -> None:
    step = Step(SESSION_ID, 0, 0, 0, 0, 1, "span", 0, "", TensorHeader("int8", (1024, 8192)))
    script = Script(encode_frame(step, bytes(8 * limits.MIB)))
    channel = Channel(script, SESSION)
    received = done(channel.receive())
    assert received is not None
    assert received[0] == step
    assert script.largest_asked == limits.STREAM_CHUNK_BYTES


def test_what_the_peer_would_refuse_is_not_sent() -> None:
    script = Script()
    tensor = TensorHeader("int8", (1024, 2048))
    assert tensor.nbytes > FRAME_BYTES_MAX[CONTROL]
    step = Step(SESSION_ID, 0, 0, 0, 0, 1, "span", 0, "", tensor)
    with pytest.raises(LocalProtocolError, match="smaller frames"):
        done(Channel(script, CONTROL).send(step, bytes(tensor.nbytes)))
    assert script.sent == []


class Prompt(Script):
    """Takes small messages at once."""

    at_once_bytes = 100

    def send_at_once(self, data: bytes) -> bool:
        self.sent.append(data)
        return True


def test_what_is_too_large_to_be_sent_at_once_is_not_encoded_for_that(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[int] = []

    def encode(message: Message, body: bytes) -> bytes:
        encoded.append(len(body))
        return encode_frame(message, body)

    monkeypatch.setattr("protocol.channel.encode_frame", encode)
    stream = Prompt()
    channel = Channel(stream, SHARD)
    large = ShardPiece(ShardDigest(bytes(32)), 0)
    assert not channel.send_at_once(large, bytes(1 << 20))
    assert channel.send_at_once(PING)
    assert (encoded, len(stream.sent)) == ([0], 1)
    stream.at_once_bytes = 0
    assert not channel.send_at_once(PING), "it is busy"
    assert encoded == [0]
