"""Placement: which span goes to whom. Pure: a view, the model's needs and options in, a placement out.

Minimised is the predicted time per token of one stream: each block's weights are read once per token at the worker's
measured speed, and each hop adds its network and software time. So few hops, fast workers first, weak ones left out
where that is faster. Memory is never exceeded: weights within what the advert offers for weights, KV within what it
offers for KV. Among up to EXACT_WORKERS candidates the answer is the optimum (for hop costs that do not depend on the
neighbours); among more it is the optimum over a shortlist, or else fewest hops. Equal inputs give equal placements.

Not here: choosing between deployed replicas (routing.py), and throughput of many streams.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import inf
from statistics import median

from models.config import BlockConfig
from protocol import limits
from protocol.errors import InputError, RouteUnavailable
from protocol.ids import PeerId
from protocol.manifest import Manifest
from protocol.swarm import Member, SwarmView
from protocol.tensors import DTYPE_BYTES

EXACT_WORKERS = 10  # 2^10 subsets: 0.1 s for 32 blocks
HOP_SOFTWARE_S = 0.0015  # framing, two libp2p passes, scheduling: measured 1 to 1.5 ms for activations of 64 KiB
RTT_UNKNOWN_MS = 1.0  # a neighbour on the same network
RTT_MAX_MS = 60_000.0  # whatever an advert says: keeps arithmetic finite
READ_UNKNOWN_GB_S = 1.0  # slower than any machine that runs a model: an unmeasured worker comes last
SPEED_MIN = 1e-3  # GB/s, GFLOP/s; likewise
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class ModelNeeds:
    """What the blocks take. `kv_bytes_per_token` is per block; `kv_tokens` how many tokens all open sessions hold."""

    block_bytes: tuple[int, ...]
    kv_bytes_per_token: tuple[int, ...]
    kv_tokens: int
    dtype: str

    def __post_init__(self) -> None:
        if not self.block_bytes or len(self.block_bytes) != len(self.kv_bytes_per_token):
            raise ValueError("one figure of each kind for each block, and at least one block")

    @classmethod
    def of_manifest(cls, manifest: Manifest, kv_tokens: int) -> ModelNeeds:
        """The needs of a sealed model. Raises models.errors.ModelError for a manifest of blocks we do not know."""
        configs = [BlockConfig.from_pairs([(p.key, p.value) for p in block.config]) for block in manifest.blocks]
        needs = cls.of_configs(configs, manifest.dtype, kv_tokens)
        weights = tuple(block.weight_bytes for block in manifest.blocks)
        return cls(weights, needs.kv_bytes_per_token, kv_tokens, manifest.dtype)

    @classmethod
    def of_configs(cls, blocks: Sequence[BlockConfig], dtype: str, kv_tokens: int) -> ModelNeeds:
        """The needs of a model that is not sealed yet (a preview: sealing may add a few small tensors)."""
        size = DTYPE_BYTES[dtype]
        weights = tuple(block.num_parameters * size for block in blocks)
        return cls(weights, tuple(block.kv_values_per_token * size for block in blocks), kv_tokens, dtype)

    @property
    def kv_bytes(self) -> tuple[int, ...]:
        """KV per block for all tokens."""
        return tuple(per_token * self.kv_tokens for per_token in self.kv_bytes_per_token)


@dataclass(frozen=True, slots=True)
class PlaceOptions:
    """`hops_min`: spread over at least so many workers, none with more than an even share where memory allows it."""

    exclude: frozenset[PeerId] = frozenset()
    hops_min: int = 1


@dataclass(frozen=True, slots=True)
class PlannedHop:
    """Blocks [start, end) for one worker; `predicted_us` per token, reaching it included."""

    peer: PeerId
    start: int
    end: int
    weight_bytes: int
    predicted_us: int


@dataclass(frozen=True, slots=True)
class Placement:
    """Hops in order. `bottleneck` is the slowest one: it bounds the rate of a filled pipeline."""

    hops: tuple[PlannedHop, ...]
    predicted_ms_per_token: float
    bottleneck: PeerId


@dataclass(frozen=True, slots=True)
class _Candidate:
    peer: PeerId
    s_per_byte: float
    hop_s: float
    first: tuple[int, ...] = field(repr=False)  # first[end]: the lowest start such that [start, end) fits


def plan(view: SwarmView, needs: ModelNeeds, options: PlaceOptions | None = None) -> Placement:
    """The fastest placement. Raises RouteUnavailable (which memory is missing) or InputError (too few blocks)."""
    options = options or PlaceOptions()
    blocks = len(needs.block_bytes)
    if options.hops_min > blocks:
        raise InputError(f"a model of {blocks} blocks cannot be spread over {options.hops_min} workers; ask for fewer")
    members = [member for member in view.ranked() if member.peer not in options.exclude]
    if len(members) < options.hops_min:
        found = f"{len(members)} worker{'' if len(members) == 1 else 's'} found, {options.hops_min} needed"
        raise RouteUnavailable(f"{found}; start more with `sotto worker --bootstrap ADDR`, or wait for them")
    share = -(-blocks // options.hops_min)
    for blocks_max in dict.fromkeys((share, blocks)):
        candidates = [_candidate(member, needs, blocks_max) for member in members]
        spans = _search(candidates, needs, options.hops_min)
        if spans is not None:
            return _placement(spans, needs)
    raise RouteUnavailable(_shortage(members, needs))


_Spans = list[tuple[_Candidate, int, int]]


def _search(candidates: list[_Candidate], needs: ModelNeeds, hops_min: int) -> _Spans | None:
    able = [candidate for candidate in candidates if any(at < end for end, at in enumerate(candidate.first))]
    if len(able) <= EXACT_WORKERS:
        return _exact(able, needs, hops_min)
    by_speed = sorted(able, key=lambda c: (c.s_per_byte, c.hop_s, c.peer))
    by_room = sorted(able, key=lambda c: (-_room(c), c.s_per_byte, c.peer))
    pairs = [candidate for pair in zip(by_room, by_speed, strict=True) for candidate in pair]
    shortlist = list({candidate.peer: candidate for candidate in pairs}.values())[:EXACT_WORKERS]
    return _exact(shortlist, needs, hops_min) or _fill(by_room, len(needs.block_bytes), hops_min)


def _exact(candidates: list[_Candidate], needs: ModelNeeds, hops_min: int) -> _Spans | None:
    """The optimum over all subsets and orders: best[mask][end] is the least time in which exactly the workers of
    `mask` cover [0, end)."""
    prefix = list(accumulate(needs.block_bytes, initial=0))
    end = len(needs.block_bytes)
    best = [[0.0] + [inf] * end]
    came: list[dict[int, tuple[int, int]]] = [{}]  # end -> (worker, start)
    for mask in range(1, 1 << len(candidates)):
        row, steps = [inf] * (end + 1), dict[int, tuple[int, int]]()
        for index, candidate in enumerate(candidates):
            if mask >> index & 1:
                _extend(row, steps, best[mask ^ 1 << index], index, candidate, prefix)
        best.append(row)
        came.append(steps)
    masks = [mask for mask in range(1, len(best)) if mask.bit_count() >= hops_min and best[mask][end] < inf]
    if not masks:
        return None
    mask = min(masks, key=lambda m: (best[m][end], m.bit_count(), m))
    spans: _Spans = []
    while end:
        index, start = came[mask][end]
        spans.append((candidates[index], start, end))
        mask, end = mask ^ 1 << index, start
    return spans[::-1]


def _extend(
    row: list[float],
    steps: dict[int, tuple[int, int]],
    before: list[float],
    index: int,
    candidate: _Candidate,
    prefix: list[int],
) -> None:
    """Let one more worker take [start, end), for every end: a sliding minimum over start, since `first` never falls."""
    queue: deque[tuple[float, int]] = deque()
    for end in range(1, len(row)):
        gain = before[end - 1] - prefix[end - 1] * candidate.s_per_byte
        if gain < inf:
            while queue and queue[-1][0] > gain:
                queue.pop()
            queue.append((gain, end - 1))
        while queue and queue[0][1] < candidate.first[end]:
            queue.popleft()
        if queue:
            cost = queue[0][0] + prefix[end] * candidate.s_per_byte + candidate.hop_s
            if cost < row[end]:
                row[end], steps[end] = cost, (index, queue[0][1])


def _fill(by_room: list[_Candidate], blocks: int, hops_min: int) -> _Spans | None:
    """Fewest hops: whoever has most room takes as much as it can, leaving a block to each hop that must follow."""
    spans: _Spans = []
    start = 0
    for candidate in by_room:
        if start == blocks or len(spans) == limits.HOPS_MAX:
            break
        latest = max(start + 1, blocks - max(0, hops_min - len(spans) - 1))
        end = max((end for end in range(start + 1, latest + 1) if candidate.first[end] <= start), default=start)
        if end > start:
            spans.append((candidate, start, end))
            start = end
    return spans if start == blocks and len(spans) >= hops_min else None


def _candidate(member: Member, needs: ModelNeeds, blocks_max: int) -> _Candidate:
    rtts = [min(rtt.rtt_ms, RTT_MAX_MS) for rtt in member.advert.rtts]
    hop_s = HOP_SOFTWARE_S + median(rtts or [RTT_UNKNOWN_MS]) / 2000
    room = _offer(member)
    return _Candidate(member.peer, _s_per_byte(member, needs.dtype), hop_s, _firsts(needs, room, blocks_max))


def _firsts(needs: ModelNeeds, room: tuple[int, int], blocks_max: int) -> tuple[int, ...]:
    firsts, start = [0], 0
    weights = list(accumulate(needs.block_bytes, initial=0))
    kv = list(accumulate(needs.kv_bytes, initial=0))
    for end in range(1, len(weights)):
        while start < end and (
            weights[end] - weights[start] > room[0] or kv[end] - kv[start] > room[1] or end - start > blocks_max
        ):
            start += 1
        firsts.append(start)
    return tuple(firsts)


def _offer(member: Member) -> tuple[int, int]:
    """Free bytes for weights and for KV. What idle deployments hold is free: they make room."""
    return member.advert.memory_free_bytes, member.advert.kv_free_bytes


def _s_per_byte(member: Member, dtype: str) -> float:
    """Seconds per byte of weights in decode: memory bounds it, or arithmetic (2 operations per weight) if slower."""
    stated = member.advert.speeds
    speeds = [speed for speed in stated if speed.dtype == dtype] or stated
    read_gb_s = min((speed.read_gb_s for speed in speeds), default=READ_UNKNOWN_GB_S)
    gflop_s = min((speed.gflop_s for speed in speeds), default=inf)
    return max(1 / max(read_gb_s, SPEED_MIN), 2 / (DTYPE_BYTES[dtype] * max(gflop_s, SPEED_MIN))) / 1e9


def _room(candidate: _Candidate) -> int:
    return max(end - first for end, first in enumerate(candidate.first))


def _placement(spans: _Spans, needs: ModelNeeds) -> Placement:
    hops = []
    for candidate, start, end in spans:
        weight_bytes = sum(needs.block_bytes[start:end])
        seconds = weight_bytes * candidate.s_per_byte + candidate.hop_s
        hops.append(PlannedHop(candidate.peer, start, end, weight_bytes, round(seconds * 1e6)))
    slowest = max(hops, key=lambda hop: hop.predicted_us)
    return Placement(tuple(hops), sum(hop.predicted_us for hop in hops) / 1000, slowest.peer)


def _shortage(members: list[Member], needs: ModelNeeds) -> str:
    offers = [_offer(member) for member in members]
    kinds = (("weights", needs.block_bytes, "--memory"), ("KV cache", needs.kv_bytes, "--kv-memory"))
    who = f"the swarm's {len(members)} workers offer"
    for kind, (name, per_block, option) in enumerate(kinds):
        need, have, largest = sum(per_block), sum(o[kind] for o in offers), max(o[kind] for o in offers)
        if need > have:
            return (
                f"the model needs {_mib(need)} for its {name}, {who} {_mib(have)}: {_mib(need - have)} are missing "
                f"(the largest worker offers {_mib(largest)}); start workers with more {option}"
            )
    sizes = f"of up to {_mib(max(needs.block_bytes))}, and {_mib(max(needs.kv_bytes))} of KV cache each"
    return (
        f"{who} enough memory in all, but not in pieces that fit whole blocks ({sizes}); start workers with more "
        "--memory and --kv-memory"
    )


def _mib(nbytes: int) -> str:
    return f"{nbytes / MIB:.1f} MiB"
