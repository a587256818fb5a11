"""Five peers that gossip, stream and suffer faults: a run whose whole trace must follow from its seed."""

from __future__ import annotations

import hashlib
import sys

import trio

from protocol.errors import TransportError
from simnet import runtime
from simnet.links import LinkOptions
from simnet.network import NetworkOptions, open_network


async def story(seed: int) -> list[tuple[float, str, str, str, int]]:
    options = NetworkOptions(LinkOptions(delay_s=0.02, jitter_s=0.05, bytes_per_s=1e6))
    async with open_network(seed, options) as network, trio.open_nursery() as peers:
        ends = [await peers.start(member, network, bytes([i]) * 32) for i in range(5)]
        async with trio.open_nursery() as nursery:
            for i, end in enumerate(ends):
                nursery.start_soon(life, end, ends[(i + 1) % 5])
            await trio.sleep(0.5)
            network.freeze(ends[3].peer)
            await trio.sleep(1)
            network.thaw(ends[3].peer)
            network.crash(ends[4].peer)
        peers.cancel_scope.cancel()
        return network.trace


async def member(network, seed, task_status):
    async with network.join(seed) as end:
        end.handle("/echo", echo)
        await end.subscribe("topic", lambda message: True)
        task_status.started(end)
        await trio.sleep_forever()


async def echo(stream):
    while data := await stream.receive(4096):
        await stream.send(data)


async def life(end, other):
    for i in range(20):
        try:
            stream = await end.open(other.peer, other.addrs, "/echo")
            await stream.send(bytes(10_000))
            await stream.receive(100)
            await end.publish("topic", bytes([i]))
            await stream.aclose()
        except TransportError:
            await trio.sleep(0.1)


def trace_digest(seed: int) -> str:
    trace = runtime.run(lambda: story(seed), seed)
    return f"{len(trace)} {hashlib.sha256(repr(trace).encode()).hexdigest()}"


if __name__ == "__main__":
    print(trace_digest(int(sys.argv[1])))  # noqa: T201
