"""Honest nodes for a test's body, and the guard that every such body runs under."""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager

import trio

from node.p2p.mesh import MeshConfig, open_mesh
from tests.conformance.adapters import ECHO, GUARD_S, echo, gossip_line, receive_exactly, seed_of

TOPIC = "/test/topic/1"


def guarded(body, *places, guard_s=GUARD_S):
    """Run `body` with what each of `places`, which are context managers, gives."""

    async def main():
        with trio.fail_after(guard_s):
            async with AsyncExitStack() as stack:
                await body(*[await stack.enter_async_context(place) for place in places])

    trio.run(main)


@asynccontextmanager
async def echoing(config):
    async with open_mesh(config) as mesh:
        mesh.handle(ECHO, echo)
        yield mesh


def two_meshes(body):
    """Run `body(a, b)` with two nodes that listen, and do not know each other."""
    guarded(body, *(echoing(MeshConfig(seed_of(name))) for name in "ab"))


async def still_works(a, b):
    """Streams and gossip between two honest nodes."""
    stream = await b.open(a.peer, a.addrs, ECHO)
    await stream.send(b"alive")
    assert await receive_exactly(stream, 5) == b"alive"
    await stream.aclose()
    if TOPIC not in a._topics:
        a_messages = await a.subscribe(TOPIC, lambda message: True)
        await b.subscribe(TOPIC, lambda message: True)
        await gossip_line(TOPIC, b, a)
        await b.publish(TOPIC, b"alive")
        assert (await a_messages.receive()).data == b"alive"
