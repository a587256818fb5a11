"""What untrusted workers received, on disk and on the wire: nothing that points where the model's own vectors do.

On the trained demo checkpoint, read from the workers' own folders and from the bytes that the client handed to the
transport. The plain tier trips the same test, so the test can fail.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import trio
from safetensors.torch import load_file
from torch import Tensor

from client.session import SessionTerms
from client.tensors import to_payload, to_tensor
from equivariant.audit.cosine import SIGMAS, audit_block, max_cosine
from models.checkpoint import Checkpoint
from models.local import LocalModel
from node.client import Client
from node.model import DeployedModel
from node.p2p.direct_stream import DirectStream
from node.p2p.streams import MeshStream
from node.sealing import SealedFolder
from protocol import limits
from protocol.errors import RemoteProtocolError
from protocol.framing import FrameDecoder
from protocol.ids import PeerId
from protocol.messages import Message, Step
from protocol.tensors import Payload
from simnet.cluster import Cluster
from sotto.demo import DEMO_PROMPTS, demo_checkpoint
from tests.helpers.outputs import KeptOutputs
from tests.helpers.swarm import deploy, with_client

TEXT = " ".join(DEMO_PROMPTS)
RETURNED_S = 20.0
AnyStream = MeshStream | DirectStream


@dataclass
class Tap:
    """Every byte that this process hands to the transport, by stream."""

    bytes_sent: dict[int, bytearray] = field(default_factory=lambda: defaultdict(bytearray))
    streams: list[AnyStream] = field(default_factory=list)  # kept alive, so that an id names one stream

    def messages(self) -> list[tuple[PeerId, Message, bytes]]:
        found = []
        for stream in {id(stream): stream for stream in self.streams}.values():
            decoder = FrameDecoder(limits.STEP_BYTES_MAX)
            try:
                found += [(stream.remote, *frame) for frame in decoder.feed(bytes(self.bytes_sent[id(stream)]))]
            except RemoteProtocolError:
                pytest.fail("bytes on the wire that are no frames of the protocol")
        return found


@dataclass
class Seen:
    """What the workers hold (block -> tensors) and got (blocks before the hop -> hidden states)."""

    held: dict[int, dict[str, Tensor]]
    got: dict[int, Tensor]
    ids: list[int]


@pytest.mark.parametrize("privacy", ["ee", "plain"])
def test_disk_and_wire(privacy: str, swarm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(demo_checkpoint())
    seen = _run(checkpoint, privacy, swarm, tmp_path, _tap(monkeypatch))
    weights = [
        finding
        for index, tensors in seen.held.items()
        for finding in audit_block(tensors, _plain(checkpoint, index), checkpoint.config.blocks[index])
    ]
    assert set(seen.held) == set(range(checkpoint.config.num_blocks))
    assert {finding.matrix for finding in weights} >= {"q", "k", "v", "o", "gate", "up", "down"}
    limit = SIGMAS / math.sqrt(checkpoint.config.hidden_size)
    wire = {before: max_cosine(rows, _hidden(checkpoint, seen.ids, before)) for before, rows in seen.got.items()}
    assert set(wire) == {0, 2, 4}
    if privacy == "ee":
        assert [finding for finding in weights if finding.exceeds] == []
        assert max(wire.values()) <= limit
    else:
        assert all(finding.exceeds for finding in weights if finding.matrix in ("q", "k", "v", "o", "up", "down"))
        assert min(wire.values()) > 0.999 > limit


def _run(checkpoint: Checkpoint, privacy: str, swarm: Cluster, tmp_path: Path, tap: Tap) -> Seen:
    async def work(client: Client) -> Seen:
        model = await deploy(client, checkpoint, privacy=privacy)
        ids = model.tokenizer.encode(TEXT)
        outputs = KeptOutputs()
        terms = SessionTerms(len(ids), returns="float32", sink=outputs)
        async with model.driver.session(model.route, terms) as session:
            await session.step(to_payload(model.ends.embed(ids), torch.float32), 0, tail=len(ids))
            with trio.fail_after(RETURNED_S):  # what hops return goes another way than the answer, and may be later
                while not all(outputs.of_hop(hop) for hop in range(len(model.route.hops) - 1)):
                    await trio.sleep(0.01)
        first, *others = model.route.hops
        steps = [(peer, body, m) for peer, m, body in tap.messages() if isinstance(m, Step)]
        assert [peer for peer, _, _ in steps] == [first.peer]
        got = {0: to_tensor(Payload(steps[0][2].tensor, steps[0][1]))}
        # What a later hop gets is what the hop before it returned.
        for index, hop in enumerate(others):
            got[hop.start] = to_tensor(outputs.of_hop(index)[0].payload)
        _no_ids_or_text(tap, ids)
        return Seen(_on_disk(client, model, swarm), got, ids)

    return with_client(swarm, tmp_path / "data", work)


def _on_disk(client: Client, model: DeployedModel, swarm: Cluster) -> dict[int, dict[str, Tensor]]:
    """The shards of the deployment as they lie in the workers' own folders."""
    folders = {worker.peer: Path(worker.folder) for worker in swarm.workers}
    sealed = next(path for path in (client.options.data_dir / "sealed").iterdir())
    entries = SealedFolder.open(sealed)
    held = {}
    for hop in model.route.hops:
        for index in range(hop.start, hop.end):
            entry = entries.entry(index)
            assert entry is not None
            held[index] = load_file(folders[hop.peer] / "shards" / f"{entry.digest.hex()}.safetensors")
    return held


def _no_ids_or_text(tap: Tap, ids: list[int]) -> None:
    sent = b"".join(bytes(data) for data in tap.bytes_sent.values())
    assert DEMO_PROMPTS[0].encode() not in sent
    for width in (2, 4, 8):
        for order in ("little", "big"):
            assert b"".join(token.to_bytes(width, order) for token in ids[:4]) not in sent  # type: ignore[arg-type]


def _tap(monkeypatch: pytest.MonkeyPatch) -> Tap:
    tap = Tap()
    for kind in (MeshStream, DirectStream):
        monkeypatch.setattr(kind, "send", _recording(tap, kind.send))
    monkeypatch.setattr(DirectStream, "send_at_once", _recording_at_once(tap, DirectStream.send_at_once))
    return tap


def _plain(checkpoint: Checkpoint, index: int) -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in checkpoint.block(index).items()}


def _hidden(checkpoint: Checkpoint, ids: list[int], blocks: int) -> Tensor:
    """The plain hidden states before block `blocks`."""
    model = LocalModel(checkpoint)
    rows = model.embed(ids)
    caches = model.new_caches(len(ids))
    for block, cache in zip(model.blocks[:blocks], caches, strict=False):
        rows = block.forward(rows, cache, 0)
    return rows


def _recording_at_once(tap: Tap, send: Callable[[DirectStream, bytes], bool]) -> Callable[[DirectStream, bytes], bool]:
    def recorded(self: DirectStream, data: bytes) -> bool:
        taken = send(self, data)
        if taken:  # else the same bytes come again, by `send`
            tap.streams.append(self)
            tap.bytes_sent[id(self)] += data
        return taken

    return recorded


def _recording(tap: Tap, send: Callable[[Any, bytes], Awaitable[None]]) -> Callable[[Any, bytes], Awaitable[None]]:
    async def recorded(self: AnyStream, data: bytes) -> None:
        tap.streams.append(self)
        tap.bytes_sent[id(self)] += data
        await send(self, data)

    return recorded
