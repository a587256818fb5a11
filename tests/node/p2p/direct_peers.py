"""Two honest nodes whose test protocols go direct, and a rogue that speaks the data plane by hand."""

from __future__ import annotations

import pytest
import trio
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.security.noise.patterns import PatternXX

import node.p2p.direct as direct
from node.p2p.direct_stream import DirectStream
from node.p2p.doorway import Doorway
from node.p2p.mesh import MeshConfig
from node.p2p.records import MAGIC
from node.p2p.shunned import Shunned
from node.p2p.tcp import TcpStream
from protocol.errors import TransportError
from tests.conformance.adapters import ECHO, RAW, receive_exactly, seed_of
from tests.node.p2p.meshes import echoing, guarded


def config(name):
    return MeshConfig(seed_of(name), direct=(ECHO, RAW))


def run(body):
    guarded(body, echoing(config("a")), echoing(config("b")))


async def works(a, b, kind=DirectStream):
    stream = await b.open(a.peer, a.addrs, ECHO)
    assert isinstance(stream, kind)
    await stream.send(b"alive")
    assert await receive_exactly(stream, 5) == b"alive"
    await stream.aclose()


def endpoint(mesh):
    parts = mesh.addrs[0].split("/")
    return parts[2], int(parts[4])


async def connect(mesh):
    return await trio.open_tcp_stream(*endpoint(mesh))


async def rogue(mesh, protocol=RAW, prologue=MAGIC, seed="rogue"):
    """A dialler that has come as far as an honest one, and will say anything."""
    plane = direct.DirectPlane(seed_of(seed), None, Shunned(Doorway()))
    stream = TcpStream(await connect(mesh))
    await stream.write(MAGIC)
    local = ID.from_pubkey(plane._keys.public_key)
    pattern = PatternXX(local, plane._keys.private_key, plane._static, prologue=prologue)
    secured = await pattern.handshake_outbound(RawConnection(stream, True), ID.from_base58(mesh.peer))
    stream = direct._stream_over(stream, secured)
    await direct._be_accepted(stream, protocol)
    return stream


async def receive_until_error(stream):
    with pytest.raises(TransportError):
        await stream.receive(1)


async def send_raw(stream, data):
    view = memoryview(data)
    while view:
        await trio.lowlevel.wait_writable(stream._sock.fileno())
        view = view[stream._sock.send(view) :]
