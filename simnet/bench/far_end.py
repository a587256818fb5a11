"""The far end of `sotto bench dataplane`, a process of its own: serves every plane until its standard input ends.

It prints one JSON object with where it listens.
"""

from __future__ import annotations

import contextlib
import json
import sys
from functools import partial

import trio

from node.p2p.baseline import noise_inbound
from node.p2p.mesh import MeshConfig, open_mesh
from protocol.errors import TransportError
from simnet.bench.pipes import DIRECT, SERVER_SEED, STREAM, TcpPipe, serve


async def main() -> None:
    async with open_mesh(MeshConfig(SERVER_SEED, direct=(DIRECT,))) as mesh, trio.open_nursery() as nursery:
        for protocol in (DIRECT, STREAM):
            mesh.handle(protocol, serve)
        ports = {}
        for plane, answer in (("tcp", _serve_tcp), ("noise", _serve_noise)):
            (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
            ports[plane] = listener.socket.getsockname()[1]
            nursery.start_soon(partial(trio.serve_listeners, answer, [listener]))
        sys.stdout.write(json.dumps({"peer": mesh.peer, "addrs": mesh.addrs, **ports}) + "\n")
        sys.stdout.flush()
        async with trio.lowlevel.FdStream(0) as told:
            await told.receive_some()
        nursery.cancel_scope.cancel()


async def _serve_tcp(tcp: trio.SocketStream) -> None:
    with contextlib.suppress(EOFError, trio.BrokenResourceError):
        await serve(TcpPipe(tcp))


async def _serve_noise(tcp: trio.SocketStream) -> None:
    with contextlib.suppress(EOFError, TransportError):
        await serve(await noise_inbound(tcp, SERVER_SEED))


if __name__ == "__main__":
    trio.run(main)
