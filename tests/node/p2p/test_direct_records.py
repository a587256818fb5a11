"""The data plane once it is open: what a hostile peer may say, how a dead one is noticed, what is bounded."""

from __future__ import annotations

import random
import signal
import socket
import subprocess
import sys

import pytest
import trio

import node.p2p.direct_stream as direct_stream
from node.p2p.direct_stream import DirectStream
from node.p2p.records import RECEIVE_BYTES_MAX, RECORD_BYTES, RECORDS_PER_TURN, UNREAD_BYTES_MAX, Inbox, Kind, seal
from protocol.errors import TransportError
from protocol.ids import PeerId
from tests.conformance.adapters import ECHO, RAW, receive_exactly, serving, until
from tests.node.p2p.direct_peers import receive_until_error, rogue, run, send_raw, works

# Records


def tampered(stream):
    record = bytearray(seal(stream._cipher, Kind.DATA, b"x" * 50))
    record[20] ^= 1
    return bytes(record)


HOSTILE = {
    "no ciphertext": lambda s: b"\x00\x00",
    "too short": lambda s: b"\x00\x0fxxxxxxxxxxxxxxx",
    "largest": lambda s: b"\xff\xff" + b"x" * 65535,
    "tampered": tampered,
    "replayed": lambda s: 2 * seal(s._cipher, Kind.HEARTBEAT),
    "empty": lambda s: (r := s._cipher.encrypt_with_ad(None, b"")) and len(r).to_bytes(2, "big") + r,
    "unknown kind": lambda s: (r := s._cipher.encrypt_with_ad(None, b"\x06")) and len(r).to_bytes(2, "big") + r,
    "opened twice": lambda s: seal(s._cipher, Kind.OPEN, RAW.encode()),
    "accepts": lambda s: seal(s._cipher, Kind.ACCEPT),
    "no data": lambda s: seal(s._cipher, Kind.DATA),
    "FIN with data": lambda s: seal(s._cipher, Kind.FIN, b"x"),
    "FIN twice": lambda s: seal(s._cipher, Kind.FIN) + seal(s._cipher, Kind.FIN),
    "data after FIN": lambda s: seal(s._cipher, Kind.FIN) + seal(s._cipher, Kind.DATA, b"x"),
}


async def receive_on(stream):
    while True:
        await stream.receive(1 << 16)


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("receiving", [True, False])
def test_a_record_out_of_place_ends_its_connection_alone(name, receiving, monkeypatch):
    monkeypatch.setattr(direct_stream, "TICK_S", 0.1)

    async def body(a, b):
        good = await b.open(a.peer, a.addrs, ECHO)
        async with serving(a, RAW) as streams:
            hostile = await rogue(a)
            victim = await streams.receive()
            hostile._sock.send(HOSTILE[name](hostile))
            if not receiving:
                await until(lambda: not victim.is_open)
            with pytest.raises(TransportError):
                await receive_on(victim)
            assert victim._ended != "silent"
            hostile.discard()
        await good.send(b"still")
        assert await receive_exactly(good, 5) == b"still"

    run(body)


def test_data_and_end_in_one_write_are_both_read():
    async def body(a, b):
        async with serving(a, RAW) as streams:
            hostile = await rogue(a)
            victim = await streams.receive()
            words = [seal(hostile._cipher, Kind.DATA, b"last"), seal(hostile._cipher, Kind.FIN)]
            hostile._sock.send(b"".join(words)[:9])
            await trio.sleep(0.05)
            hostile._sock.send(b"".join(words)[9:])
            assert await receive_exactly(victim, 4) == b"last"
            assert await victim.receive(1) == b""
            await victim.send(b"answer")  # half closed only
            hostile.discard()

    run(body)


@pytest.mark.parametrize("before", [b"", b"partial"])
def test_an_end_without_a_word_is_an_error(before):
    async def body(a, b):
        async with serving(a, RAW) as streams:
            hostile = await rogue(a)
            victim = await streams.receive()
            record = seal(hostile._cipher, Kind.DATA, b"whole")
            hostile._sock.send(record + record[: len(before)])
            assert await receive_exactly(victim, 5) == b"whole"
            hostile._sock.close()
            with pytest.raises(TransportError):
                await victim.receive(1)
            with pytest.raises(TransportError):
                await victim.send(b"x")

    run(body)


def test_a_flood_of_empty_words_holds_up_no_other_task(monkeypatch):
    """Counted, not timed: between two turns of another task, one turn's worth of records and no more is decrypted."""
    taken = [0, 0]  # by the victim since the other task's last turn, and in all
    take = Inbox._take

    def counted(inbox, plain):
        taken[0] += 1
        taken[1] += 1
        take(inbox, plain)

    async def body(a, b):
        async with serving(a, RAW) as streams, trio.open_nursery() as nursery:
            hostile = await rogue(a)
            victim = await streams.receive()
            nursery.start_soon(receive_until_error, victim)
            words = b"".join(seal(hostile._cipher, Kind.HEARTBEAT) for _ in range(20_000))
            monkeypatch.setattr(Inbox, "_take", counted)
            nursery.start_soon(send_raw, hostile, words)
            most = 0
            while taken[1] < 20_000:
                taken[0] = 0
                await trio.lowlevel.checkpoint()
                most = max(most, taken[0])
            assert 0 < most <= 2 * RECORDS_PER_TURN  # one turn may stand before ours and one behind it
            await works(a, b)
            hostile.discard()

    run(body)


# Liveness and bounds


CHILD = """
import sys, trio
import node.p2p.direct_stream as direct_stream
from node.p2p.mesh import MeshConfig, open_mesh
direct_stream.TICK_S = 0.2
async def hold(stream):
    await stream.send(b"x")
    await trio.sleep_forever()
async def main():
    async with open_mesh(MeshConfig(b"k" * 32, direct=("/test/raw/1",))) as mesh:
        mesh.handle("/test/raw/1", hold)
        print(mesh.addrs[0], mesh.peer, flush=True)
        await trio.sleep_forever()
trio.run(main)
"""


async def receiving(stream):
    await stream.receive(1)


async def sending(stream):
    while True:
        await stream.send(b"x" * 100_000)


async def doing_nothing(stream):
    await until(lambda: not stream.is_open)
    await stream.send(b"x")


@pytest.mark.parametrize(
    ("how", "meanwhile"),
    [
        (signal.SIGKILL, receiving),
        (signal.SIGSTOP, receiving),
        (signal.SIGSTOP, sending),
        (signal.SIGSTOP, doing_nothing),
    ],
)
def test_a_dead_or_frozen_process_ends_its_streams(how, meanwhile, monkeypatch):
    monkeypatch.setattr(direct_stream, "TICK_S", 0.2)  # a frozen peer is noticed after 6 to 7 of these

    with subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True) as child:
        addr, peer = child.stdout.readline().split()

        async def body(a, b):
            stream = await a.open(PeerId(peer), [addr], RAW)
            assert isinstance(stream, DirectStream)
            assert await stream.receive(1) == b"x"
            await trio.sleep(1.6)  # silent, but alive
            assert stream.is_open
            child.send_signal(how)
            with trio.fail_after(3), pytest.raises(TransportError):
                await meanwhile(stream)
            assert not stream.is_open

        try:
            run(body)
        finally:
            child.kill()


def test_what_nobody_receives_is_bounded_and_nobody_is_called_silent_for_it(monkeypatch):
    monkeypatch.setattr(direct_stream, "TICK_S", 0.02)
    data = random.Random(1).randbytes(3 << 20)

    async def body(a, b):
        async with serving(b, RAW) as streams, trio.open_nursery() as nursery:
            near = await a.open(b.peer, b.addrs, RAW)
            far = await streams.receive()
            nursery.start_soon(near.send, data)
            await trio.sleep(0.5)  # 25 ticks
            assert 0 < far._inbox.unread_bytes <= UNREAD_BYTES_MAX + RECEIVE_BYTES_MAX
            assert len(far._inbox._buffer) <= RECEIVE_BYTES_MAX
            assert await receive_exactly(far, len(data)) == data

    run(body)


def test_tiny_records_that_nobody_receives_are_bounded(monkeypatch):
    monkeypatch.setattr(direct_stream, "TICK_S", 0.02)

    async def body(a, b):
        async with serving(a, RAW) as streams, trio.open_nursery() as nursery:
            hostile = await rogue(a)
            victim = await streams.receive()
            words = b"".join(seal(hostile._cipher, Kind.DATA, b"x") for _ in range(20_000))
            nursery.start_soon(send_raw, hostile, words)
            await until(lambda: not victim._inbox.has_room)
            await trio.sleep(0.2)
            assert len(victim._inbox._unread) < 7000
            nursery.cancel_scope.cancel()
            hostile.discard()

    run(body)


def test_a_peer_that_never_lets_go_is_left_after_the_deadline(monkeypatch):
    monkeypatch.setattr(direct_stream, "LINGER_S", 0.2)

    async def body(a, b):
        async with serving(a, RAW) as streams:
            hostile = await rogue(a)
            victim = await streams.receive()
            await victim.aclose()
            assert victim.is_open
            await until(lambda: not victim.is_open)
            hostile.discard()

    run(body)


def test_after_a_send_that_was_cut_short_nothing_more_is_said(monkeypatch):
    monkeypatch.setattr(direct_stream, "TICK_S", 0.02)

    async def body(a, b):
        async with serving(b, RAW) as streams:
            near = await a.open(b.peer, b.addrs, RAW)
            far = await streams.receive()
            with trio.move_on_after(0.1):
                await near.send(b"x" * (32 << 20))
            await trio.sleep(0.1)  # 5 ticks
            assert not near._words
            with pytest.raises(TransportError):
                await near.send(b"x")
            await near.aclose()
            with pytest.raises(TransportError):
                await receive_on(far)

    run(body)


def test_the_end_reaches_a_reader_that_was_slow():
    """FIN waits for room without a task of the application's."""

    async def body(a, b):
        async with serving(b, RAW) as streams, trio.open_nursery() as nursery:
            near = await a.open(b.peer, b.addrs, RAW)
            far = await streams.receive()

            async def say_and_go():
                await near.send(bytes(2 << 20))
                await near.aclose()

            nursery.start_soon(say_and_go)
            await trio.sleep(0.3)
            assert await receive_exactly(far, 2 << 20) == bytes(2 << 20)
            assert await far.receive(1) == b""
        await until(lambda: not near.is_open)

    run(body)


def test_the_last_words_to_a_slow_peer_that_still_sends_are_not_taken_back():
    words = bytes(range(256)) * 240  # more than the peer's kernel takes, less than ours keeps for it

    async def body(a, b):
        async with serving(a, RAW) as streams:
            slow = await rogue(a)
            slow._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 10)
            victim = await streams.receive()
            slow._sock.send(seal(slow._cipher, Kind.DATA, b"x" * 1000))
            await victim.send(words)
            await victim.aclose()
            await trio.sleep(0.1)
            assert await receive_exactly(slow, len(words)) == words
            assert await slow.receive(1) == b""
            slow.discard()

    run(body)


# What is sent at once


def test_small_messages_leave_at_once_and_in_order():
    async def body(a, b):
        async with serving(a, RAW) as streams:
            stream = await b.open(a.peer, a.addrs, RAW)
            victim = await streams.receive()
            assert stream.send_at_once(b"one ")
            await stream.send(b"two ")
            assert stream.send_at_once(b"three")
            assert await receive_exactly(victim, 13) == b"one two three"
            assert not stream.send_at_once(b"")
            assert not stream.send_at_once(bytes(RECORD_BYTES + 1))
            await stream.finish()
            assert not stream.send_at_once(b"late")
            assert await victim.receive(1) == b""
            await stream.aclose()

    run(body)


@pytest.mark.parametrize("then", ["nothing", "send", "aclose"])
def test_what_the_socket_does_not_take_at_once_follows(then):
    """The rest of a cut record goes out by itself, before what is sent next, and before the end."""

    async def body(a, b):
        async with serving(a, RAW) as streams:
            stream = await b.open(a.peer, a.addrs, RAW)
            victim = await streams.receive()
            stream._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            messages = [bytes([index % 251]) * 60_000 for index in range(400)]
            expected = bytearray()
            for message in messages:
                if not stream.send_at_once(message):
                    break
                expected += message
            assert stream._words
            assert 0 < len(expected) < 400 * 60_000
            async with trio.open_nursery() as nursery:
                if then == "send":
                    nursery.start_soon(stream.send, b"next")
                    expected += b"next"
                elif then == "aclose":
                    await stream.aclose()
                with trio.fail_after(0.9):  # no tick has to pass
                    assert await receive_exactly(victim, len(expected)) == expected
            if then == "aclose":
                assert await victim.receive(1) == b""
            else:
                await until(lambda: not stream._words)
                assert stream.send_at_once(b"again")
                assert await receive_exactly(victim, 5) == b"again"
                await stream.aclose()

    run(body)


def test_nothing_goes_between_the_parts_of_what_another_task_sends():
    async def body(a, b):
        async with serving(a, RAW) as streams, trio.open_nursery() as nursery:
            stream = await b.open(a.peer, a.addrs, RAW)
            victim = await streams.receive()
            nursery.start_soon(stream.send, bytes(16 << 20))
            await trio.sleep(0.05)
            assert not stream.send_at_once(b"x")
            assert await receive_exactly(victim, 16 << 20) == bytes(16 << 20)

    run(body)
