"""The adapters under one roof: `run_with` gives a test body N endpoints, on the virtual network, on libp2p's streams,
or on the data plane's direct connections, each also as members of a private swarm.

The body is the same for both. `World` adds what the ports do not have: an address where the wrong peer answers, waiting
until gossip has formed, ending a peer.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Protocol

import trio

from node.p2p.mesh import Mesh, MeshConfig, open_mesh
from node.private import PrivateGossip, PrivateTransport
from protocol.ids import PeerId
from protocol.membership import SwarmKey
from simnet import runtime
from simnet.endpoint import VirtualEndpoint
from simnet.links import LinkOptions
from simnet.network import NetworkOptions, open_network

Endpoint = Any  # Mesh, VirtualEndpoint, or Member of either
KEY = SwarmKey(b"\5" * 32)
GUARD_S = 20.0  # a hang fails the test instead of the run


class World(Protocol):
    name: str

    def join(self, name: str, listen: bool = True) -> Any:
        """A context manager that gives a new endpoint."""


@dataclass
class Virtual:
    network: Any
    name: str = "virtual"

    def join(self, name: str, listen: bool = True) -> Any:
        return self.network.join(seed_of(name), listen)


@dataclass
class Libp2p:
    name: str = "libp2p"
    direct: tuple[str, ...] = ()

    def join(self, name: str, listen: bool = True) -> Any:
        listening = MeshConfig(seed_of(name), direct=self.direct)
        return open_mesh(listening if listen else replace(listening, listen=()))


ECHO = "/test/echo/1"
RAW = "/test/raw/1"
UNKNOWN = "/test/nothing"


class Member:
    """An endpoint inside a private swarm: both ports in one object, as the adapters have them."""

    def __init__(self, inner: Mesh | VirtualEndpoint) -> None:
        self._inner = inner
        self._transport = PrivateTransport(inner, KEY)
        self._gossip = PrivateGossip(inner, KEY, inner.peer, os.urandom)
        self.handle, self.open = self._transport.handle, self._transport.open
        self.publish, self.subscribe = self._gossip.publish, self._gossip.subscribe

    def __getattr__(self, name: str) -> Any:
        """What the tests ask of the adapter itself: peer, addrs, connect, and its insides."""
        return getattr(self._inner, name)


@dataclass
class Private:
    world: World

    @property
    def name(self) -> str:
        return f"private {self.world.name}"

    @asynccontextmanager
    async def join(self, name: str, listen: bool = True) -> AsyncIterator[Member]:
        async with self.world.join(name, listen) as endpoint:
            yield Member(endpoint)


Body = Callable[..., Awaitable[None]]


def seed_of(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def run_with(adapter: str, body: Body, *names: str) -> None:
    """Run `body(world, *endpoints)`, one endpoint per name, none connected."""

    done = []

    async def guarded(world: World) -> None:
        world = Private(world) if adapter.startswith("private") else world
        async with AsyncExitStack() as stack:
            endpoints = [await stack.enter_async_context(world.join(name)) for name in names]
            with trio.fail_after(GUARD_S):
                await body(world, *endpoints)
            done.append(True)

    async def virtual() -> None:
        async with open_network(1, NetworkOptions(LinkOptions(delay_s=0.002))) as network:
            await guarded(Virtual(network))

    async def libp2p() -> None:
        await guarded(Libp2p() if adapter.endswith("libp2p") else Libp2p("direct", (ECHO, RAW, UNKNOWN)))

    if adapter.endswith("virtual"):
        runtime.run(virtual, seed=1)
    else:
        trio.run(libp2p)
    assert done, "the body was cut short"


def full_addr(endpoint: Endpoint) -> str:
    return f"{endpoint.addrs[0]}/p2p/{endpoint.peer}"


def peers_of(endpoint: Endpoint) -> tuple[PeerId, ...]:
    """Whom it has a connection with, of any kind."""
    inner = endpoint._inner if isinstance(endpoint, Member) else endpoint
    direct = [stream.remote for stream in inner._plane.streams] if isinstance(inner, Mesh) else []
    return tuple(sorted({*endpoint.connected(), *direct}))


def forwards(endpoint: Endpoint, topic: str, other: Endpoint) -> bool:
    """Does `endpoint` pass messages of `topic` on to `other`?"""
    if isinstance(endpoint, Member):
        return forwards(endpoint._inner, KEY.topic(topic), other)
    if isinstance(endpoint, Mesh):
        return other.peer in {peer.to_base58() for peer in endpoint._pubsub.router.mesh.get(topic, ())}
    return other.peer in endpoint.neighbours(topic)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what the network will do by itself; the run's guard bounds it."""
    while not condition():
        await trio.sleep(0.01)


async def gossip_line(topic: str, *endpoints: Endpoint) -> None:
    """Connect a - b - c - ... and wait until each forwards `topic` to its neighbours in the line."""
    for near, far in pairwise(endpoints):
        await near.connect(full_addr(far))
    for near, far in pairwise(endpoints):
        await until(lambda n=near, f=far: forwards(n, topic, f) and forwards(f, topic, n))


@asynccontextmanager
async def serving(endpoint: Endpoint, protocol: str) -> AsyncIterator[trio.MemoryReceiveChannel[Any]]:
    """Streams of `protocol` come out of a channel, and stay open until the block is left."""
    send, receive = trio.open_memory_channel[Any](100)
    done = trio.Event()

    async def keep(stream: Any) -> None:
        await send.send(stream)
        await done.wait()

    endpoint.handle(protocol, keep)
    try:
        yield receive
    finally:
        done.set()


class CancelAtStep(trio.abc.Instrument):
    """Cancels `scope` at the n-th step of any task: also those that work for the one that waits."""

    def __init__(self, scope: trio.CancelScope, n: int) -> None:
        self.scope, self.left = scope, n

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.left -= 1
        if self.left == 0:
            self.scope.cancel()


async def at_every_step(stride: int, operation: Callable[[], Awaitable[None]]) -> int:
    """Run `operation()` again and again, cancelled `stride` steps later each time, until it ends by itself."""
    for cancelled, n in enumerate(range(1, 100_000, stride)):
        with trio.CancelScope() as scope:
            instrument = CancelAtStep(scope, n)
            trio.lowlevel.add_instrument(instrument)
            try:
                await operation()
            finally:
                trio.lowlevel.remove_instrument(instrument)
        if not scope.cancelled_caught:
            return cancelled
    raise AssertionError("the operation never ends")


async def receive_exactly(stream: Any, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = await stream.receive(size - len(parts))
        if not part:
            raise EOFError(f"{len(parts)} of {size} bytes")
        parts += part
    return bytes(parts)


async def echo(stream: Any) -> None:
    while data := await stream.receive(1 << 20):
        await stream.send(data)
    await stream.finish()


def absent_peer() -> PeerId:
    from nacl.signing import SigningKey

    from protocol.ids import peer_id_of

    return peer_id_of(SigningKey(seed_of("nobody")).verify_key.encode())
