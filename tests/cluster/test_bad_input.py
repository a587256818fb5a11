"""What people and hostile peers get wrong, against real daemons: a clear error, and a swarm that goes on serving."""

from __future__ import annotations

import os
import signal
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from client.placement import ModelNeeds, PlaceOptions
from models.checkpoint import Checkpoint
from models.config import BlockConfig
from node.app_client import open_client
from node.client import Client, ClientOptions
from node.groups import ungrouped
from node.identity import load_identity
from node.model import Ask
from node.p2p.mesh import MeshConfig, open_mesh
from protocol.adverts import TOPIC, sign_advert
from protocol.channel import Channel
from protocol.errors import InputError, RouteUnavailable, SottoError, TransportError
from protocol.messages import CONTROL, LINK, SESSION, SHARD, LeaseSpan, Ping, Pong, Refusal, RefusalReason
from protocol.ports import Stream
from protocol.signed import Identity
from protocol.swarm import SwarmView
from simnet import cluster
from simnet.cluster import Cluster
from tests.helpers.adverts import advert
from tests.helpers.swarm import deploy, with_client
from tests.helpers.tiny_models import make_checkpoint

PROMPT = "the quiet brook runs under the old stone bridge"
NOBODY = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWK99VoVxNE7XzyBwXEzW7xhK7Gpv85r9F3V3fyKSUKPH5"


def test_malformed_bootstrap_address(swarm: Cluster, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="/p2p/"):
        with_client(swarm, tmp_path, _view, bootstrap="127.0.0.1:4001")


def test_bootstrap_address_where_nobody_listens(swarm: Cluster, tmp_path: Path) -> None:
    with pytest.raises(TransportError, match="no bootstrap address answers"):
        with_client(swarm, tmp_path, _view, bootstrap=NOBODY)


def test_bootstrap_address_of_another_peer(swarm: Cluster, tmp_path: Path) -> None:
    wrong = f"{swarm.workers[0].addrs[0]}/p2p/{swarm.workers[1].peer}"
    with pytest.raises(TransportError):
        with_client(swarm, tmp_path, _view, bootstrap=wrong)


def test_a_swarm_without_workers(tmp_path: Path) -> None:
    async def main() -> None:
        async with open_mesh(MeshConfig(bytes(32))) as lonely:
            options = ClientOptions(tmp_path, (f"{lonely.addrs[0]}/p2p/{lonely.peer}",), discover_s=0.5)
            async with open_client(options) as client:
                await client.discover()

    with pytest.raises(RouteUnavailable, match="no workers found"), ungrouped():
        trio.run(main)


def test_too_little_memory_says_how_much_is_missing(swarm: Cluster, tmp_path: Path) -> None:
    tiny = Checkpoint.open(make_checkpoint(tmp_path / "m")).config.blocks
    huge = [replace(block, hidden_size=8192, intermediate_size=32768) for block in tiny * 10]
    with pytest.raises(RouteUnavailable, match=r"MiB are missing"):
        with_client(swarm, tmp_path / "data", lambda client: _place(client, huge))


def test_a_prompt_longer_than_the_context(swarm: Cluster, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "m", max_position_embeddings=32)

    async def work(client: Client) -> None:
        ready = await deploy(client, model)
        await ready.generate(PROMPT * 3, Ask(8))

    with pytest.raises(InputError, match=r"context.* 32"):
        with_client(swarm, tmp_path / "data", work)


def test_a_tampered_shard_is_refused_and_named(swarm: Cluster, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "m", seed=11))
    data = tmp_path / "data"

    async def work(client: Client) -> None:
        sealed = await client.seal(checkpoint, "float32", None)
        victim = sealed.folder.entry(1)
        assert victim is not None
        file = sealed.folder.shard(victim.digest)
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        await deploy(client, checkpoint, privacy="plain")

    with pytest.raises(SottoError, match=r"(?i)shard"):
        with_client(swarm, data, work)


def test_a_tampered_manifest_is_refused(swarm: Cluster, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "m", seed=12))

    async def work(client: Client) -> Refusal:
        sealed = await client.seal(checkpoint, "float32", None)
        manifest = bytearray(sealed.folder.manifest(load_identity(tmp_path / "data" / "client"))[0])
        manifest[len(manifest) // 2] ^= 1
        stream = await _open(client, swarm, CONTROL)
        reply = await Channel(stream, CONTROL).call(LeaseSpan(bytes(manifest), 0, 1, 0, 60, b""))
        assert isinstance(reply, Refusal)
        return reply

    assert with_client(swarm, tmp_path / "data", work).reason == RefusalReason.BAD_MANIFEST


def test_forged_and_replayed_adverts_are_not_believed(swarm: Cluster, tmp_path: Path) -> None:
    """A peer on the real mesh advertises under another's name, and repeats what it heard."""
    hostile = Identity(b"\7" * 32)

    async def work(client: Client) -> tuple[SwarmView, SwarmView]:
        before = await client.discover(lambda view: len(view.members) == 3)
        async with open_mesh(MeshConfig(hostile.seed)) as mesh:
            await mesh.connect(swarm.bootstrap)
            heard: list[bytes] = []
            topic = await mesh.subscribe(TOPIC, lambda message: not heard.append(message.data))
            await topic.receive()
            # Gossip may lose what is said while neighbours are still being chosen: say it again until it is heard. It
            # keeps a publisher's order on one connection: with the honest advert here, the others have been seen.
            while hostile.peer not in client.watch.view.members:
                now_ms = int(client.ports.clock.time() * 1000)
                honest = replace(advert(), sequence=now_ms, issued_ms=now_ms, expires_ms=now_ms + 60_000)
                lie = replace(honest, memory_bytes=1 << 50, memory_free_bytes=1 << 50)
                await mesh.publish(TOPIC, sign_advert(lie, Identity(b"\10" * 32)))  # signed by another than its author
                await mesh.publish(TOPIC, heard[0])  # somebody else's words
                await mesh.publish(TOPIC, b"\xc1 nonsense")
                await mesh.publish(TOPIC, sign_advert(honest, hostile))
                with trio.move_on_after(1):
                    await client.watch.wait_for(lambda view: hostile.peer in view.members)
            after = client.watch.view
        return before, after

    before, after = with_client(swarm, tmp_path / "data", work)
    assert set(after.members) == {*before.members, hostile.peer}
    assert after.members[hostile.peer].advert.memory_bytes == advert().memory_bytes
    assert all(
        after.members[peer].advert.memory_bytes == before.members[peer].advert.memory_bytes for peer in before.members
    )


@pytest.mark.parametrize("protocol", [CONTROL, SHARD, SESSION, LINK])
@pytest.mark.parametrize(
    "poison",
    [
        struct.pack(">II", 1 << 31, 16),  # a frame of 2 GiB
        struct.pack(">II", 16, 12) + b"\xff" * 12,  # not msgpack
        struct.pack(">II", 6, 2) + b"\x91\x7f",  # message 127 does not exist
        b"\0" * 64,
    ],
    ids=["oversized", "garbage", "unknown", "zeros"],
)
def test_a_worker_survives_malformed_frames(protocol: str, poison: bytes, swarm: Cluster, tmp_path: Path) -> None:
    async def work(client: Client) -> bool:
        stream = await _open(client, swarm, protocol)
        await stream.send(poison)
        try:
            closed = not await stream.receive(1)
        except TransportError:
            closed = True
        pong = await Channel(await _open(client, swarm, CONTROL), CONTROL).call(Ping(b"still up"))
        return closed and pong == Pong(b"still up")

    assert with_client(swarm, tmp_path, work)


def test_port_in_use_names_the_port(swarm: Cluster, tmp_path: Path) -> None:
    taken = swarm.workers[0].addrs[0]
    with pytest.raises(InputError, match=taken.rsplit("/", 1)[1]):
        trio.run(_serve_at, taken)


def test_a_worker_killed_in_mid_generation(tmp_path: Path) -> None:
    """SIGKILL to the middle hop while tokens flow: a clear error within five seconds."""
    model = make_checkpoint(tmp_path / "m", max_position_embeddings=4096)
    specs = [cluster.WorkerSpec(memory="200MiB", kv_memory="50MiB")] * 3
    with cluster.running(tmp_path / "cluster", specs) as net:
        processes = {worker.peer: worker.pid for worker in net.workers}
        killed_at: list[float] = []

        async def work(client: Client) -> float:
            ready = await deploy(client, model)
            victim = processes[ready.route.hops[1].peer]
            tokens = 0

            def count(_: str) -> None:
                nonlocal tokens
                tokens += 1
                if tokens == 5:
                    os.kill(victim, signal.SIGKILL)
                    killed_at.append(trio.current_time())

            with pytest.raises(RouteUnavailable, match="worker 12D3"):
                await ready.generate(PROMPT, Ask(4000, ignore_eos=True), count)
            return trio.current_time() - killed_at[0]

        assert with_client(net, tmp_path / "data", work) < 5.0


async def _view(client: Client) -> SwarmView:
    return await client.discover()


async def _place(client: Client, blocks: list[BlockConfig]) -> None:
    await client.place(ModelNeeds.of_configs(blocks, "float32", 64), PlaceOptions())


async def _open(client: Client, swarm: Cluster, protocol: str) -> Stream:
    worker = swarm.workers[0]
    return await client.ports.transport.open(worker.peer, worker.addrs, protocol)


async def _serve_at(addr: str) -> None:
    async with open_mesh(MeshConfig(b"\1" * 32, (addr,))):
        pass
