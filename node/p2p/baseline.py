"""Bare libp2p-Noise records over TCP, without a muxer and without framing of ours: what `sotto bench dataplane`
measures the data plane against. Records are written and read by libp2p's own session.

For benchmarks only: no deadline, no bound on connections, no half-close.
"""

from __future__ import annotations

import trio
from libp2p.abc import ISecureConn
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_new_x25519_key_pair
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.security.noise.transport import Transport as Noise

from node.p2p.streams import foreign
from node.p2p.tcp import TcpStream


class NoisePipe:
    """Bytes in records of libp2p's Noise session."""

    def __init__(self, secured: ISecureConn) -> None:
        self._secured = secured

    async def send(self, data: bytes) -> None:
        with foreign("bare Noise"):
            await self._secured.write(data)

    async def receive(self, max_bytes: int) -> bytes:
        """One record, whatever `max_bytes` is; raises TransportError at the end."""
        with foreign("bare Noise"):
            return bytes(await self._secured.read())


async def noise_inbound(tcp: trio.SocketStream, seed: bytes) -> NoisePipe:
    """The listening side, with the identity of `seed`."""
    return NoisePipe(await _noise(seed).secure_inbound(RawConnection(TcpStream(tcp), False)))


async def noise_outbound(tcp: trio.SocketStream, seed: bytes, peer: str) -> NoisePipe:
    """The dialling side; `peer` is expected at the other end."""
    return NoisePipe(await _noise(seed).secure_outbound(RawConnection(TcpStream(tcp), True), ID.from_base58(peer)))


def _noise(seed: bytes) -> Noise:
    return Noise(create_new_key_pair(seed), noise_privkey=create_new_x25519_key_pair().private_key)
