"""The cost of a placement, as arrays: what a span takes at each worker, and what each leg between two takes.

Time per token of one stream = client to the first hop + for each hop (its software, its blocks) + legs between hops +
the last hop to the client. Every part is a sum over single hops and single legs, so each is in one array, and every
search of this package minimises the same number. Speeds, loads and round trips are what adverts state: a worker that
lies is found out when it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import inf

import numpy as np

from client.placement.arrays import Floats, Ints
from client.placement.needs import ModelNeeds, Own
from protocol.adverts import Speed
from protocol.ids import PeerId
from protocol.swarm import Member
from protocol.tensors import DTYPE_BYTES

# Frames, two passes through the event loop, the hand-over to the engine's thread: see docs/PLACEMENT.md for the run.
HOP_SOFTWARE_S = 0.0015
BLOCK_SOFTWARE_S = 0.0002  # what torch takes to issue one block's operators, however small they are; same run
READ_UNKNOWN_GB_S = 1.0  # slower than any machine that runs a model: an unmeasured worker comes last
SPEED_MIN = 1e-3  # GB/s, GFLOP/s: keeps arithmetic finite
LOAD_MAX = 0.95  # a share of a machine that is busy all the time is not zero: it is one in twenty
RELAY_S = 0.005  # a relay takes each byte in and out, beside the traffic of others
RELAY_DETOUR = 2.0  # the relay lies somewhere else: two legs where there was one
RELAY_SHARE = 0.2  # of the rate at which a direct worker sends; Petals takes the same


@dataclass(frozen=True, slots=True)
class EngineFigures:
    """What one machine needs for one token: `s_per_byte` of weights, `s_per_block` beside, times `slowdown`."""

    s_per_byte: float
    s_per_block: float = BLOCK_SOFTWARE_S
    slowdown: float = 1.0

    def seconds(self, block_bytes: Sequence[int]) -> float:
        return (sum(block_bytes) * self.s_per_byte + len(block_bytes) * self.s_per_block) * self.slowdown

    @classmethod
    def of(cls, member: Member, needs: ModelNeeds) -> EngineFigures:
        """Of a worker, by its advert: measured block times of this deployment, else the speed of its machine."""
        slowdown = slowdown_of(member.advert.load_percent)
        for span in member.advert.spans:
            held = needs.block_bytes[span.start : span.end]
            if span.deployment == needs.deployment and span.block_time_us and held:
                return cls(span.block_time_us * 1e-6 * len(held) / sum(held), 0.0, slowdown)
        return cls(s_per_byte(member.advert.speeds, needs.dtype), slowdown=slowdown)


def slowdown_of(load_percent: int) -> float:
    """How much longer a step takes on a machine that others keep so busy: they share it (M/M/1, processor sharing)."""
    return 1 / (1 - min(load_percent / 100, LOAD_MAX))


def s_per_byte(stated: Sequence[Speed], dtype: str) -> float:
    """Seconds per byte of weights in decode: memory bounds it, or arithmetic (2 operations per weight) if slower."""
    speeds = [speed for speed in stated if speed.dtype == dtype] or list(stated)
    read_gb_s = min((speed.read_gb_s for speed in speeds), default=READ_UNKNOWN_GB_S)
    gflop_s = min((speed.gflop_s for speed in speeds), default=inf)
    return max(1 / max(read_gb_s, SPEED_MIN), 2 / (DTYPE_BYTES[dtype] * max(gflop_s, SPEED_MIN))) / 1e9


@dataclass(frozen=True, slots=True, eq=False)
class Instance:
    """N workers, B blocks, and the client as number N.

    `compute_s` [N, B + 1]: seconds for blocks [0, end), so a span takes compute_s[w, end] - compute_s[w, start].
    `first` [N, B + 1]: the lowest start such that [start, end) fits the worker; `end` itself when nothing does. Never
    falls with `end`. `leg_s` [N + 1, N + 1]: from the output of one to the start of the next one's compute, software
    included; infinite from a worker to itself. `send_s` [N]: seconds per token for which a worker is busy beside its
    compute. `slowdown` [N]: how much longer compute takes for a worker's load, in `compute_s` already. `client_s`:
    seconds per token for which the client is busy, in the legs to it already.
    """

    peers: tuple[PeerId, ...]
    compute_s: Floats
    first: Ints
    leg_s: Floats
    send_s: Floats
    slowdown: Floats
    client_s: float = 0.0

    @property
    def workers(self) -> int:
        return len(self.peers)

    @property
    def blocks(self) -> int:
        return int(self.compute_s.shape[1]) - 1

    def room(self) -> Ints:
        """[N]: most blocks that each can hold in one span."""
        return widest(self.first)

    def only(self, workers: Ints) -> Instance:
        """The same with these workers alone, numbered anew."""
        ends = np.append(workers, self.workers)
        return Instance(
            tuple(self.peers[index] for index in workers.tolist()),
            self.compute_s[workers],
            self.first[workers],
            self.leg_s[np.ix_(ends, ends)],
            self.send_s[workers],
            self.slowdown[workers],
            self.client_s,
        )

    def within(self, busy_s: float) -> Instance:
        """The same, with no span that would keep its worker busy for longer than `busy_s` per token."""
        slack = busy_s * (1 + 1e-12)
        first = self.first.copy()
        for worker, row in enumerate(self.compute_s):
            fits = np.searchsorted(row, row + (self.send_s[worker] - slack), side="left")
            first[worker] = np.minimum(np.maximum(first[worker], fits), np.arange(len(row)))
        return replace(self, first=first)

    def busy_s(self, spans: Spans) -> float:
        """Seconds per token of the slowest hop."""
        return max(self._hop_busy_s(worker, start, end) for worker, start, end in spans)

    def _hop_busy_s(self, worker: int, start: int, end: int) -> float:
        return float(self.compute_s[worker, end] - self.compute_s[worker, start] + self.send_s[worker])

    def latency_s(self, spans: Spans) -> float:
        """Time per token of one stream."""
        stops = [self.workers, *(worker for worker, _, _ in spans), self.workers]
        legs = sum(float(self.leg_s[a, b]) for a, b in pairwise(stops))
        return legs + sum(float(self.compute_s[w, end] - self.compute_s[w, start]) for w, start, end in spans)


Spans = tuple[tuple[int, int, int], ...]  # (worker, start, end), in order


@dataclass(frozen=True, slots=True)
class Room:
    """What a placement may use of each worker: KV for `concurrency` streams, at most `blocks_max` blocks; `own`: see
    PlaceOptions."""

    concurrency: int
    blocks_max: int
    own: Own = field(default_factory=dict)


def instance_of(
    members: Sequence[Member], needs: ModelNeeds, room: Room, rtt_ms: Floats, measured: Sequence[bool] = ()
) -> Instance:
    """`rtt_ms` as of distances.rtt_matrix_ms; `measured[i]`: the client measured worker i itself."""
    figures = [EngineFigures.of(member, needs) for member in members]
    weights, blocks = _prefix(needs.block_bytes), np.arange(len(needs.block_bytes) + 1)
    per_byte = np.array([each.s_per_byte * each.slowdown for each in figures])
    per_block = np.array([each.s_per_block * each.slowdown for each in figures])
    relayed = np.array([member.advert.relayed for member in members], dtype=bool)
    return Instance(
        tuple(member.peer for member in members),
        per_byte[:, None] * weights[None, :] + per_block[:, None] * blocks[None, :],
        firsts(members, needs, room),
        legs_s(members, rtt_ms, measured),
        np.where(relayed, HOP_SOFTWARE_S / RELAY_SHARE, HOP_SOFTWARE_S),
        np.array([each.slowdown for each in figures]),
    )


def widest(first: Ints) -> Ints:
    """[N]: most blocks of any span that fits, by `Instance.first`."""
    blocks: Ints = (np.arange(first.shape[1]) - first).max(axis=1)
    return blocks


def firsts(members: Sequence[Member], needs: ModelNeeds, room: Room) -> Ints:
    """`Instance.first`, by memory alone."""
    weights, kv = _prefix(needs.block_bytes), _prefix(needs.kv_bytes(room.concurrency))
    ends = np.arange(len(weights))
    rows = []
    for member in members:
        free, kv_free = offer(member, room.own)
        by_weights = np.searchsorted(weights, weights - free, side="left")
        by_kv = np.searchsorted(kv, kv - kv_free, side="left")
        rows.append(np.maximum(np.maximum(by_weights, by_kv), ends - room.blocks_max))
    return np.array(rows, dtype=np.int64)


def offer(member: Member, own: Own) -> tuple[int, int]:
    """Free bytes for weights and for KV. What idle deployments hold is free: they make room; and so does what this
    client has there itself. Weights must fit on the disk too: shards are a few KiB longer, and a worker that lacks just
    these declines."""
    advert, (weights, kv) = member.advert, own.get(member.peer, (0, 0))
    return min(advert.memory_free_bytes, advert.disk_free_bytes) + weights, advert.kv_free_bytes + kv


def legs_s(members: Sequence[Member], rtt_ms: Floats, measured: Sequence[bool]) -> Floats:
    """`Instance.leg_s`. `measured[i]`: the client measured worker i itself.

    Whoever reaches a relayed worker goes by the relay; what the worker itself dials, it reaches directly. The client
    opens every stream that it reads from, so its way from a relayed worker is the relay's too.
    """
    relayed = np.array([member.advert.relayed for member in members], dtype=bool)
    legs = rtt_ms / 2000
    # What the client measured by way of the relay has the detour in it.
    detour = np.where(np.array(measured or [False] * len(members), dtype=bool), 1.0, RELAY_DETOUR)
    from_client = np.where(relayed, legs[-1, :-1] * detour + RELAY_S, legs[-1, :-1])
    legs[:-1, :-1] = np.where(relayed[None, :], legs[:-1, :-1] * RELAY_DETOUR + RELAY_S, legs[:-1, :-1])
    legs[-1, :-1], legs[:-1, -1] = from_client, from_client
    legs[:, :-1] += HOP_SOFTWARE_S
    np.fill_diagonal(legs, inf)
    return legs


def _prefix(sizes: Sequence[int]) -> Ints:
    return np.concatenate([[0], np.cumsum(np.array(sizes, dtype=np.int64))])
