"""An unhardened libp2p host as the other side: honest for interoperation, or made to misbehave."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.keys import KeyPair
from libp2p.crypto.x25519 import create_new_key_pair as create_new_x25519_key_pair
from libp2p.custom_types import TProtocol
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as Noise
from multiaddr import Multiaddr

from node.p2p.mesh import Mesh


@asynccontextmanager
async def stock_host(keys: KeyPair | None = None) -> AsyncIterator[Any]:
    keys = keys or create_new_key_pair(b"s" * 32)
    noise = Noise(keys, noise_privkey=create_new_x25519_key_pair().private_key)
    host = new_host(key_pair=keys, muxer_preference="YAMUX", sec_opt={NOISE: noise})
    async with host.run(listen_addrs=[Multiaddr("/ip4/127.0.0.1/tcp/0")]):
        yield host


async def dial(host: Any, mesh: Mesh) -> None:
    await host.connect(info_from_p2p_addr(Multiaddr(f"{mesh.addrs[0]}/p2p/{mesh.peer}")))


async def stream_to(host: Any, mesh: Mesh, protocol: str) -> Any:
    from libp2p.peer.id import ID

    return await host.new_stream(ID.from_base58(mesh.peer), [TProtocol(protocol)])
