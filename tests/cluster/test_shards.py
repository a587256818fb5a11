"""Shards between real processes: killed uploads, several sources, and workers that come back."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
import pytest
import trio

from client.deploy import DeployProgress, deploy
from client.leases import Leasing
from client.routing import Hop, Route
from client.upload import Supply, holders_in
from models.checkpoint import Checkpoint
from node.bringing import DeployOptions
from node.client import Client, SealedModel
from node.identity import load_identity
from node.model import Ask
from node.sealing import FolderSource
from protocol.ids import ShardDigest
from protocol.pieces import PieceList
from simnet import cluster
from simnet.checks.upload_trials import run_trial
from simnet.cluster import Cluster, WorkerProcess, WorkerSpec
from tests.helpers.swarm import with_client
from tests.helpers.tiny_models import make_checkpoint

SIZES = {"hidden_size": 256, "intermediate_size": 2048, "num_hidden_layers": 6}  # 6 shards of 7 pieces
SPEC = WorkerSpec(memory="600MiB", kv_memory="150MiB")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two workers that a test may kill. Each test brings a model of its own, by its seed."""
    with cluster.running(tmp_path_factory.mktemp("shards") / "cluster", [SPEC] * 2) as net:
        yield net


@pytest.fixture
def net(pair: Cluster) -> Cluster:
    """The pair as it is now, with whoever was killed started again."""
    now = replace(cluster.load(pair.folder), lifeline=pair.lifeline)
    for worker in now.workers:
        if not worker.alive:
            now = cluster.restart(now, worker.name)
    return now


@pytest.mark.parametrize("seed", [8])
def test_an_upload_killed_on_either_side_goes_on_and_sends_nothing_again(seed: int, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "m", **SIZES)
    report = run_trial(tmp_path / "trial", model, seed, kills=2)
    assert report.passed, report
    assert {attempt.victim for attempt in report.attempts} == {"worker", "client", ""}
    assert report.kills_midway >= 1, "the last pieces may outrun a kill"
    assert report.attempts[-1].before + report.attempts[-1].sent == report.pieces


@dataclass
class SlowSource:
    """A client with a slow line: four pieces a second, all shards together."""

    source: FolderSource
    reads: Counter[ShardDigest] = field(default_factory=Counter)

    async def pieces(self, digest: ShardDigest) -> PieceList | None:
        return await self.source.pieces(digest)

    async def discard(self, digest: ShardDigest) -> None:
        await self.source.discard(digest)

    async def read(self, digest: ShardDigest, offset: int, nbytes: int) -> bytes:
        await trio.sleep(0.25)
        self.reads[digest] += 1
        return await self.source.read(digest, offset, nbytes)


async def sealed(client: Client, model: Path) -> SealedModel:
    return await client.seal(Checkpoint.open(model), "float32", None)


async def bring(client: Client, model: SealedModel, worker: WorkerProcess, source: SlowSource | FolderSource) -> int:
    """The whole model to one worker; gives the most bytes that progress told of."""
    signed, manifest = model.folder.manifest(load_identity(client.options.data_dir / "client"))
    route = Route(manifest.deployment, (Hop(worker.peer, worker.addrs, 0, len(manifest.blocks)),))
    told: list[DeployProgress] = []
    supply = Supply(source, holders_in(client.watch.view, manifest.deployment))
    await deploy(client.ports, route, (signed, manifest), supply, Leasing(client.leases), told.append)
    assert told[-1].total_bytes == sum(block.shard_bytes for block in manifest.blocks)
    return told[-1].present_bytes


def shards_at(worker: WorkerProcess, client: Client, model: SealedModel) -> list[Path]:
    """Where the worker keeps the model's shards that are whole."""
    _, manifest = model.folder.manifest(load_identity(client.options.data_dir / "client"))
    return [Path(worker.folder) / "shards" / f"{block.digest.hex()}.safetensors" for block in manifest.blocks]


def test_a_worker_that_was_killed_serves_again_without_an_upload(net: Cluster, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "m", seed=50)

    async def first(client: Client) -> tuple[str, str]:
        ready = await client.deploy(await sealed(client, model), DeployOptions())
        assert len(ready.hops) == 1
        return ready.hops[0].peer, (await ready.generate("the quiet brook", Ask(8))).text

    peer, text = with_client(net, tmp_path / "data", first)
    victim = next(worker for worker in net.workers if worker.peer == peer)
    other = next(worker for worker in net.workers if worker.peer != peer)
    os.kill(victim.pid, signal.SIGKILL)
    psutil.wait_procs([psutil.Process(victim.pid)], timeout=10)
    cluster.restart(net, victim.name)

    async def second(client: Client) -> str:
        model_at_client = await sealed(client, model)
        await client.watch.wait_for(lambda view: bool(view.holders(model_at_client.folder.deployment)))
        ready = await client.deploy(model_at_client, DeployOptions())
        assert ready.hops == (), "nothing was brought: the worker said that it holds the model"
        assert ready.route.hops[0].peer == peer
        return (await ready.generate("the quiet brook", Ask(8))).text

    assert with_client(net, tmp_path / "data", second, bootstrap=other.bootstrap) == text


@pytest.mark.parametrize("killed", [False, True], ids=["to the end", "a source is killed"])
def test_another_worker_helps_a_slow_client(killed: bool, net: Cluster, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "m", seed=52 if killed else 51, **SIZES)
    first, second = net.workers

    async def work(client: Client) -> tuple[int, int, list[Path]]:
        ready = await sealed(client, model)
        await bring(client, ready, first, FolderSource(ready.folder))
        await client.watch.wait_for(lambda view: bool(view.holders(ready.folder.deployment)))
        slow = SlowSource(FolderSource(ready.folder))
        shards = shards_at(second, client, ready)
        assert not any(path.exists() for path in shards)
        async with trio.open_nursery() as nursery:
            if killed:
                nursery.start_soon(_kill_in_the_middle, first, shards)
            present = await bring(client, ready, second, slow)
        return present, slow.reads.total(), shards

    present, reads, shards = with_client(net, tmp_path / "data", work)
    assert sum(path.stat().st_size for path in shards) == present
    assert reads < (42 if killed else 12), "of 42 pieces"


async def _kill_in_the_middle(source: WorkerProcess, shards: list[Path]) -> None:
    while not any(path.exists() for path in shards):
        await trio.sleep(0.001)
    os.kill(source.pid, signal.SIGKILL)
