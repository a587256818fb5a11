"""js-libp2p, a foreign client, against real workers and against our mesh: `make interop`.

What holds with py-libp2p on both ends may be a shared mistake; here the other end is another implementation.
"""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from models.checkpoint import Checkpoint
from node.client import Client
from node.identity import load_identity
from node.keys import default_key
from node.p2p.mesh import Mesh, MeshConfig, open_mesh
from node.p2p.reaching import Reaching, ReachOptions
from protocol.adverts import TOPIC, read_advert
from protocol.directory import shard_key
from protocol.ids import PeerId
from simnet.cluster import Cluster
from tests.conformance.adapters import echo, full_addr, receive_exactly, seed_of, until
from tests.helpers.swarm import deploy, with_client
from tests.helpers.tiny_models import make_checkpoint

ROOT = Path(__file__).parents[2]
FOREIGN = ROOT / ".venv" / "interop" / "foreign.mjs"
ECHO = "/test/echo/1"
GUARD_S = 60.0
BYTES = 16 << 20

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(not FOREIGN.exists() or shutil.which("node") is None, reason="run 'make interop'"),
]


def saw(stdout: bytes) -> Any:
    return json.loads(stdout.splitlines()[-1])


async def foreign(wanted: dict[str, object]) -> Any:
    command = ["node", str(FOREIGN), json.dumps(wanted)]
    return saw((await trio.run_process(command, capture_stdout=True)).stdout)


@asynccontextmanager
async def meshes() -> AsyncIterator[tuple[Mesh, Mesh]]:
    """A node that can be dialled, and one that is reached through it only."""
    with trio.fail_after(GUARD_S):
        async with (
            open_mesh(MeshConfig(seed_of("open"))) as near,
            open_mesh(MeshConfig(seed_of("hidden"), ())) as hidden,
            trio.open_nursery() as nursery,
        ):
            for each in (near, hidden):
                each.handle(ECHO, echo)
                each.directory.serve()
                nursery.start_soon(each.directory.run)
                nursery.start_soon(Reaching(each, ReachOptions(upnp=False)).run)
            await hidden.connect(full_addr(near))
            await until(lambda: hidden.relayed)
            yield near, hidden
            nursery.cancel_scope.cancel()


def test_it_pings_a_real_worker_reads_its_advert_and_finds_its_shards(swarm: Cluster, tmp_path: Path) -> None:
    async def deployed(client: Client) -> tuple[bytes, set[PeerId]]:
        checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "model", seed=77))
        model = await deploy(client, checkpoint, workers=2)
        sealed = await client.seal(checkpoint, "float32", default_key(client.options.data_dir))
        _, manifest = sealed.folder.manifest(load_identity(client.options.data_dir / "client"))
        hop = model.route.hops[-1]
        key = shard_key(manifest.blocks[hop.start].digest)
        assert isinstance(client.ports.transport, Mesh)
        while not await client.ports.transport.directory.providers(key):
            await trio.sleep(0.5)
        return key, {hop.peer}

    key, holders = with_client(swarm, tmp_path / "data", deployed)
    wanted = {"dial": swarm.bootstrap, "ping": True, "topic": TOPIC, "key": key.hex()}
    done = subprocess.run(["node", str(FOREIGN), json.dumps(wanted)], capture_output=True, timeout=GUARD_S)
    assert done.returncode == 0, done.stderr.decode()
    seen = saw(done.stdout)
    assert seen["peer"] == swarm.workers[0].peer
    assert seen["ping_ms"] >= 0
    advert = read_advert(base64.b64decode(seen["message"]["data"]), PeerId(seen["message"]["author"]))
    assert advert.memory_bytes > 0
    assert seen["message"]["author"] in {worker.peer for worker in swarm.workers}
    assert set(seen["providers"]) == holders
    assert all(seen["providers"].values()), "with addresses"


def test_a_large_stream_comes_back_whole() -> None:
    async def main() -> None:
        async with meshes() as (near, _):
            seen = await foreign({"dial": full_addr(near), "echo": {"protocol": ECHO, "bytes": BYTES}})
            assert seen["echoed"] is True

    trio.run(main)


def test_it_reaches_a_hidden_node_through_our_relay() -> None:
    async def main() -> None:
        async with meshes() as (near, hidden):
            circuit = f"{hidden.addrs[0]}/p2p/{hidden.peer}"
            echo_of = {"protocol": ECHO, "bytes": BYTES}
            seen = (await foreign({"dial": full_addr(near), "circuit": circuit, "echo": echo_of}))["circuit"]
            assert (seen["peer"], seen["echoed"], seen["limits"]) == (hidden.peer, True, None)

    trio.run(main)


def test_its_provider_records_are_found_and_ours_by_it() -> None:
    async def main() -> None:
        async with meshes() as (near, hidden):
            await hidden.directory.provide(b"k" * 32)
            seen = await foreign({"dial": full_addr(near), "key": (b"k" * 32).hex(), "provide": (b"j" * 32).hex()})
            assert list(seen["providers"]) == [hidden.peer]
            assert seen["told"] >= 1
            assert len(await near.directory.providers(b"j" * 32)) == 1

    trio.run(main)


def test_we_open_a_large_stream_to_it() -> None:
    async def main() -> None:
        async with meshes() as (near, _):
            wanted = {"dial": full_addr(near), "serve": ECHO}
            command = ["node", str(FOREIGN), json.dumps(wanted)]
            run = partial(trio.run_process, command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            async with trio.open_nursery() as nursery:
                process = await nursery.start(run)
                peer = PeerId(json.loads(await process.stdout.receive_some())["serving"])
                await until(lambda: peer in near.connected())  # it may know of the connection a moment before we do
                stream = await near.open(peer, (), ECHO)
                data = seed_of("data") * (BYTES // 32)

                async def send() -> None:
                    await stream.send(data)
                    await stream.finish()

                nursery.start_soon(send)
                assert await receive_exactly(stream, len(data)) == data
                await stream.aclose()
                await process.stdin.aclose()

    trio.run(main)
