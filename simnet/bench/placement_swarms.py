"""Random swarms for the placement benchmark: models, machines and round-trip times drawn by one seed.

Round trips come from measured matrices when their folder is there (PlanetLab's 490 sites, or cloud regions), else from
points on a sphere. A site may hold several machines, each with an access delay of its own. Every swarm is made of
adverts, so the benchmark goes through the product's own cost model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from client.placement import ModelNeeds
from client.placement.arrays import Floats
from client.placement.costs import Instance, Room, instance_of
from protocol.adverts import Advert, Rtt, Speed, peer_tag
from protocol.ids import PeerId, peer_id_of
from protocol.swarm import Member, SwarmView

GIB = 1 << 30
PLANETLAB, CLOUD = "planetlab_rtt_ms.txt", "aws_region_rtt_ms.json"
SPHERE_SITES = 400
MS_PER_RADIAN = 95.0  # light in fibre, there and back, over the Earth's radius, and half again for cables' ways
# (blocks, bytes of one block, KV bytes per token and block): public models' shapes, rounded.
MODELS = (
    (16, 120 << 20, 2 << 10),  # 1 B in bfloat16
    (32, 436 << 20, 4 << 10),  # 8 B
    (48, 550 << 20, 4 << 10),  # 14 B
    (64, 970 << 20, 4 << 10),  # 32 B
    (80, 1712 << 20, 4 << 10),  # 70 B
)
# (GiB, GB/s read): a laptop, a desktop, three graphics cards, two unified memories.
MACHINES = ((8, 40), (32, 60), (12, 360), (24, 900), (16, 450), (64, 400), (192, 800))
HOPS = (1.2, 30.0)  # owners lend so little of their machines that a model takes about so many of the median one


@dataclass(frozen=True, slots=True)
class Drawn:
    """A swarm whose every round trip is known: `rtt_ms` [N + 1, N + 1], members in the order of their peer ids, the
    client last."""

    label: str
    view: SwarmView
    needs: ModelNeeds
    rtt_ms: Floats

    def instance(self, concurrency: int = 1) -> Instance:
        """The costs with the whole matrix."""
        room = Room(concurrency, len(self.needs.block_bytes))
        return instance_of(self.view.ranked(), self.needs, room, self.rtt_ms.copy())


class Matrices:
    """The sources of round trips."""

    def __init__(self, folder: Path | None) -> None:
        self.named: dict[str, Floats] = {}
        if folder is not None and (folder / PLANETLAB).is_file():
            self.named["planetlab"] = _symmetric(np.loadtxt(folder / PLANETLAB))
        if folder is not None and (folder / CLOUD).is_file():
            self.named["cloud"] = _regions(folder / CLOUD)
        self.measured = bool(self.named)
        if not self.measured:
            self.named["sphere"] = _sphere(np.random.default_rng(0))

    def draw(self, seed: int, peers: tuple[int, int], blocks: int | None = None) -> Drawn:
        """Swarm number `seed`, which can hold its model. `peers`: the smallest and the largest size, of which small
        ones are likelier."""
        rng = np.random.default_rng([7, seed])
        while True:
            count = round(np.exp(rng.uniform(np.log(peers[0]), np.log(peers[1]))))
            name = sorted(self.named)[int(rng.integers(len(self.named)))]
            rtt_ms = _at_sites(self.named[name], count, rng)
            needs = _model(rng, blocks)
            adverts = _machines(rng, count, sum(needs.block_bytes))
            fits = [advert.memory_free_bytes // max(needs.block_bytes) for advert in adverts if advert.accepting]
            if sum(fits) >= len(needs.block_bytes):
                break
        view = SwarmView()
        for number, advert in enumerate(adverts):
            view = view.with_advert(_peer(number), advert, _peer(number), advert.issued_ms)
        at = {_peer(number): number for number in range(count)}
        order = [*(at[member.peer] for member in view.ranked()), count]
        label = f"{name}, {count} peers, {len(needs.block_bytes)} blocks"
        return Drawn(label, view, needs, rtt_ms[np.ix_(order, order)])


def heard(drawn: Drawn, seed: int, neighbours: int = 16) -> SwarmView:
    """The same swarm as adverts tell it: each worker states its round trips to a few others."""
    rng = np.random.default_rng([11, seed])
    members, view = drawn.view.ranked(), drawn.view
    for row, member in enumerate(members):
        others = [index for index in rng.permutation(len(members)).tolist() if index != row][:neighbours]
        rtts = tuple(Rtt(peer_tag(members[other].peer), float(drawn.rtt_ms[row, other])) for other in others)
        view = view.with_advert(member.peer, _with_rtts(member, rtts), member.peer, member.advert.issued_ms)
    return view


def client_rtts_ms(drawn: Drawn) -> dict[PeerId, float]:
    """What a client that pings everybody would measure."""
    return {member.peer: float(rtt) for member, rtt in zip(drawn.view.ranked(), drawn.rtt_ms[-1], strict=False)}


def _with_rtts(member: Member, rtts: tuple[Rtt, ...]) -> Advert:
    fields = {name: getattr(member.advert, name) for name in Advert.__dataclass_fields__}
    return Advert(**{**fields, "rtts": rtts})


def _peer(number: int) -> PeerId:
    return peer_id_of(number.to_bytes(32, "big"))


def _model(rng: np.random.Generator, blocks: int | None) -> ModelNeeds:
    fitting = [model for model in MODELS if blocks is None or model[0] == blocks]
    count, block_bytes, kv_bytes = fitting[int(rng.integers(len(fitting)))]
    return ModelNeeds((block_bytes,) * count, (kv_bytes,) * count, 4096, "bfloat16")


def _machines(rng: np.random.Generator, count: int, model_bytes: int) -> list[Advert]:
    """Machines of a few kinds: some swarms are of one kind alone, which is where order and legs matter most."""
    kinds = rng.permutation(len(MACHINES))[: int(rng.integers(1, len(MACHINES) + 1))].tolist()
    drawn = [MACHINES[kinds[int(rng.integers(len(kinds)))]] for _ in range(count)]
    hops = np.exp(rng.uniform(np.log(HOPS[0]), np.log(HOPS[1])))
    share = model_bytes / hops / (np.median([gib for gib, _ in drawn]) * GIB)
    adverts = []
    for gib, read_gb_s in drawn:
        memory = int(min(1.0, share * rng.uniform(0.5, 1.5)) * gib * GIB)
        speed = float(read_gb_s * rng.uniform(0.6, 1.0))
        adverts.append(
            Advert(
                sequence=1,
                issued_ms=0,
                expires_ms=60_000,
                addrs=(),
                memory_bytes=memory,
                memory_free_bytes=memory,
                kv_free_bytes=memory,
                disk_free_bytes=4 * memory,
                speeds=(Speed("bfloat16", speed, 50 * speed),),
                spans=(),
                rtts=(),
                device="cpu",
                version="bench",
                accepting=bool(rng.random() < 0.95),
                relayed=bool(rng.random() < 0.2),
                load_percent=int(rng.integers(0, 60)) if rng.random() < 0.3 else 0,
            )
        )
    return adverts


def _at_sites(matrix: Floats, count: int, rng: np.random.Generator) -> Floats:
    sites = rng.permutation(len(matrix)) if count < len(matrix) else rng.integers(len(matrix), size=count + 1)
    sites = sites[: count + 1]
    access = rng.exponential(3.0, size=count + 1)
    rtt_ms: Floats = matrix[np.ix_(sites, sites)] + access[:, None] + access[None, :]
    np.fill_diagonal(rtt_ms, 0.0)
    return rtt_ms


def _symmetric(matrix: Floats) -> Floats:
    return (matrix + matrix.T) / 2


def _regions(file: Path) -> Floats:
    data = json.loads(file.read_text(encoding="utf-8"))["data"]
    names = sorted(data)
    return _symmetric(
        np.array([[float(data[one].get(two, data[two].get(one, 200.0))) for two in names] for one in names])
    )


def _sphere(rng: np.random.Generator) -> Floats:
    points = rng.normal(size=(SPHERE_SITES, 3))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    return MS_PER_RADIAN * np.arccos(np.clip(points @ points.T, -1.0, 1.0))
