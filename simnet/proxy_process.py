"""The proxy of a cluster as a process: one listener for each worker, all on one event loop.

It learns where a worker listens from the worker's own statement at each dial, so a worker may come up later, or again
on another port. SIGHUP makes it read the links again. It says nothing and keeps nothing.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path

import trio

from node.files import write_atomic
from node.lifetime import until_told
from node.open_files import allow_many
from protocol.errors import InputError
from simnet.proxy import Wires, dialling_host, serve
from simnet.shape import load_wiring


async def run_proxy(folder: Path, lifeline: int | None) -> None:
    """Carry what the workers of the cluster in `folder` say until told to stop. Raises InputError."""
    wiring = load_wiring(folder)
    if wiring is None:
        raise InputError(f"{folder} holds no links to shape")
    allow_many()  # two for each connection
    wires, ports = Wires(wiring), {}
    async with until_told(lifeline), trio.open_nursery() as nursery:
        with trio.open_signal_receiver(signal.SIGHUP) as changes:
            for index, name in enumerate(wiring.workers):
                listeners = list(await trio.open_tcp_listeners(0, host="127.0.0.1"))
                ports[name] = listeners[0].socket.getsockname()[1]
                # Whoever dials a worker back does so where it saw it come from.
                listeners += await trio.open_tcp_listeners(ports[name], host=dialling_host(index))
                nursery.start_soon(serve, wires, name, listeners, _Reach(folder / name / "worker.json"))
            write_atomic(folder / "proxy.json", json.dumps({"ports": ports}).encode())
            async for _ in changes:
                wires.reshape(load_wiring(folder) or wiring)


class _Reach:
    """Connects to the worker that states where it listens in `statement`."""

    def __init__(self, statement: Path) -> None:
        self._statement = statement

    async def __call__(self, host: str) -> trio.SocketStream:
        """From the local address `host`. Raises OSError."""
        _, _, address, _, port = json.loads(self._statement.read_text())["listening"][0].split("/")
        return await trio.open_tcp_stream(address, int(port), local_address=host)
