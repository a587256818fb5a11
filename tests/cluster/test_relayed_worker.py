"""A real worker that nobody can dial serves a prompt through a relay, and says of itself that it is relayed. So too in
a private swarm, where megabytes of shards reach it through the circuit.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from models.checkpoint import Checkpoint
from models.local import LocalModel
from models.tokenizer import Tokenizer
from node.client import Client
from node.identity import load_identity
from node.keys import default_key
from node.model import Ask
from node.p2p.mesh import Mesh
from protocol.directory import shard_key
from protocol.ids import PeerId
from protocol.messages import SHARD
from protocol.swarm import SwarmView
from simnet.checks.daemons import Daemon
from simnet.cluster import Cluster, WorkerSpec, running
from tests.helpers.commands import sotto
from tests.helpers.daemons import HIDDEN, daemon
from tests.helpers.swarm import deploy, with_client
from tests.helpers.tiny_models import make_checkpoint
from tests.helpers.waiting import until

ROOMY = ("--memory", "600MiB", "--kv-memory", "150MiB", "--threads", "1", "--metrics", "off")
PROMPT = "the quiet brook runs under the old stone bridge"


def _relayed(worker: Daemon) -> list[str]:
    """The addresses of a worker that opens no port, once it has found a relay."""

    def stated() -> dict[str, Any]:
        state: dict[str, Any] = json.loads((worker.folder / "worker.json").read_text())
        return state if state["reach"] == "relayed" else {}

    return list(until(stated, "the worker finds a relay")["addrs"])


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two workers that can be dialled: the first will be the relay."""
    specs = [WorkerSpec(memory="600MiB", kv_memory="150MiB", threads=1)] * 2
    with running(tmp_path_factory.mktemp("net") / "cluster", specs) as cluster:
        yield cluster


def test_a_prompt_runs_through_a_worker_that_nobody_can_dial(net: Cluster, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "model"))
    words, limits = ("worker", "--no-upnp", "--bootstrap", net.bootstrap), ("--listen", "none", *ROOMY)
    with daemon(tmp_path / "hidden", *words, limits=limits) as worker:
        hidden = worker.peer
        _relayed(worker)

        async def work(client: Client) -> tuple[SwarmView, tuple[int, ...], list[set[PeerId]]]:
            view = await client.discover(lambda view: len(view.members) == 3)
            model = await deploy(client, checkpoint, workers=3)
            assert hidden in {hop.peer for hop in model.route.hops}
            answer = await model.generate(PROMPT, Ask(12, ignore_eos=True))
            return view, answer.ids, [await _holders(client, checkpoint, hop.start) for hop in model.route.hops]

        view, ids, holders = with_client(net, tmp_path / "data", work)
    advert = view.members[hidden].advert
    assert advert.relayed
    assert all(addr.endswith("/p2p-circuit") for addr in advert.addrs)
    assert not any(member.advert.relayed for peer, member in view.members.items() if peer != hidden)
    prompt = Tokenizer.open(checkpoint.tokenizer_file).encode(PROMPT)
    assert list(ids) == LocalModel(checkpoint).generate(prompt, 12)
    assert sorted(peer for found in holders for peer in found) == sorted(view.members), "each holds one part"


def test_shards_reach_a_hidden_member_of_a_private_swarm_through_a_circuit(tmp_path: Path) -> None:
    """Each worker takes one of the two blocks, of 8 MB, and only the relay can dial the hidden one."""
    sizes = {"hidden_size": 256, "intermediate_size": 2048, "num_hidden_layers": 2, "head_dim": 64}
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "model", seed=5, **sizes))
    block_bytes = 4 * 256 * (2 * 256 + 2 * 128 + 3 * 2048)
    with daemon(tmp_path / "open", "worker", "--private", "--no-lan", "--relay") as first:
        invite = sotto(tmp_path, "invite", "--data-dir", str(first.folder)).stdout.strip()
        with daemon(tmp_path / "hidden", "join", invite, "--no-upnp", limits=HIDDEN) as second:
            addrs = _relayed(second)
            words = ["run", "-b", invite, "-m", str(tmp_path / "model"), "--workers", "2", "-n", "5", "--json", PROMPT]
            done = sotto(tmp_path, *words)
            assert done.exit_code == 0, done.stdout + done.stderr
            came = _shard_bytes(second.metrics)
    assert addrs
    assert all(addr.startswith(first.address) and addr.endswith("/p2p-circuit") for addr in addrs)
    assert came > block_bytes
    prompt = Tokenizer.open(checkpoint.tokenizer_file).encode(PROMPT)
    ids = json.loads(done.stdout)["ids"]
    assert ids == LocalModel(checkpoint).generate(prompt, 5)[: len(ids)]


def _shard_bytes(metrics: str) -> float:
    with urllib.request.urlopen(metrics, timeout=5) as reply:
        lines = reply.read().decode().splitlines()
    name = f'sotto_network_bytes_total{{direction="received",protocol="{SHARD}"}}'
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


async def _holders(client: Client, checkpoint: Checkpoint, block: int) -> set[PeerId]:
    """Who the directory says holds a block's shard; workers tell it within seconds."""
    sealed = await client.seal(checkpoint, "float32", default_key(client.options.data_dir))
    _, manifest = sealed.folder.manifest(load_identity(client.options.data_dir / "client"))
    assert isinstance(client.ports.transport, Mesh)
    key = shard_key(manifest.blocks[block].digest)
    while not (found := await client.ports.transport.directory.providers(key)):
        await trio.sleep(0.5)
    return {provider.peer for provider in found}
