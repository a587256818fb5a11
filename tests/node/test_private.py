"""A private swarm on the virtual network: what a stranger gets, whichever end it is at. That members get everything is
what the conformance suite says."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import trio

from node.private import PROOF_S, PrivateDirectory, PrivateGossip, PrivateTransport
from protocol.channel import Channel
from protocol.errors import LocalProtocolError, TransportError
from protocol.limits import GOSSIP_BYTES_MAX
from protocol.membership import SEAL_BYTES, Side, SwarmKey
from protocol.messages import CONTROL, Ping
from simnet import runtime
from simnet.directory import VirtualDirectory
from simnet.links import LinkOptions
from simnet.network import NetworkOptions, open_network
from simnet.runtime import SeededEntropy
from tests.conformance.adapters import receive_exactly, seed_of, until

KEY, OTHER = SwarmKey(b"\1" * 32), SwarmKey(b"\2" * 32)
ECHO, ELSE = "/test/echo/1", "/test/else/1"
TOPIC = "/test/topic/1"
SECRET = b"what members say"


class Listener:
    """A member with two protocols, and what it saw."""

    def __init__(self, end):
        self.served, self.strangers = [], []
        self.transport = PrivateTransport(end, KEY, lambda peer, protocol: self.strangers.append((peer, protocol)))
        for protocol in (ECHO, ELSE):
            self.transport.handle(protocol, self.echo)
        self.peer, self.addrs = end.peer, end.addrs

    async def echo(self, stream):
        self.served.append(stream.remote)
        while data := await stream.receive(1 << 16):
            await stream.send(data)


def run(body):
    """`body(member, member's listener, stranger)`: three peers, the last one without the key."""
    done = []

    async def main():
        async with (
            open_network(1, NetworkOptions(LinkOptions(delay_s=0.05))) as network,
            network.join(seed_of("a")) as a,
            network.join(seed_of("b")) as b,
            network.join(seed_of("c")) as c,
        ):
            with trio.fail_after(1000):
                await body(a, Listener(b), c)
            done.append(True)

    runtime.run(main, seed=1)
    assert done


async def ended(stream):
    """The stream is reset, and nothing was said on it."""
    with pytest.raises(TransportError):
        await stream.receive(1)


def test_members_prove_themselves_in_one_round_trip():
    async def body(a, listener, _):
        await a.connect(f"{listener.addrs[0]}/p2p/{listener.peer}")
        connected = trio.current_time()
        stream = await PrivateTransport(a, KEY).open(listener.peer, listener.addrs, ECHO)
        took = trio.current_time() - connected
        assert 0.29 < took < 0.31  # two round trips to negotiate, one to prove: 100 ms each
        await stream.send(b"hello")
        assert await receive_exactly(stream, 5) == b"hello"
        assert listener.served == [a.peer]
        assert listener.strangers == []

    run(body)


@pytest.mark.parametrize("shown", ["nothing of it", "another swarm's", "zeros", "an end", "its own, sent back"])
def test_a_strangers_stream_is_reset_and_counted(shown):
    async def body(_, listener, c):
        stream = await c.open(listener.peer, listener.addrs, ECHO)
        said = {
            "nothing of it": b"hello, I would like an echo please",
            "another swarm's": OTHER.proof(c.peer, listener.peer, ECHO, Side.DIAL),
            "zeros": bytes(32),
            "an end": b"",
            "its own, sent back": KEY.proof(listener.peer, c.peer, ECHO, Side.DIAL),  # had the listener dialled
        }[shown]
        await stream.send(said)
        await stream.finish()
        await ended(stream)
        assert (listener.served, listener.strangers) == ([], [(c.peer, ECHO)])

    run(body)


def test_a_silent_stranger_is_reset_in_time_and_no_sooner():
    async def body(_, listener, c):
        stream = await c.open(listener.peer, listener.addrs, ECHO)
        await stream.send(KEY.proof(c.peer, listener.peer, ECHO, Side.DIAL)[:31])
        began = trio.current_time()
        await ended(stream)
        assert PROOF_S <= trio.current_time() - began < PROOF_S + 0.2
        assert (listener.served, listener.strangers) == ([], [(c.peer, ECHO)])

    run(body)


def test_a_members_proof_is_no_use_to_a_stranger_or_for_another_protocol():
    async def body(a, listener, c):
        overheard = KEY.proof(a.peer, listener.peer, ECHO, Side.DIAL)
        by_stranger = await c.open(listener.peer, listener.addrs, ECHO)
        await by_stranger.send(overheard)
        await ended(by_stranger)
        elsewhere = await a.open(listener.peer, listener.addrs, ELSE)
        await elsewhere.send(overheard)
        await ended(elsewhere)
        assert listener.served == []
        assert listener.strangers == [(c.peer, ECHO), (a.peer, ELSE)]

    run(body)


@pytest.mark.parametrize("answer", ["the proof sent back", "another swarm's", "nothing", "silence"])
def test_a_stranger_that_listens_is_found_out_by_the_dialler(answer):
    async def body(a, _, c):
        async def pretend(stream):
            proof = await receive_exactly(stream, 32)
            if answer == "silence":
                await trio.sleep(1000)
            replies = {"the proof sent back": proof, "nothing": b""}
            await stream.send(replies.get(answer, OTHER.proof(a.peer, c.peer, ECHO, Side.ACCEPT)))
            await stream.finish()

        c.handle(ECHO, pretend)
        with pytest.raises(TransportError, match="not a member"):
            await PrivateTransport(a, KEY).open(c.peer, c.addrs, ECHO)

    run(body)


def test_members_of_two_swarms_are_strangers():
    async def body(_, listener, c):
        with pytest.raises(TransportError):
            await PrivateTransport(c, OTHER).open(listener.peer, listener.addrs, ECHO)
        assert listener.strangers == [(c.peer, ECHO)]

    run(body)


def test_a_client_of_the_public_swarm_is_a_stranger_too():
    async def body(_, listener, c):
        listener.transport.handle(CONTROL, listener.echo)
        stream = await c.open(listener.peer, listener.addrs, CONTROL)
        with pytest.raises(TransportError):
            await Channel(stream, CONTROL).call(Ping(bytes(8)))
        assert (listener.served, listener.strangers) == ([], [(c.peer, CONTROL)])

    run(body)


def test_an_open_that_is_cancelled_leaves_no_stream():
    async def body(a, _, c):
        ends = []

        async def wait(stream):
            await receive_exactly(stream, 32)
            try:
                ends.append(await stream.receive(1))
            except TransportError:
                ends.append("reset")

        c.handle(ECHO, wait)
        with trio.move_on_after(1) as scope:
            await PrivateTransport(a, KEY).open(c.peer, c.addrs, ECHO)
        assert scope.cancelled_caught
        await until(lambda: bool(ends))

    run(body)


def test_gossip_is_sealed_and_a_strangers_words_go_no_further():
    """The stranger knows the topic's name (neighbours are told it) and sits between two members."""

    async def body(a, listener, c):
        b = listener.transport.inner
        gossip = {end: PrivateGossip(end, KEY, end.peer, SeededEntropy(1)) for end in (a, b)}
        heard, overheard = [], []

        def hear(message):
            heard.append(message.data)
            return True

        at_b = await gossip[b].subscribe(TOPIC, hear)
        await gossip[a].subscribe(TOPIC, lambda _: True)
        await c.subscribe(KEY.topic(TOPIC), lambda message: not overheard.append(message))
        await a.connect(f"{c.addrs[0]}/p2p/{c.peer}")
        await c.connect(f"{b.addrs[0]}/p2p/{b.peer}")
        await gossip[a].publish(TOPIC, SECRET)
        message = await at_b.receive()
        assert (message.data, message.author, message.received_from) == (SECRET, a.peer, c.peer)
        assert SECRET not in overheard[0].data
        await c.publish(KEY.topic(TOPIC), overheard[0].data)  # a member's words under its own name
        await c.publish(KEY.topic(TOPIC), b"nonsense")
        await gossip[a].publish(TOPIC, b"afterwards")
        assert (await at_b.receive()).data == b"afterwards"
        assert heard == [SECRET, b"afterwards"]

    run(body)


def test_what_would_not_fit_sealed_is_our_own_bug():
    async def body(a, _, __):
        gossip = PrivateGossip(a, KEY, a.peer, SeededEntropy(1))
        with pytest.raises(LocalProtocolError, match="fit sealed"):
            await gossip.publish(TOPIC, bytes(GOSSIP_BYTES_MAX - SEAL_BYTES + 1))

    run(body)


def test_provider_records_of_members_lie_where_strangers_do_not_look():
    async def body():
        directory, shard = VirtualDirectory(), b"\1" * 32
        holder, member, stranger = (directory.of(Dialler(name)) for name in "hms")
        await PrivateDirectory(holder, KEY).provide(shard)
        found = await PrivateDirectory(member, KEY).providers(shard)
        assert [provider.peer for provider in found] == ["h"]
        assert await stranger.providers(shard) == ()
        assert await PrivateDirectory(stranger, OTHER).providers(shard) == ()
        assert shard not in directory.records

    runtime.run(body, 1)


@dataclass
class Dialler:
    """As much of a transport as the directory asks for."""

    peer: str
    addrs: tuple[str, ...] = ("/ip4/192.0.2.1/tcp/1",)

    def connected(self):
        return ("somebody",)
