"""A node that nobody can dial, the relay where it reserved, and one that knows only the circuit."""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from node.p2p.mesh import MeshConfig, open_mesh
from node.p2p.relay import Relay
from tests.conformance.adapters import ECHO, echo, full_addr, seed_of
from tests.node.p2p.meshes import guarded


@dataclass
class World:
    """`hidden` listens nowhere and reserved at `middle`; `near` knows only the circuit."""

    middle: Any
    relay: Relay
    hidden: Any
    near: Any
    circuits: tuple[str, ...]
    stack: AsyncExitStack

    async def stranger(self, name):
        return await self.stack.enter_async_context(open_mesh(MeshConfig(seed_of(name), ())))


@asynccontextmanager
async def world():
    async with AsyncExitStack() as stack:
        middle = await stack.enter_async_context(open_mesh(MeshConfig(seed_of("middle"))))
        hidden, near = [
            await stack.enter_async_context(open_mesh(MeshConfig(seed_of(name), ()))) for name in ("hidden", "near")
        ]
        relay = Relay(middle, middle.host)
        relay.serve()
        hidden.circuits.serve()
        hidden.handle(ECHO, echo)
        await hidden.connect(full_addr(middle))
        reservation = await hidden.circuits.reserve(middle.peer, ())
        yield World(middle, relay, hidden, near, reservation.circuits, stack)


def run(body):
    guarded(body, world())
