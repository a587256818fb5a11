"""What the virtual network adds to the ports: faults, time, and the same trace for the same seed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import trio

from protocol.errors import TransportError
from simnet import runtime
from simnet.links import LinkOptions
from simnet.network import NetworkOptions, open_network

ECHO = "/echo"


async def echo(stream):
    while data := await stream.receive(1 << 16):
        await stream.send(data)
    await stream.finish()


async def hold(stream):
    await trio.sleep_forever()


def run(body, options=None, count=2):
    """`body(network, *endpoints)`: each peer in a task of its own, so that it can crash alone."""
    done = []

    async def main():
        async with open_network(3, options) as network, trio.open_nursery() as nursery:
            ends = [await nursery.start(member, network, bytes([i]) * 32) for i in range(count)]
            with trio.fail_after(1000):
                await body(network, *ends)
            done.append(True)
            nursery.cancel_scope.cancel()

    runtime.run(main, seed=3)
    assert done


async def member(network, seed, task_status):
    async with network.join(seed) as end:
        end.handle(ECHO, echo)
        end.handle("/hold", hold)
        task_status.started(end)
        await trio.sleep_forever()


def digest_elsewhere(seed, hash_seed):
    return subprocess.run(
        [sys.executable, "-m", "tests.simnet.network_story", str(seed)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": "."},
    ).stdout.strip()


def test_the_same_seed_gives_the_same_trace_in_two_processes():
    first = digest_elsewhere(11, "1")
    assert int(first.split()[0]) > 100
    assert first == digest_elsewhere(11, "2")
    assert first != digest_elsewhere(12, "1")


def test_delay_and_bandwidth_take_their_time():
    async def body(network, a, b):
        stream = await a.open(b.peer, b.addrs, ECHO)
        start = trio.current_time()
        await stream.send(b"x")
        await stream.receive(1)
        assert trio.current_time() - start == pytest.approx(0.2, rel=0.01)
        start = trio.current_time()
        await stream.send(b"x" * 100_000)
        got = 0
        while got < 100_000:
            got += len(await stream.receive(100_000))
        assert trio.current_time() - start > 2 * 0.1  # there and back at 1 MB/s, beside the delay

    run(body, NetworkOptions(LinkOptions(delay_s=0.1, bytes_per_s=1e6)))


def test_a_link_of_its_own():
    async def body(network, a, b):
        network.options.links[(a.peer, b.peer)] = LinkOptions(delay_s=0.5)
        stream = await a.open(b.peer, b.addrs, ECHO)
        start = trio.current_time()
        await stream.send(b"x")
        await stream.receive(1)
        assert trio.current_time() - start == pytest.approx(0.52, rel=0.01)

    run(body)


def test_a_crash_is_seen_at_once():
    async def body(network, a, b):
        stream = await a.open(b.peer, b.addrs, "/hold")
        addrs = b.addrs
        network.crash(b.peer)
        with trio.fail_after(0.1), pytest.raises(TransportError):
            await stream.receive(1)
        assert a.connected() == ()
        with pytest.raises(TransportError):
            await a.open(b.peer, addrs, ECHO)
        with pytest.raises(TransportError):
            await b.open(a.peer, a.addrs, ECHO)

    run(body)


def test_a_frozen_peer_is_seen_after_the_detection_time_only():
    async def body(network, a, b):
        stream = await a.open(b.peer, b.addrs, "/hold")
        network.freeze(b.peer)
        start = trio.current_time()
        with pytest.raises(TransportError):
            await stream.receive(1)
        assert trio.current_time() - start == pytest.approx(6)
        with pytest.raises(TransportError):
            await a.open(b.peer, b.addrs, ECHO)
        assert trio.current_time() - start == pytest.approx(11)  # a dial waits for its own limit
        network.thaw(b.peer)
        await (await a.open(b.peer, b.addrs, ECHO)).aclose()

    run(body)


def test_a_short_partition_delays_and_loses_nothing():
    async def body(network, a, b):
        stream = await a.open(b.peer, b.addrs, ECHO)
        network.partition([a.peer], [b.peer])
        await stream.send(b"late")
        with trio.move_on_after(3) as scope:
            await stream.receive(4)
        assert scope.cancelled_caught
        network.heal(a.peer, b.peer)
        network.heal(b.peer, a.peer)
        assert await stream.receive(4) == b"late"
        assert a.connected() == (b.peer,)

    run(body)


def test_an_asymmetric_partition_ends_the_connection_too():
    async def body(network, a, b):
        stream = await a.open(b.peer, b.addrs, ECHO)
        network.block(b.peer, a.peer)
        await stream.send(b"heard")
        with trio.fail_after(6.1), pytest.raises(TransportError):
            await stream.receive(1)

    run(body)


def test_refused_dials():
    async def body(network, a, b):
        network.refuse_dials(b.peer)
        with pytest.raises(TransportError, match="refused"):
            await a.open(b.peer, b.addrs, ECHO)
        network.refuse_dials(b.peer, False)
        await (await a.open(b.peer, b.addrs, ECHO)).aclose()

    run(body)


def test_a_crash_ends_the_tasks_of_its_handlers_and_its_block():
    async def main():
        ended = []

        async def note(stream):
            try:
                await trio.sleep_forever()
            finally:
                ended.append(stream.remote)

        async with open_network(1) as network, network.join(b"a" * 32) as a:
            async with network.join(b"b" * 32) as b:
                b.handle(ECHO, note)
                await a.open(b.peer, b.addrs, ECHO)
                network.crash(b.peer)
                await trio.sleep_forever()  # the body of a crashed peer is its process: it ends
            assert ended == [a.peer]

    runtime.run(main, seed=1)


def test_gossip_does_not_cross_a_partition_that_outlasts_the_connection():
    async def body(network, a, b):
        await a.subscribe("t", lambda message: True)
        messages = await b.subscribe("t", lambda message: True)
        await a.connect(f"{b.addrs[0]}/p2p/{b.peer}")
        network.partition([a.peer], [b.peer])
        await a.publish("t", b"lost")
        await trio.sleep(10)
        network.thaw(b.peer)
        await a.connect(f"{b.addrs[0]}/p2p/{b.peer}")
        await a.publish("t", b"new")
        assert (await messages.receive()).data == b"new"

    run(body)
