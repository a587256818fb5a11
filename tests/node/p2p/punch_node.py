"""A bare node for tests behind NAT: serves an echo, or dials one, and says as JSON lines what came of it.

python -m tests.node.p2p.punch_node NAME RELAY [PEER CIRCUIT]
"""

from __future__ import annotations

import json
import sys

import trio
from libp2p.peer.id import ID

from node.p2p.mesh import MeshConfig, open_mesh
from node.p2p.reaching import Reaching, ReachOptions
from protocol.ids import PeerId
from tests.conformance.adapters import ECHO, echo, receive_exactly, seed_of, until

WAIT_S = 20.0


def say(**words: object) -> None:
    sys.stdout.write(json.dumps(words) + "\n")
    sys.stdout.flush()


async def serve(name: str, listen: str, relay: str | None = None) -> None:
    """The node that both are connected to, or one that cannot be dialled."""
    async with open_mesh(MeshConfig(seed_of(name), (listen,))) as mesh, trio.open_nursery() as nursery:
        mesh.handle(ECHO, echo)
        nursery.start_soon(Reaching(mesh, ReachOptions(upnp=False)).run)
        if relay is not None:
            await mesh.connect(relay)
            with trio.fail_after(WAIT_S):
                await until(lambda: mesh.relayed)
        say(peer=mesh.peer, addr=f"{mesh.addrs[0]}/p2p/{mesh.peer}", circuit=mesh.addrs[-1])
        await trio.sleep_forever()


async def dial(relay: str, peer: PeerId, circuit: str) -> None:
    async with open_mesh(MeshConfig(seed_of("dialler"), ())) as mesh:
        await mesh.connect(relay)
        await (await mesh.open(peer, (circuit,), ECHO)).aclose()
        with trio.move_on_after(WAIT_S):
            await until(lambda: mesh.host.observed_ip(ID.from_base58(peer)) is not None)
        stream = await mesh.open(peer, (), ECHO)
        await stream.send(b"hello")
        assert await receive_exactly(stream, 5) == b"hello"
        say(direct=mesh.host.observed_ip(ID.from_base58(peer)))


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["relay", ip]:
            trio.run(serve, "relay", f"/ip4/{ip}/tcp/4517")
        case ["hidden", relay]:
            trio.run(serve, "hidden", "/ip4/0.0.0.0/tcp/4517", relay)
        case ["dialler", relay, peer, circuit]:
            trio.run(dial, relay, PeerId(peer), circuit)
