"""Each sharp edge of py-libp2p 0.8.1 that node/p2p takes off, with a hostile or unlucky peer on the other side."""

from __future__ import annotations

import errno
import random
import signal
import socket
import subprocess
import sys
from contextlib import suppress

import pytest
import trio
from libp2p.crypto.secp256k1 import create_new_key_pair as create_secp256k1_key_pair
from libp2p.host.exceptions import StreamFailure
from libp2p.network.exceptions import SwarmException
from libp2p.network.stream.exceptions import StreamError
from libp2p.pubsub.pb import rpc_pb2

import node.p2p.accepting
import node.p2p.gossip
import node.p2p.host
import node.p2p.yamux
from node.p2p.mesh import MeshConfig, open_mesh
from node.p2p.tcp import TcpStream
from protocol.errors import InputError, TransportError
from protocol.ids import PeerId
from tests.conformance.adapters import ECHO, RAW, full_addr, gossip_line, receive_exactly, seed_of, serving, until
from tests.node.p2p.meshes import TOPIC, still_works, two_meshes
from tests.node.p2p.stock import dial, stock_host, stream_to


def rpc_with(message):
    rpc = rpc_pb2.RPC(publish=[message])
    data = rpc.SerializeToString()
    assert len(data) < 1 << 14
    return (bytes([len(data) & 127 | 128, len(data) >> 7]) if len(data) > 127 else bytes([len(data)])) + data


def hostile_rpcs():
    rng = random.Random(3)
    control = rpc_pb2.RPC(subscriptions=[rpc_pb2.RPC.SubOpts(subscribe=True, topicid=TOPIC)])
    control.control.graft.add(topicID=TOPIC)
    control.control.ihave.add(topicID=TOPIC, messageIDs=[b"x" * 20 for _ in range(50)])
    control.control.iwant.add(messageIDs=[b"y" * 20])
    valid = control.SerializeToString()
    yield b"\x03\xff\xff\xff"  # not protobuf
    yield b"\xff\xff\xff\xff\x7f" + b"x" * 100  # a length beyond any limit
    yield rpc_with(
        rpc_pb2.Message(
            data=b"x", topicIDs=[TOPIC], from_id=b"\x12\x20" + b"h" * 32, seqno=b"1", key=b"junk", signature=b"s"
        )
    )
    yield rpc_with(rpc_pb2.Message(data=b"x", topicIDs=[TOPIC], from_id=b"", seqno=b"", key=b"", signature=b""))
    yield rpc_with(rpc_pb2.Message(data=b"x", topicIDs=[TOPIC, TOPIC], from_id=b"\x00", seqno=b"1", signature=b"s"))
    for _ in range(60):
        mutated = bytearray(valid)
        for _ in range(rng.randrange(1, 4)):
            mutated[rng.randrange(len(mutated))] = rng.randrange(256)
        yield bytes([len(mutated) & 127 | 128, len(mutated) >> 7]) + bytes(mutated)


def test_malformed_gossip_does_not_end_the_node():
    async def body(a, b):
        await still_works(a, b)
        async with stock_host() as hostile:
            await dial(hostile, a)
            for data in hostile_rpcs():
                stream = await stream_to(hostile, a, "/meshsub/1.1.0")
                await stream.write(data)
                await stream.close()
            await trio.sleep(0.2)  # the node has read the last of it
            await still_works(a, b)
        await b.publish(TOPIC, b"and later")
        messages = a._topics[TOPIC]
        while (await messages.receive()).data != b"and later":
            pass

    two_meshes(body)


@pytest.mark.parametrize(("pushed_out", "served"), [(1, True), (2, False)])
def test_a_newcomer_that_a_crowd_pushed_out_comes_once_more(monkeypatch, pushed_out, served):
    async def body(a, b):
        opens, new_stream = [], b._host.new_stream

        async def crowded(peer, protocols):
            opens.extend(protocols)
            if protocols == [ECHO] and opens.count(ECHO) <= pushed_out:
                b._host.drop(peer)
                await until(lambda: not b._host.is_live(peer))
            return await new_stream(peer, protocols)

        monkeypatch.setattr(b._host, "new_stream", crowded)
        if served:
            await (await b.open(a.peer, a.addrs, ECHO)).aclose()
        else:
            with pytest.raises(TransportError):
                await b.open(a.peer, a.addrs, ECHO)
        assert opens.count(ECHO) == 2

    two_meshes(body)


def test_an_exception_in_a_handler_of_the_library_costs_its_stream():
    async def body(a, b):
        async def fails(stream):
            raise RuntimeError("a bug below the mesh")

        a._host.set_stream_handler(RAW, fails)
        with pytest.raises(TransportError):
            await (await b.open(a.peer, a.addrs, RAW)).receive(1)
        await still_works(a, b)

    two_meshes(body)


def test_a_peer_that_ignores_the_window_loses_its_connection():
    async def body(a, b):
        async with stock_host() as hostile, serving(a, RAW) as streams:
            await dial(hostile, a)
            stream = await stream_to(hostile, a, RAW)
            victim = await streams.receive()
            stream.muxed_stream.send_window = 1 << 30
            with suppress(StreamError):
                for _ in range(64):
                    await stream.write(b"x" * 65536)
                    assert len(victim._muxed._unread) <= node.p2p.yamux.STREAM_WINDOW_BYTES_MAX
                    if hostile.get_id().to_base58() not in a.connected():
                        break
                    await trio.sleep(0.001)
            await until(lambda: PeerId(hostile.get_id().to_base58()) not in a.connected())
            with pytest.raises(TransportError):
                await victim.receive(1 << 20)
        await still_works(a, b)

    two_meshes(body)


def test_stock_libp2p_interoperates():
    data = bytes(range(256)) * 8192  # 2 MiB: several windows

    async def body(a, b):
        async with stock_host() as other, trio.open_nursery() as nursery:
            await dial(other, a)
            stream = await stream_to(other, a, ECHO)
            nursery.start_soon(stream.write, data)
            got = bytearray()
            while len(got) < len(data):
                got += await stream.read(65536)
            assert got == data

            async def answer(net):
                total = 0
                while total < len(data):
                    total += len(await net.read(65536))
                await net.write(str(total).encode())
                await net.close()

            other.set_stream_handler(RAW, answer)
            back = await a.open(PeerId(other.get_id().to_base58()), (), RAW)
            await back.send(data)
            assert await receive_exactly(back, 7) == b"2097152"
            assert await back.receive(1) == b""

    two_meshes(body)


def test_a_peer_that_is_no_ed25519_key_is_not_let_in():
    async def body(a, b):
        async with stock_host(create_secp256k1_key_pair()) as other:
            with suppress(SwarmException, StreamError, StreamFailure):
                await dial(other, a)
                await stream_to(other, a, ECHO)
                pytest.fail("it was let in")
            await until(lambda: a.connected() == ())
        await still_works(a, b)

    two_meshes(body)


def test_a_port_in_use_is_an_input_error_that_names_it():
    async def body(a, b):
        port = a.addrs[0].rpartition("/")[2]
        with pytest.raises(InputError, match=f"port {port} .* in use"):
            async with open_mesh(MeshConfig(seed_of("c"), (f"/ip4/127.0.0.1/tcp/{port}",))):
                pass
        async with stock_host() as other:  # it sets SO_REUSEPORT, and would share
            port = str(other.get_addrs()[0]).split("/")[4]
            with pytest.raises(InputError, match=f"port {port} .* in use"):
                async with open_mesh(MeshConfig(seed_of("c"), (f"/ip4/127.0.0.1/tcp/{port}",))):
                    pass

    two_meshes(body)


@pytest.mark.parametrize(
    "addr", ["", "localhost:4001", "/ip4/127.0.0.1/udp/4001/quic-v1", "/dns4/example.org/tcp/1", "/ip4/192.0.2.1/tcp/0"]
)
def test_a_bad_listen_address_is_an_input_error(addr):
    async def main():
        with pytest.raises(InputError):
            async with open_mesh(MeshConfig(seed_of("c"), (addr,))):
                pass

    trio.run(main)


def test_a_bad_identity_is_an_input_error():
    with pytest.raises(InputError):
        MeshConfig(b"short")


def test_nothing_listens_after_the_node_stopped():
    async def main():
        async with open_mesh(MeshConfig(seed_of("a"))) as mesh:
            addr = mesh.addrs[0].split("/")
            await (await trio.open_tcp_stream(addr[2], int(addr[4]))).aclose()
        with pytest.raises(OSError):
            await trio.open_tcp_stream(addr[2], int(addr[4]))

    trio.run(main)


def test_announced_addresses_replace_the_listening_ones():
    async def main():
        announce = ("/ip4/192.0.2.7/tcp/4001",)
        async with open_mesh(MeshConfig(seed_of("a"), announce=announce)) as mesh:
            assert mesh.addrs == announce

    trio.run(main)


def test_a_wildcard_is_announced_as_addresses_that_can_be_dialled():
    async def main():
        listen = ("/ip4/0.0.0.0/tcp/0", "/ip4/0.0.0.0/tcp/0")  # the same twice is one
        async with open_mesh(MeshConfig(seed_of("a"), listen)) as a, open_mesh(MeshConfig(seed_of("b"), ())) as b:
            assert a.addrs
            assert not any("0.0.0.0" in addr for addr in a.addrs)
            assert len(a.addrs) == len(set(a.addrs)) <= 2
            assert await b.connect(f"{a.addrs[-1]}/p2p/{a.peer}") == a.peer

    trio.run(main)


@pytest.mark.parametrize("addr", ["/dns4/worker.example/tcp/4001", "/dns6/worker.example/tcp/4001"])
def test_a_name_is_not_announced(addr):
    async def main():
        with pytest.raises(InputError, match="IP address"):
            async with open_mesh(MeshConfig(seed_of("a"), announce=(addr,))):
                pass

    trio.run(main)


def test_a_node_without_a_file_descriptor_left_is_where_it_was(monkeypatch):
    async def main():
        async with open_mesh(MeshConfig(seed_of("a"), ("/ip4/0.0.0.0/tcp/0",))) as a:
            before = a.addrs
            with monkeypatch.context() as patched:
                patched.setattr(socket, "socket", no_socket)
                assert a.addrs == before != ()

    def no_socket(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    trio.run(main)


def test_a_connection_that_ended_gives_its_slot_back():
    async def body(a, b):
        for i in range(5):
            async with open_mesh(MeshConfig(seed_of(f"c{i}"), ())) as c:
                await c.connect(full_addr(a))
        await until(lambda: a._host.swarm._inbound_limiter.borrowed_tokens == 0)

    two_meshes(body)


def test_noise_on_the_port_disturbs_nobody(monkeypatch):
    monkeypatch.setattr(node.p2p.host, "UPGRADE_S", 1.0)
    monkeypatch.setattr(node.p2p.accepting, "FIRST_BYTES_S", 1.0)

    async def body(a, b):
        host, port = a.addrs[0].split("/")[2], int(a.addrs[0].split("/")[4])
        rng = random.Random(5)
        silent = [await trio.open_tcp_stream(host, port) for _ in range(50)]
        for data in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 20, rng.randbytes(4096), b"\x13/multistream/1.0.0\n" * 3):
            async with await trio.open_tcp_stream(host, port) as stream:
                await stream.send_all(data)
        await still_works(a, b)
        for stream in silent:  # dropped by the node, not by us
            with pytest.raises(trio.BrokenResourceError):
                await stream.receive_some(4096)

    two_meshes(body)


CHILD = """
import sys, trio
from node.p2p.mesh import MeshConfig, open_mesh
async def hold(stream):
    await stream.send(b"x")
    await trio.sleep_forever()
async def main():
    async with open_mesh(MeshConfig(b"k" * 32)) as mesh:
        mesh.handle("/test/raw/1", hold)
        print(mesh.addrs[0], mesh.peer, flush=True)
        await trio.sleep_forever()
trio.run(main)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_or_frozen_process_ends_its_streams(how, monkeypatch):
    monkeypatch.setattr(node.p2p.yamux, "KEEPALIVE_S", 0.3)  # a frozen peer is noticed after 3 to 4 of these

    with subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True) as child:
        addr, peer = child.stdout.readline().split()

        async def body(a, b):
            stream = await a.open(PeerId(peer), [addr], RAW)
            assert await stream.receive(1) == b"x"
            child.send_signal(how)
            with trio.fail_after(1 if how == signal.SIGKILL else 3), pytest.raises(TransportError):
                await stream.receive(1)
            with pytest.raises(TransportError):
                await stream.send(b"x")
            await until(lambda: a.connected() == ())
            await still_works(a, b)

        try:
            two_meshes(body)
        finally:
            child.kill()


def test_one_neighbour_cannot_flood(monkeypatch):
    async def body(a, b):
        messages = await a.subscribe(TOPIC, lambda message: True)
        await b.subscribe(TOPIC, lambda message: True)
        await gossip_line(TOPIC, b, a)
        a._pubsub._forwarding.clear()
        monkeypatch.setattr(node.p2p.gossip, "FORWARDED_BURST", 3.0)
        with trio.move_on_after(0.5):
            for i in range(25):
                await b.publish(TOPIC, bytes([i]))
            await trio.sleep_forever()
        assert 3 <= len(messages._messages) <= 3 + 20 * 0.6 + 1

    two_meshes(body)


def test_a_message_of_several_topics_is_dropped():
    """It would be validated, and delivered, once for each."""

    async def body(a, b):
        messages = await a.subscribe(TOPIC, lambda message: True)
        await b.subscribe(TOPIC, lambda message: True)
        await gossip_line(TOPIC, b, a)
        await b._pubsub.publish([TOPIC, TOPIC], b"twice")
        await b.publish(TOPIC, b"once")
        assert (await messages.receive()).data == b"once"

    two_meshes(body)


def test_gossip_keeps_no_record_of_each_message():
    async def body(a, b):
        await still_works(a, b)
        for number in range(5):
            await b.publish(TOPIC, bytes([number]))
        assert not b._pubsub.router.recent_message_deliveries

    two_meshes(body)


def test_a_stream_reads_what_the_kernel_has_at_once():
    """One system call fetches several records."""

    async def main():
        near, far = await _tcp_pair()
        stream = TcpStream(far)
        await near.send_all(b"abcdef")
        assert await stream.read(2) == b"ab"
        assert bytes(stream._unread) == b"cdef"
        assert await stream.read(100) == b"cdef"
        await near.aclose()
        assert await stream.read(1) == b""
        await stream.close()
        assert stream.closed.is_set()

    trio.run(main)


async def _tcp_pair():
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        near = await trio.open_tcp_stream("127.0.0.1", listener.socket.getsockname()[1])
        return near, await listener.accept()
