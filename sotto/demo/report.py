"""The demo's work: a real cluster, a sealed model, eight prompts, and an honest comparison with the unsealed model.

Everything in the report is measured in this run. Nothing is printed here (commands/demo.py does) and nothing outlives
`run`: cluster, keys and sealed shards lie in a temporary folder.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from client.deploy import DeployedHop
from client.placement import Placement
from client.tensors import to_payload, to_tensor
from equivariant.keys import RootKey
from models.agreement import Agreement, allowed_difference, compare, max_difference
from models.checkpoint import Checkpoint
from models.local import LocalModel
from models.tokenizer import Tokenizer
from node.app_client import open_client
from node.bringing import DeployOptions
from node.client import Client, ClientOptions
from node.keys import default_key
from node.model import Ask, DeployedModel
from protocol.ids import PeerId
from protocol.swarm import SwarmView
from simnet import cluster
from sotto.demo import DEMO_PROMPTS

WORKERS = 3
NEW_TOKENS = 64
KV_MEMORY_BYTES = 64 << 20
DTYPE = "float32"


@dataclass(frozen=True, slots=True)
class Show:
    """What a person sees while the demo runs; the defaults show nothing."""

    stage: Callable[[str], None] = lambda _: None
    placement: Callable[[Placement, SwarmView], None] = lambda *_: None
    prompt: Callable[[str], None] = lambda _: None
    piece: Callable[[str], None] = lambda _: None


@dataclass(frozen=True, slots=True)
class Reference:
    """The unsealed model's answers in this process, float32, and what rounding alone does to its logits."""

    prompts: list[list[int]]
    answers: list[list[int]]
    logits: list[Tensor]  # per prompt [prompt + answer, V]
    delta: float  # logit difference that rounding explains
    tokens_per_second: float


@dataclass(frozen=True, slots=True)
class WorkerRow:
    """One worker as the report shows it; the advert is the one that the placement believed."""

    peer: PeerId
    process: int
    span: tuple[int, int]
    bytes_held: int
    advert_sequence: int
    received_from: PeerId  # the neighbour that brought the advert


@dataclass(frozen=True, slots=True)
class Sight:
    """What the first worker gets for one prompt, and what a look-up in the public embedding makes of it."""

    token: str
    plain: list[float]  # the first values of the token's own vector
    sealed: list[float]  # what is sent instead
    read_plain: str  # nearest embeddings of the plain vectors: the prompt itself
    read_sealed: str  # nearest embeddings of what is sent


@dataclass(frozen=True, slots=True)
class Report:
    reference: Reference
    answers: list[list[int]]
    agreements: list[Agreement]
    workers: list[WorkerRow]
    max_logit_difference: float
    tokens_per_second: float
    seal_seconds: float
    sight: Sight

    @property
    def identical(self) -> bool:
        """Every answer is the unsealed model's, token by token."""
        return all(self.agreements)


async def run(checkpoint: Checkpoint, show: Show) -> Report:
    """Start three workers, seal, deploy, ask, compare."""
    torch.set_num_threads(1)  # as each worker has, so that the two speeds compare
    show.stage("the unsealed model answers locally (the reference)")
    reference = local_reference(checkpoint)
    with tempfile.TemporaryDirectory(prefix="sotto-demo-") as name:
        show.stage(f"starting {WORKERS} workers, each a process of its own")
        with cluster.running(Path(name) / "cluster", worker_specs(checkpoint)) as net:
            options = ClientOptions(Path(name) / "data", (net.workers[0].bootstrap,))
            async with open_client(options) as client:
                return await _through(client, checkpoint, net, reference, show)


async def _through(
    client: Client, checkpoint: Checkpoint, net: cluster.Cluster, reference: Reference, show: Show
) -> Report:
    show.stage("finding the workers by gossip, through one bootstrap address")
    await client.discover(lambda view: len(view.members) >= WORKERS)
    show.stage("sealing the model, block by block, under a fresh root key")
    key, started = default_key(client.options.data_dir), time.monotonic()
    sealed = await client.seal(checkpoint, DTYPE, key)
    seal_seconds = time.monotonic() - started
    show.stage("placing, uploading and loading the sealed blocks")
    views: list[SwarmView] = []

    def placed(placement: Placement, view: SwarmView) -> None:
        views.append(view)
        show.placement(placement, view)

    model = await client.deploy(sealed, DeployOptions(hops_min=WORKERS, on_placement=placed))
    results = []
    for ids, prompt in zip(reference.prompts, DEMO_PROMPTS, strict=True):
        show.prompt(prompt)
        results.append(await model.generate(ids, Ask(NEW_TOKENS, ignore_eos=True), show.piece))
    answers = [list(result.ids) for result in results]
    return Report(
        reference=reference,
        answers=answers,
        agreements=[
            compare(want, got, logits[len(ids) - 1 :], reference.delta)
            for ids, want, got, logits in zip(
                reference.prompts, reference.answers, answers, reference.logits, strict=True
            )
        ],
        workers=_rows(model.hops, net, views[0]),
        max_logit_difference=await _logit_difference(model, reference),
        tokens_per_second=sum(result.tokens_per_second for result in results) / len(results),
        seal_seconds=seal_seconds,
        sight=look(model, checkpoint, key),
    )


def local_reference(checkpoint: Checkpoint) -> Reference:
    """What the unsealed model says, one thread, and how far float32 is from float64 on the same tokens."""
    tokenizer = Tokenizer.open(checkpoint.tokenizer_file)
    model = LocalModel(checkpoint)
    prompts = [tokenizer.encode(prompt) for prompt in DEMO_PROMPTS]
    started = time.monotonic()
    answers = [model.generate(ids, NEW_TOKENS) for ids in prompts]
    seconds = time.monotonic() - started
    exact = LocalModel(checkpoint, torch.float64)
    forced = [ids + answer for ids, answer in zip(prompts, answers, strict=True)]
    logits = [model.logits(ids) for ids in forced]
    delta = max(allowed_difference(have, exact.logits(ids)) for have, ids in zip(logits, forced, strict=True))
    return Reference(prompts, answers, logits, delta, sum(map(len, answers)) / seconds)


def worker_specs(checkpoint: Checkpoint) -> list[cluster.WorkerSpec]:
    """Three workers of which no two can hold the whole model: the demo shows splitting, not a choice."""
    blocks = checkpoint.config.blocks
    share = -(-len(blocks) // WORKERS)
    weights = int((share + 0.5) * max(block.num_parameters for block in blocks) * torch.float32.itemsize)
    memory = (weights + KV_MEMORY_BYTES) * 8 // 7 + 8  # an eighth of a worker's memory is for its queues
    return [cluster.WorkerSpec(memory=str(memory), kv_memory=str(KV_MEMORY_BYTES), threads=1)] * WORKERS


async def _logit_difference(model: DeployedModel, reference: Reference) -> float:
    """Largest difference of any logit over all prompts and answers, teacher-forced through the swarm."""
    worst = 0.0
    for ids, answer, local in zip(reference.prompts, reference.answers, reference.logits, strict=True):
        forced = ids + answer
        async with model.session(len(forced)) as session:
            payload = to_payload(model.ends.embed(forced), torch.float32)
            hidden = to_tensor(await session.step(payload, 0, tail=len(forced)))
        worst = max(worst, max_difference(model.ends.logits(hidden), local))
    return worst


def look(model: DeployedModel, checkpoint: Checkpoint, key: RootKey) -> Sight:
    """The first prompt as the first worker gets it, read by somebody who has the public embedding but no key."""
    ids = model.tokenizer.encode(DEMO_PROMPTS[0])
    table = checkpoint.ends().embedding.float()
    plain, sent = table[ids], model.ends.embed(ids).float()
    unit = torch.nn.functional.normalize(table, dim=1)

    def nearest(rows: Tensor) -> str:
        found = (torch.nn.functional.normalize(rows, dim=1) @ unit.T).argmax(1)
        return model.tokenizer.decode(found.tolist())

    return Sight(
        token=model.tokenizer.decode(ids[-1:]),
        plain=plain[-1, :5].tolist(),
        sealed=sent[-1, :5].tolist(),
        read_plain=nearest(plain),
        read_sealed=nearest(sent),
    )


def _rows(hops: tuple[DeployedHop, ...], net: cluster.Cluster, view: SwarmView) -> list[WorkerRow]:
    processes = {worker.peer: worker.pid for worker in net.workers}
    rows = []
    for hop in hops:
        member = view.members[hop.peer]
        rows.append(
            WorkerRow(
                peer=hop.peer,
                process=processes[hop.peer],
                span=(hop.start, hop.end),
                bytes_held=hop.weight_bytes,
                advert_sequence=member.advert.sequence,
                received_from=member.received_from,
            )
        )
    return rows
