"""The muxer alone, over memory: in virtual time, so that hours without credit cost nothing."""

from __future__ import annotations

import random
from contextlib import suppress

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st
from libp2p.stream_muxer.exceptions import MuxedConnUnavailable, MuxedStreamEOF, MuxedStreamReset

import node.p2p.yamux as yamux
from node.p2p.yamux import Yamux
from node.p2p.yamux_limits import Memory, Toll
from node.p2p.yamux_stream import FIRST_WINDOW_BYTES
from node.p2p.yamux_wire import Flag, Frame, Kind, Parser, Violation
from simnet import runtime

HOUR_S = 3600.0


class Secured:
    """One end of an encrypted connection, as the muxer sees it: records in, records out."""

    def __init__(self, is_initiator, send, receive):
        self.is_initiator = is_initiator
        self._send, self._receive = send, receive

    async def write(self, data):
        half = len(data) // 2  # a cancellation between the halves tears a frame
        await self._send.send(data[:half])
        await self._send.send(data[half:])

    async def read(self, n=None):
        try:
            while not (data := await self._receive.receive()):
                pass
            return data
        except (trio.EndOfChannel, trio.ClosedResourceError):
            return b""

    async def close(self):
        self._send.close()
        self._receive.close()


def secured_pair(records=4):
    forth, back = trio.open_memory_channel(records), trio.open_memory_channel(records)
    return Secured(True, forth[0], back[1]), Secured(False, back[0], forth[1])


def run(body):
    """`body(near, far)` on two connected muxers."""

    async def main():
        left, right = secured_pair()
        near, far = Yamux(left, "far", Memory()), Yamux(right, "near", Memory())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(near.start)
            nursery.start_soon(far.start)
            await body(near, far)
            await near.close()
            await far.close()

    runtime.run(main, seed=2)


def run_raw(body):
    """`body(muxer, peer)` where the peer's side is bare records."""

    async def main():
        left, right = secured_pair(records=10_000)
        muxer = Yamux(left, "peer", Memory())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(muxer.start)
            await body(muxer, right)
            await muxer.close()

    runtime.run(main, seed=2)


async def stream_pair(near, far):
    stream = await near.open_stream()
    return stream, await far.accept_stream()


async def read_all(stream):
    data = bytearray()
    while True:
        try:
            data += await stream.read(100_000)
        except MuxedStreamEOF:
            return bytes(data)


def test_a_reader_that_pauses_for_an_hour_costs_nothing_but_time():
    async def body(near, far):
        here, there = await stream_pair(near, far)
        data = random.Random(1).randbytes(3 << 20)

        async def write():
            await here.write(data)
            here.finish()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            await trio.sleep(HOUR_S)
            assert len(there._unread) == FIRST_WINDOW_BYTES
            assert await read_all(there) == data

    run(body)


def test_other_streams_pass_one_that_is_full():
    async def body(near, far):
        full, _ = await stream_pair(near, far)
        free, there = await stream_pair(near, far)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(full.write, b"x" * (1 << 20))
            await trio.sleep(1)
            await free.write(b"through")
            assert await there.read() == b"through"
            nursery.cancel_scope.cancel()

    run(body)


def test_windows_grow_while_read_and_stay_within_the_connection(monkeypatch):
    monkeypatch.setattr(yamux, "CONNECTION_WINDOW_BYTES", 3 << 20)

    async def body(near, far):
        pairs = [await stream_pair(near, far) for _ in range(4)]

        async def pump(here, there):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(here.write, b"x" * (8 << 20))
                for _ in range(8 << 4):
                    got = 0
                    while got < 65536:
                        got += len(await there.read(65536 - got))

        async with trio.open_nursery() as nursery:
            for pair in pairs:
                nursery.start_soon(pump, *pair)
        windows = [there.window for _, there in pairs]
        assert sum(windows) == far._windows <= 3 << 20
        assert max(windows) > FIRST_WINDOW_BYTES
        for here, there in pairs:
            here.abandon()
            there.abandon()
        assert far._windows == 0

    run(body)


def test_a_cancelled_write_tears_no_frame():
    async def body(near, far):
        rng = random.Random(4)
        for _ in range(50):
            here, there = await stream_pair(near, far)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(here.write, b"y" * (1 << 20))
                for _ in range(rng.randrange(40)):
                    await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
            here.abort()
            with pytest.raises(MuxedStreamReset):
                await _read_only(there, b"y")
        here, there = await stream_pair(near, far)
        await here.write(b"intact")
        assert await there.read() == b"intact"

    run(body)


async def _read_only(stream, byte):
    while True:
        assert set(await stream.read(4096)) == set(byte)


def test_resetting_wakes_both_sides_and_forgets_the_stream():
    async def body(near, far):
        here, there = await stream_pair(near, far)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_expect, there.read, MuxedStreamReset)
            nursery.start_soon(_expect, lambda: there.write(b"x" * (1 << 20)), MuxedStreamReset)
            await trio.testing.wait_all_tasks_blocked()
            here.abort()
        with pytest.raises(MuxedStreamReset):
            await here.read()
        assert not near._streams
        assert not far._streams

    run(body)


async def _expect(action, error):
    with pytest.raises(error):
        await action()


def test_finished_on_both_sides_is_forgotten_and_still_readable():
    async def body(near, far):
        here, there = await stream_pair(near, far)
        await here.write(b"to there")
        await there.write(b"to here")
        here.finish()
        there.finish()
        await trio.sleep(1)
        assert not near._streams
        assert not far._streams
        assert await read_all(here) == b"to here"
        assert await read_all(there) == b"to there"

    run(body)


def test_a_silent_peer_is_dropped_within_six_seconds_and_a_live_one_is_kept():
    async def silent(muxer, peer):
        stream = await muxer.open_stream()
        with trio.fail_after(6.01), pytest.raises(MuxedStreamReset):
            await stream.read()
        assert muxer.is_closed
        with pytest.raises(MuxedConnUnavailable):
            await muxer.open_stream()
        with pytest.raises(MuxedConnUnavailable):
            await muxer.accept_stream()

    async def idle(near, far):
        await trio.sleep(HOUR_S)
        assert near.is_established
        assert far.is_established

    run_raw(silent)
    run(idle)


def frame(kind, flags, stream_id, length, body=b""):
    return Frame(kind, flags, stream_id, length).header() + body


SYN, NONE, FIN = Flag.SYN, Flag.NONE, Flag.FIN


@pytest.mark.parametrize(
    "records",
    [
        [b"\x01" + bytes(11)],  # another version
        [b"\x00\x07" + bytes(10)],  # an unknown type
        [frame(Kind.DATA, NONE, 0, 0)],  # data on the session
        [frame(Kind.PING, SYN, 2, 0)],  # a ping on a stream
        [frame(Kind.WINDOW, SYN, 1, 0)],  # a number of ours
        [frame(Kind.WINDOW, SYN, 2, 0), frame(Kind.WINDOW, SYN, 2, 0)],  # opened twice
        [frame(Kind.WINDOW, SYN, 2, 0), frame(Kind.DATA, NONE, 2, FIRST_WINDOW_BYTES + 1)],  # beyond the window
        [frame(Kind.DATA, SYN, 2, FIRST_WINDOW_BYTES, b"x" * FIRST_WINDOW_BYTES), frame(Kind.DATA, NONE, 2, 1, b"x")],
        [frame(Kind.DATA, NONE, 9, (16 << 20) + 1)],  # nothing is that long
        [frame(Kind.DATA, SYN | FIN, 2, 0), frame(Kind.DATA, NONE, 2, 1, b"x")],  # data after the end
    ],
)
def test_a_violation_ends_the_connection_and_nothing_else(records):
    async def body(muxer, peer):
        for record in records:
            await peer.write(record)
        await trio.sleep(0.1)
        assert muxer.is_closed

    run_raw(body)


def test_a_peer_that_never_reads_our_answers_is_dropped(monkeypatch):
    monkeypatch.setattr(yamux, "CONTROL_FRAMES_MAX", 100)

    async def main():
        left, right = secured_pair(records=1)
        muxer = Yamux(left, "peer", Memory())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(muxer.start)
            for i in range(2000):
                if muxer.is_closed:
                    break
                with trio.move_on_after(0.01), suppress(trio.BrokenResourceError):
                    await right.write(frame(Kind.PING, SYN, 0, i))
            assert muxer.is_closed
            assert not muxer._control

    runtime.run(main, seed=2)


def test_a_peer_opens_a_bounded_number_of_streams():
    async def body(muxer, peer):
        for i in range(yamux.INBOUND_STREAMS_MAX + 10):
            await peer.write(frame(Kind.WINDOW, SYN, 2 * i + 2, 0))
        await trio.sleep(0.1)
        assert len(muxer._streams) == yamux.INBOUND_STREAMS_MAX
        assert muxer.is_established

    run_raw(body)


class Recorder:
    def __init__(self):
        self.events = []

    def on_frame(self, frame):
        self.events.append(frame)

    def on_body(self, frame, part):
        if self.events and isinstance(self.events[-1], bytes):
            self.events[-1] += bytes(part)
        else:
            self.events.append(bytes(part))

    def on_body_end(self, frame):
        self.events.append("end")


def parse(pieces):
    recorder = Recorder()
    parser = Parser(recorder)
    try:
        for piece in pieces:
            parser.feed(piece)
    except Violation:
        recorder.events.append("violation")
    return recorder.events


well_formed = st.lists(
    st.one_of(
        st.builds(
            lambda i, body: frame(Kind.DATA, NONE, i, len(body), body), st.integers(1, 9), st.binary(max_size=40)
        ),
        st.builds(lambda i, n: frame(Kind.WINDOW, SYN, i, n), st.integers(1, 9), st.integers(0, 1 << 20)),
        st.builds(lambda n: frame(Kind.PING, SYN, 0, n), st.integers(0, (1 << 32) - 1)),
    ),
    max_size=6,
).map(b"".join)


@given(st.one_of(well_formed, st.binary(max_size=60), st.builds(bytes.__add__, well_formed, st.binary(max_size=20))))
def test_any_slicing_parses_alike_and_any_bytes_parse_or_violate(data):
    assert parse([data]) == parse([data[i : i + 1] for i in range(len(data))])


def frames(*kinds):
    return b"".join(Frame(*kind).header() for kind in kinds)


@pytest.mark.parametrize(
    "flood",
    [
        [(Kind.WINDOW, Flag.NONE, 99, 1)] * 5000,
        [(Kind.PING, Flag.SYN, 0, 7)] * 5000,
        [(Kind.DATA, Flag.NONE, 99, 0)] * 5000,
        [(Kind.WINDOW, flag, 2, 0) for _ in range(50) for flag in (Flag.SYN, Flag.RST)],
    ],
    ids=["window", "ping", "empty", "open and reset"],
)
def test_a_flood_of_headers_is_read_slowly(flood):
    async def body(muxer, peer):
        async def drain():
            while await peer.read():
                pass

        async with trio.open_nursery() as nursery:
            nursery.start_soon(drain)
            record = frames(*flood)
            for _ in range(100):
                await peer._send.send(record)
            await trio.sleep(1)
            left = peer._send.statistics().current_buffer_used
            assert 70 < left < 99  # the burst and one second's worth were read
            assert not muxer.is_closed
            nursery.cancel_scope.cancel()

    run_raw(body)


def test_a_flood_of_streams_closes_the_connection():
    async def body(muxer, peer):
        for start in range(0, 1000, 200):
            await peer._send.send(frames(*((Kind.WINDOW, Flag.SYN, 2 * (start + i) + 2, 0) for i in range(200))))
            await peer._send.send(frames(*((Kind.WINDOW, Flag.RST, 2 * (start + i) + 2, 0) for i in range(200))))
        await peer._send.send(frames(*((Kind.WINDOW, Flag.SYN, i, 0) for i in range(4002, 10002, 2))))
        await trio.sleep(10)
        assert muxer.is_closed

    run_raw(body)


def test_large_frames_pay_for_themselves():
    toll = Toll()
    assert toll.wait_s(0.0) == 0
    muxed = bytearray()

    async def body(near, far):
        here, there = await stream_pair(near, far)

        async def write():
            await here.write(bytes(64 << 20))
            here.finish()

        before = far._toll._left
        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            muxed.extend(await read_all(there))
        assert before - far._toll._left < 100

    run(body)
    assert len(muxed) == 64 << 20


def test_of_all_connections_the_idlest_hog_goes(monkeypatch):
    monkeypatch.setattr("node.p2p.yamux_limits.UNREAD_BYTES_MAX", 1_000_000)

    async def main():
        memory, ends = Memory(), []
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                left, right = secured_pair()
                ends.append((Yamux(left, "near", Memory()), Yamux(right, "far", memory)))
                for end in ends[-1]:
                    nursery.start_soon(end.start)
            honest, *hogs = ends
            here, there = await stream_pair(*honest)
            for near, far in hogs:
                stream, _ = await stream_pair(near, far)
                nursery.start_soon(lost_write, stream, bytes(FIRST_WINDOW_BYTES))
                await trio.sleep(1)
            for _ in range(100):
                await here.write(bytes(100_000))
                await trio.sleep(0.1)
                while there._unread:
                    await there.read(50_000)
            assert not honest[1].is_closed
            assert [far.is_closed for _, far in hogs] == [True, False, False, False]
            assert memory.total == 3 * FIRST_WINDOW_BYTES
            for pair in ends:
                for end in pair:
                    await end.close()
            assert memory.total == 0
            assert not memory._held

    async def lost_write(stream, data):
        with suppress(MuxedStreamReset):
            await stream.write(data)

    runtime.run(main, seed=2)
