"""What every Gossip promises, on both adapters."""

from __future__ import annotations

import pytest
import trio

from node.p2p.allowance import Shared
from node.p2p.gossip import RECEIVED_BURST, RECEIVED_PER_S
from protocol.errors import LocalProtocolError
from protocol.limits import GOSSIP_BYTES_MAX
from protocol.membership import SEAL_BYTES
from tests.conformance.adapters import forwards, full_addr, gossip_line, run_with, until

TOPIC = "/test/topic/1"


def accept(message):
    return True


def largest(adapter):
    return GOSSIP_BYTES_MAX - (SEAL_BYTES if adapter.startswith("private") else 0)


def test_a_line_delivers_once_and_names_neighbour_and_author(adapter):
    async def body(world, a, b, c):
        calls = []

        def count(message):
            calls.append(message.data)
            return True

        subscriptions = [
            await end.subscribe(TOPIC, validator) for end, validator in ((a, accept), (b, accept), (c, count))
        ]
        await gossip_line(TOPIC, a, b, c)
        for i in range(5):
            await a.publish(TOPIC, bytes([i]))
        at_b = [await subscriptions[1].receive() for _ in range(5)]
        at_c = [await subscriptions[2].receive() for _ in range(5)]
        assert sorted(message.data for message in at_c) == [bytes([i]) for i in range(5)]
        assert {message.received_from for message in at_b} == {message.author for message in at_b} == {a.peer}
        assert {message.received_from for message in at_c} == {b.peer}
        assert {message.author for message in at_c} == {a.peer}
        assert sorted(calls) == [bytes([i]) for i in range(5)]
        await nothing_more(*subscriptions)

    run_with(adapter, body, "a", "b", "c")


def test_own_messages_are_not_delivered_also_not_through_a_ring(adapter):
    async def body(world, a, b, c):
        subscriptions = [await end.subscribe(TOPIC, accept) for end in (a, b, c)]
        await gossip_line(TOPIC, a, b, c, a)
        await a.publish(TOPIC, b"x")
        assert (await subscriptions[1].receive()).data == b"x"
        assert (await subscriptions[2].receive()).data == b"x"
        await nothing_more(*subscriptions)

    run_with(adapter, body, "a", "b", "c")


@pytest.mark.parametrize("verdict", ["false", "raises"])
def test_what_a_validator_refuses_goes_no_further(adapter, verdict):
    async def body(world, a, b, c):
        calls = []

        def refuse(message):
            if message.data != b"bad":
                return True
            calls.append(message.received_from)
            if verdict == "raises":
                raise ValueError("a bug in the validator")
            return False

        await a.subscribe(TOPIC, accept)
        at_b = await b.subscribe(TOPIC, refuse)
        at_c = await c.subscribe(TOPIC, accept)
        await gossip_line(TOPIC, a, b, c)
        await a.publish(TOPIC, b"bad")
        await until(lambda: bool(calls))
        await a.publish(TOPIC, b"good")
        assert (await at_b.receive()).data == b"good"
        assert (await at_c.receive()).data == b"good"
        assert calls == [a.peer]
        await nothing_more(at_b, at_c)

    run_with(adapter, body, "a", "b", "c")


def test_publishing_is_bounded_and_needs_no_peers(adapter):
    async def body(world, a):
        await a.publish(TOPIC, b"to nobody")
        await a.subscribe(TOPIC, accept)
        await a.publish(TOPIC, b"x" * largest(adapter))
        with pytest.raises(LocalProtocolError):
            await a.publish(TOPIC, b"x" * (largest(adapter) + 1))
        with pytest.raises(LocalProtocolError):
            await a.subscribe(TOPIC, accept)

    run_with(adapter, body, "a")


def test_the_largest_message_arrives(adapter):
    async def body(world, a, b):
        await a.subscribe(TOPIC, accept)
        subscription = await b.subscribe(TOPIC, accept)
        await gossip_line(TOPIC, a, b)
        await a.publish(TOPIC, b"x" * largest(adapter))
        assert (await subscription.receive()).data == b"x" * largest(adapter)

    run_with(adapter, body, "a", "b")


def test_a_late_subscriber_gets_what_is_new(adapter):
    async def body(world, a, b):
        await a.subscribe(TOPIC, accept)
        await a.connect(full_addr(b))
        await a.publish(TOPIC, b"before")
        subscription = await b.subscribe(TOPIC, accept)
        await until(lambda: forwards(a, TOPIC, b) and forwards(b, TOPIC, a))
        await a.publish(TOPIC, b"after")
        message = await subscription.receive()
        while message.data != b"after":  # a recent message may come along: that is allowed, once
            assert message.data == b"before"
            message = await subscription.receive()

    run_with(adapter, body, "a", "b")


def test_an_author_that_restarts_is_heard_again(adapter):
    async def body(world, a):
        messages = await a.subscribe(TOPIC, accept)
        for run in range(2):
            async with world.join("b") as b:
                await b.subscribe(TOPIC, accept)
                await gossip_line(TOPIC, b, a)
                for i in range(3):
                    await b.publish(TOPIC, bytes([run, i]))
                got = sorted([(await messages.receive()).data for _ in range(3)])
                assert got == [bytes([run, i]) for i in range(3)]
            await until(lambda: a.connected() == ())

    run_with(adapter, body, "a")


def test_a_reader_that_lags_loses_the_oldest(adapter):
    async def body(world, a, b):
        await a.subscribe(TOPIC, accept)
        seen = []

        def count(message):
            seen.append(message.data)
            return True

        subscription = await b.subscribe(TOPIC, count)
        await gossip_line(TOPIC, a, b)
        # More than the queue holds, in bursts that one neighbour's queue holds.
        for start in range(0, 300, 25):
            for i in range(start, start + 25):
                await a.publish(TOPIC, i.to_bytes(2, "big"))
            if adapter.endswith("libp2p"):
                refill(b)
            await until(lambda s=start: len(seen) == s + 25)
        messages = [await subscription.receive() for _ in range(256)]
        assert [message.data for message in messages] == seen[-256:]

    run_with(adapter, body, "a", "b")


def refill(mesh):
    mesh._pubsub._forwarding.clear()
    mesh._pubsub._received = Shared(RECEIVED_PER_S, RECEIVED_BURST, trio.current_time())


async def nothing_more(*subscriptions):
    """No further message is waiting, or comes while the network settles."""
    for subscription in subscriptions:
        with trio.move_on_after(0.1) as scope:
            raise AssertionError(await subscription.receive())
        assert scope.cancelled_caught
