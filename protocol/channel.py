"""Messages over a Stream: frames in, frames out. Holds no task and no timeout; callers own both.

One task may send while another receives. Bytes that end in mid-frame are a TransportError (the peer died), not a
protocol violation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from protocol import limits
from protocol.errors import LocalProtocolError, RemoteProtocolError, TransportError
from protocol.framing import FrameDecoder, encode_frame
from protocol.ids import PeerId
from protocol.messages import FRAME_BYTES_MAX, Message
from protocol.ports import PromptStream, Stream


class Channel:
    """A stream of one of our protocols. `arriving` is told how many bytes of a frame are here whenever the stream is
    asked for its rest, and 0 with each message given out, as nobody asks while that is dealt with; what it raises comes
    out of `receive`. `given`: messages given out since the stream was last read, which lets other tasks have their
    turn."""

    __slots__ = (
        "_arriving",
        "_decoder",
        "_frame_bytes_max",
        "_prompt",
        "_ready",
        "_stream",
        "given",
        "received_bytes",
        "sent_bytes",
    )

    def __init__(self, stream: Stream, protocol: str, arriving: Callable[[int], None] = lambda _: None) -> None:
        self._stream = stream
        self._prompt = stream if isinstance(stream, PromptStream) else None
        self._arriving = arriving
        self._frame_bytes_max = FRAME_BYTES_MAX[protocol]
        self._decoder = FrameDecoder(self._frame_bytes_max)
        self._ready: Iterator[tuple[Message, bytes]] = iter(())
        self.given = 0
        self.sent_bytes = 0
        self.received_bytes = 0

    @property
    def remote(self) -> PeerId:
        return self._stream.remote

    async def send(self, message: Message, body: bytes = b"") -> None:
        """One frame in one write. Raises TransportError; LocalProtocolError for what the peer would refuse."""
        await self.send_all(((message, body),))

    async def send_all(self, messages: Sequence[tuple[Message, bytes]]) -> None:
        """A frame for each message and its body, all in one write, so that they arrive together. Raises what `send`
        raises."""
        await self.send_frames([self.frame(*each) for each in messages])

    async def send_frames(self, frames: list[bytes]) -> None:
        """What `frame` made, all in one write; takes `frames` over. Raises TransportError."""
        data = b"".join(frames) if len(frames) > 1 else frames[0]
        frames.clear()
        self.sent_bytes += len(data)
        await self._stream.send(data)

    def send_at_once(self, message: Message, body: bytes = b"") -> bool:
        """`send` without waiting, when the stream can do that now; False: nothing was sent. Raises LocalProtocolError
        for what the peer would refuse."""
        if self._prompt is None or len(body) >= self._prompt.at_once_bytes:  # a frame is longer than its body
            return False
        frame = self.frame(message, body)
        if not self._prompt.send_at_once(frame):
            return False
        self.sent_bytes += len(frame)
        return True

    async def receive(self) -> tuple[Message, bytes] | None:
        """The next message and its body; None when the peer finished. Raises TransportError, RemoteProtocolError."""
        while True:
            frame = next(self._ready, None)  # one at a time: a chunk of tiny messages is no pause for others
            self._arriving(self._decoder.unfinished if frame is None else 0)
            if frame is not None:
                self.given += 1
                return frame
            self.given = 0
            wanted = min(max(self._decoder.wanted, limits.READ_BYTES), limits.STREAM_CHUNK_BYTES)
            data = await self._stream.receive(wanted)
            if not data:
                if self._decoder.idle:
                    return None
                raise TransportError("the stream ended inside a frame")
            self.received_bytes += len(data)
            self._ready = self._decoder.feed(data)

    async def call(self, request: Message) -> Message:
        """Send a request that has no body, and give its answer. Raises TransportError, RemoteProtocolError."""
        await self.send(request)
        reply = await self.receive()
        if reply is None:
            raise TransportError("the peer closed the stream instead of answering")
        message, body = reply
        if body:
            raise RemoteProtocolError(f"{type(message).__name__} came with a body")
        return message

    def frame(self, message: Message, body: bytes = b"") -> bytes:
        """The bytes of a message. Raises LocalProtocolError for what the peer would refuse."""
        frame = encode_frame(message, body)
        if len(frame) - 4 > self._frame_bytes_max:
            raise LocalProtocolError(f"{type(message).__name__} of {len(frame)} bytes on a stream of smaller frames")
        return frame

    async def finish(self) -> None:
        await self._stream.finish()

    async def aclose(self) -> None:
        await self._stream.aclose()
