"""Asking a worker: one request, one answer, each within its time, and every failure names the worker.

Errors of the network and of the peer come out as HopLost, HopRefused or HopViolation. It retries nothing.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TypeVar

import trio

from client.dialling import open_stream
from client.errors import HopLost, HopRefused, HopViolation, blame
from client.ports import ClientPorts
from client.routing import Hop
from protocol.channel import Channel
from protocol.errors import RemoteProtocolError, TransportError
from protocol.ids import PeerId
from protocol.messages import Message, Refusal

ANSWER_S = 30.0  # a request that the worker answers from memory; dialling included
M = TypeVar("M", bound=Message)


@asynccontextmanager
async def channel_to(ports: ClientPorts, hop: Hop, protocol: str) -> AsyncIterator[Channel]:
    """A stream to `hop`, closed on the way out. Errors of the network and of the peer come out naming it."""
    try:
        with within(hop.peer, ANSWER_S):
            stream = await open_stream(ports, hop.peer, hop.addrs, protocol)
    except TransportError as error:
        raise blame(hop.peer, error, "cannot be reached") from error
    channel = Channel(stream, protocol)
    try:
        yield channel
    except (TransportError, RemoteProtocolError) as error:
        raise blame(hop.peer, error, "was lost before it had done what was asked of it") from error
    finally:
        with trio.CancelScope(deadline=trio.current_time() + 1.0, shield=True):
            await channel.aclose()


@contextmanager
def within(peer: PeerId, seconds: float) -> Iterator[None]:
    """Raises HopLost when the block takes longer."""
    with trio.move_on_after(seconds) as scope:
        yield
    if scope.cancelled_caught:
        raise HopLost(peer, f"gave no sign of life for {seconds:g} s")


async def ask(peer: PeerId, channel: Channel, request: Message, answer: type[M], seconds: float) -> M:
    with within(peer, seconds):
        await channel.send(request)
    return await receive(peer, channel, answer, seconds)


async def receive(peer: PeerId, channel: Channel, answer: type[M], seconds: float) -> M:
    """The peer's answer, of the expected type. Raises HopRefused, HopViolation, HopLost."""
    message, body = await hear(peer, channel, seconds)
    if not isinstance(message, answer) or body:
        raise HopViolation(peer, f"{type(message).__name__} came where {answer.__name__} was due")
    return message


async def hear(peer: PeerId, channel: Channel, seconds: float) -> tuple[Message, bytes]:
    """Whatever the peer says next, but for a refusal. Raises HopRefused, HopLost."""
    with within(peer, seconds):
        reply = await channel.receive()
    if reply is None:
        raise HopLost(peer, "closed the stream instead of answering")
    if isinstance(reply[0], Refusal):
        raise HopRefused(peer, reply[0].reason, reply[0].detail)
    return reply
