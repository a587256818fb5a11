"""What every Transport promises about a peer that it shuns, on every adapter."""

from __future__ import annotations

import pytest

from protocol.errors import TransportError
from tests.conformance.adapters import ECHO, echo, full_addr, peers_of, receive_exactly, run_with, until


async def heard(a, b):
    stream = await a.open(b.peer, b.addrs, ECHO)
    await stream.send(b"alive")
    assert await receive_exactly(stream, 5) == b"alive"
    await stream.aclose()


def test_a_shunned_peer_loses_its_streams_and_gets_none_until_the_time_is_over(adapter):
    async def body(world, a, b, other):
        for each in (a, b):
            each.handle(ECHO, echo)
        await heard(other, b)
        stream = await a.open(b.peer, b.addrs, ECHO)
        b.shun(a.peer, 60.0)
        with pytest.raises(TransportError):
            await stream.receive(1)
        await until(lambda: a.peer not in peers_of(b) and b.peer not in peers_of(a))
        for near, far in ((a, b), (b, a)):
            with pytest.raises(TransportError):
                await near.open(far.peer, far.addrs, ECHO)
        with pytest.raises(TransportError):
            await b.connect(full_addr(a))
        await heard(other, b)
        b.shun(a.peer, 0.0)
        await heard(a, b)
        await heard(b, a)

    run_with(adapter, body, "a", "b", "other")


def test_a_stranger_can_be_shunned_before_it_comes(adapter):
    async def body(world, a, b):
        b.handle(ECHO, echo)
        b.shun(a.peer, 60.0)
        with pytest.raises(TransportError):
            await a.open(b.peer, b.addrs, ECHO)
        await until(lambda: a.peer not in peers_of(b))

    run_with(adapter, body, "a", "b")
