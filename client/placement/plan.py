"""From a view to a placement. Equal inputs give equal placements, in whatever order the adverts came.

Memory is never exceeded: weights within what an advert offers for weights, KV within what it offers for KV. Workers
that accept nothing new are passed over; of more than WORKERS_MAX others, those that the client measured and then the
roomiest are looked at. Among up to search.EXACT_WORKERS workers that can take a block the placement is the optimum;
among more it is a good one (docs/PLACEMENT.md has the figures).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from client.placement import bound, pace, search
from client.placement.arrays import Floats, Ints
from client.placement.costs import HOP_SOFTWARE_S, Instance, Room, Spans, firsts, instance_of, offer, widest
from client.placement.distances import rtt_matrix_ms
from client.placement.needs import OBJECTIVES, ModelNeeds, Objective, PlaceOptions
from protocol import limits
from protocol.errors import InputError, RouteUnavailable
from protocol.ids import PeerId
from protocol.swarm import Member, SwarmView

MIB = 1 << 20
BOUND_ROUNDS = 40
WORKERS_MAX = 1024  # time and memory grow with the square: a second, and some 100 MB
PRODUCT_ROWS = 16  # of a product with weights, cost about twice what one does
ROW_US = 200  # of a row beside its products: its message, its attention; 140 to 300 us measured
BOUND_WORK = 2e9  # elementary steps: a few seconds


HopSpan = tuple[PeerId, int, int]  # blocks [start, end) at a worker


@dataclass(frozen=True, slots=True)
class PlannedHop:
    """Blocks [start, end) for one worker. Times are predicted, per token: `network_us` is the way to this worker,
    `software_us` what handling one step costs there, `send_us` what of it keeps the worker busy, `row_us` what each row
    takes beside its products. `compute_us` and `row_us` are of a machine as busy as this one."""

    peer: PeerId
    start: int
    end: int
    weight_bytes: int
    kv_bytes: int
    compute_us: int
    network_us: int
    software_us: int
    send_us: int
    row_us: int = ROW_US

    @property
    def predicted_us(self) -> int:
        """Reaching the worker included."""
        return self.compute_us + self.network_us + self.software_us

    @property
    def busy_us(self) -> int:
        """For so long the worker can do nothing else."""
        return self.compute_us + self.send_us


@dataclass(frozen=True, slots=True)
class Placement:
    """Hops in order; `return_us` is the way from the last one to the client, `client_us` the client's own work per
    token. `exact`: no placement is better."""

    hops: tuple[PlannedHop, ...]
    return_us: int
    client_us: int = 0
    objective: Objective = "latency"
    concurrency: int = 1
    exact: bool = False

    @property
    def predicted_ms_per_token(self) -> float:
        """Of one stream."""
        return (sum(hop.predicted_us for hop in self.hops) + self.return_us + self.client_us) / 1000

    @property
    def compute_ms(self) -> float:
        return sum(hop.compute_us for hop in self.hops) / 1000

    @property
    def network_ms(self) -> float:
        return (sum(hop.network_us for hop in self.hops) + self.return_us) / 1000

    @property
    def software_ms(self) -> float:
        return sum(hop.software_us for hop in self.hops) / 1000

    @property
    def micro_batches(self) -> int:
        """Requests that go through the hops together are best divided into so many parts: one for each hop, if there
        are `micro_batch_min` requests for each. Undivided, they leave all hops but one idle, or the wire."""
        return min(len(self.hops), limits.MICRO_BATCHES_MAX)

    @property
    def micro_batch_min(self) -> int:
        """So many rows of the slowest hop cost as much as reading its weights, which each part does anew."""
        slowest = max(self.hops, key=lambda hop: hop.compute_us)
        return max(1, round(slowest.compute_us / (slowest.compute_us / PRODUCT_ROWS + slowest.row_us)))

    @property
    def bottleneck(self) -> PeerId:
        """The hop that is busy longest: it bounds the rate of a filled pipeline."""
        return self._slowest.peer

    @property
    def period_ms(self) -> float:
        """Time per token of all `concurrency` streams together."""
        busy_us = max(self._slowest.busy_us, self.client_us)
        return max(busy_us / 1000, self.predicted_ms_per_token / self.concurrency)

    @property
    def predicted_tokens_per_second(self) -> float:
        """Of all `concurrency` streams together."""
        return 1000 / self.period_ms

    @property
    def _slowest(self) -> PlannedHop:
        return max(self.hops, key=lambda hop: hop.busy_us)


def plan(view: SwarmView, needs: ModelNeeds, options: PlaceOptions | None = None) -> Placement:
    """The best placement found. Raises RouteUnavailable (what is missing) or InputError (what no swarm could give)."""
    options = options or PlaceOptions()
    members = _usable(view, needs, options)
    share = -(-len(needs.block_bytes) // options.hops_min)
    rtt_ms = rtt_matrix_ms(members, options.client_rtts_ms)
    for blocks_max in dict.fromkeys((share, len(needs.block_bytes))):
        instance = _instance(members, needs, options, (rtt_ms, blocks_max))
        adds_up = _most_held(instance.room()) >= instance.blocks
        spans = _solved(instance, options) if adds_up else None
        if spans is not None:
            exact = int((instance.room() > 0).sum()) <= search.EXACT_WORKERS and len(members) < WORKERS_MAX
            return _placement(instance, spans, needs, options, exact)
    raise RouteUnavailable(_shortage(members, needs, options))


def priced(view: SwarmView, needs: ModelNeeds, hops: Sequence[HopSpan], options: PlaceOptions) -> Placement:
    """What is predicted for hops that were chosen elsewhere, all in `view`, whether or not they have room left."""
    members = [view.members[peer] for peer, _, _ in hops]
    rtt_ms = rtt_matrix_ms(members, options.client_rtts_ms)
    instance = _instance(members, needs, options, (rtt_ms, len(needs.block_bytes)))
    spans = tuple((worker, start, end) for worker, (_, start, end) in enumerate(hops))
    return _placement(instance, spans, needs, options, exact=False)


def could_fit(view: SwarmView, needs: ModelNeeds, options: PlaceOptions) -> bool:
    """Whether the workers' room adds up, without looking for a placement: quick enough for every advert that comes."""
    try:
        members = _usable(view, needs, options)
    except RouteUnavailable:
        return False
    return _most_held(_room(members, needs, options)) >= len(needs.block_bytes)


def alone(view: SwarmView, needs: ModelNeeds, options: PlaceOptions | None = None) -> Placement | None:
    """The best placement on a single worker; None when no worker can hold the whole model."""
    options = options or PlaceOptions()
    members = _usable(view, needs, options)
    rtt_ms = rtt_matrix_ms(members, options.client_rtts_ms)
    instance = _instance(members, needs, options, (rtt_ms, len(needs.block_bytes)))
    whole = [((worker, 0, instance.blocks),) for worker in np.flatnonzero(instance.first[:, -1] == 0).tolist()]
    if not whole:
        return None
    if options.objective == "latency":
        best = min(whole, key=instance.latency_s)
    else:
        best = min(whole, key=lambda spans: pace.rank(instance, spans, options.concurrency))
    return _placement(instance, best, needs, options, exact=True)


def lower_bound_ms(view: SwarmView, needs: ModelNeeds, placement: Placement, options: PlaceOptions) -> float:
    """No placement on the workers that `plan` looks at has a lower time per token (objective latency) or period
    (throughput) than this; see bound.py. It does not use the condition of `hops_min`. May take seconds in a large
    swarm."""
    known_ms = placement.period_ms if options.objective == "throughput" else placement.predicted_ms_per_token
    if placement.exact and options.hops_min == 1:
        return known_ms
    members = _usable(view, needs, options)
    rtt_ms = rtt_matrix_ms(members, options.client_rtts_ms)
    instance = _instance(members, needs, options, (rtt_ms, len(needs.block_bytes)))
    rounds = int(np.clip(BOUND_WORK / (instance.blocks * instance.workers**2), 1, BOUND_ROUNDS))
    if options.objective == "throughput":
        found_s = pace.lower_bound_period_s(instance, options.concurrency, known_ms / 1000, max(1, rounds // 10))
    else:
        found_s = bound.lower_bound_s(instance, known_ms / 1000, rounds)
    return found_s * 1000


def _usable(view: SwarmView, needs: ModelNeeds, options: PlaceOptions) -> list[Member]:
    """Who may be given blocks. Raises as `plan` does."""
    blocks = len(needs.block_bytes)
    if options.objective not in OBJECTIVES:
        raise InputError(f"unknown objective {options.objective!r}: use one of {', '.join(OBJECTIVES)}")
    if options.hops_min < 1 or options.concurrency < 1:
        raise InputError(
            f"{options.hops_min} workers and {options.concurrency} streams were asked for; ask for at least 1 of each"
        )
    if options.hops_min > blocks:
        raise InputError(f"a model of {blocks} blocks cannot be spread over {options.hops_min} workers; ask for fewer")
    if options.hops_min > limits.HOPS_MAX:
        raise InputError(
            f"a route has at most {limits.HOPS_MAX} workers, {options.hops_min} were asked for; ask for fewer"
        )
    found = [member for member in view.ranked() if member.peer not in options.exclude]
    members = [member for member in found if member.advert.accepting]
    if len(members) < options.hops_min:
        paused = len(found) - len(members)
        who = f"{len(found)} worker{'' if len(found) == 1 else 's'} found"
        but = f" ({paused} of them paused)" if paused else ""
        raise RouteUnavailable(
            f"{who}{but}, {options.hops_min} needed; start more with `sotto worker --bootstrap ADDR`, or wait for them"
        )
    if len(members) > WORKERS_MAX:
        needed = max(1, sum(needs.block_bytes)), max(1, sum(needs.kv_bytes(options.concurrency)))
        # Of the model there is room for: much of one kind of memory is no room.
        shares = {
            member.peer: min(has / whole for has, whole in zip(offer(member, options.own), needed, strict=True))
            for member in members
        }
        members.sort(key=lambda each: (each.peer not in options.client_rtts_ms, -shares[each.peer], each.peer))
        members = sorted(members[:WORKERS_MAX], key=lambda member: member.peer)
    return members


def _instance(
    members: Sequence[Member], needs: ModelNeeds, options: PlaceOptions, given: tuple[Floats, int]
) -> Instance:
    rtt_ms, blocks_max = given
    measured = [member.peer in options.client_rtts_ms for member in members]
    instance = instance_of(members, needs, Room(options.concurrency, blocks_max, options.own), rtt_ms, measured)
    instance.leg_s[:-1, -1] += options.client_s
    return replace(instance, client_s=options.client_s)


def _room(members: Sequence[Member], needs: ModelNeeds, options: PlaceOptions) -> Ints:
    """[N]: most blocks that each can hold in one span."""
    return widest(firsts(members, needs, Room(options.concurrency, len(needs.block_bytes), options.own)))


def _most_held(room: Ints) -> int:
    """No route holds more blocks: the rooms of as many workers as one may have, added up."""
    return int(np.sort(room)[-limits.HOPS_MAX :].sum())


def _solved(instance: Instance, options: PlaceOptions) -> Spans | None:
    if options.objective == "throughput":
        return pace.fast(instance, options.concurrency, options.hops_min)
    return search.fast(instance, options.hops_min)


def _placement(instance: Instance, spans: Spans, needs: ModelNeeds, options: PlaceOptions, exact: bool) -> Placement:
    hops = []
    before, kv = instance.workers, needs.kv_bytes(options.concurrency)
    for worker, start, end in spans:
        leg_s = float(instance.leg_s[before, worker]) - HOP_SOFTWARE_S
        compute_s = float(instance.compute_s[worker, end] - instance.compute_s[worker, start])
        hops.append(
            PlannedHop(
                peer=instance.peers[worker],
                start=start,
                end=end,
                weight_bytes=sum(needs.block_bytes[start:end]),
                kv_bytes=sum(kv[start:end]),
                compute_us=round(compute_s * 1e6),
                network_us=round(leg_s * 1e6),
                software_us=round(HOP_SOFTWARE_S * 1e6),
                send_us=round(float(instance.send_s[worker]) * 1e6),
                row_us=round(float(instance.slowdown[worker]) * ROW_US),
            )
        )
        before = worker
    return_us = round(float(instance.leg_s[before, -1]) * 1e6)
    client_us = round(options.client_s * 1e6)
    return Placement(tuple(hops), return_us - client_us, client_us, options.objective, options.concurrency, exact)


def _shortage(members: list[Member], needs: ModelNeeds, options: PlaceOptions) -> str:
    offers = [offer(member, options.own) for member in members]
    on_disk = any(member.advert.disk_free_bytes < member.advert.memory_free_bytes for member in members)
    weights = "--memory and --disk" if on_disk else "--memory"
    kinds = (("weights", needs.block_bytes, weights), ("KV cache", needs.kv_bytes(options.concurrency), "--kv-memory"))
    those = f"the swarm's {len(members)} {'roomiest ' if len(members) == WORKERS_MAX else ''}workers"
    who = f"{those} offer"
    for kind, (name, per_block, option) in enumerate(kinds):
        need, have, largest = sum(per_block), sum(o[kind] for o in offers), max(o[kind] for o in offers)
        if need > have:
            return (
                f"the model needs {_mib(need)} for its {name}, {who} {_mib(have)}: {_mib(need - have)} are missing "
                f"(the largest worker offers {_mib(largest)}); start workers with more {option}"
            )
    kv = max(needs.kv_bytes(options.concurrency))
    sizes = f"of up to {_mib(max(needs.block_bytes))}, and {_mib(kv)} of KV cache each"
    room, blocks = _room(members, needs, options), len(needs.block_bytes)
    able, held = int((room > 0).sum()), _most_held(room)
    if 0 < able < options.hops_min:
        return (
            f"{able} of {those} have room for a block ({sizes}), {options.hops_min} needed; "
            f"start workers with more {weights} and --kv-memory, or ask for fewer"
        )
    if held < blocks <= int(room.sum()):
        return (
            f"a route has at most {limits.HOPS_MAX} workers, and the {limits.HOPS_MAX} with most room hold at most "
            f"{held} of the model's {blocks} blocks ({sizes}); start workers with more {weights} and --kv-memory"
        )
    return (
        f"{who} enough memory in all, but not in pieces that fit whole blocks ({sizes}); start workers with more "
        f"{weights} and --kv-memory"
    )


def _mib(nbytes: int) -> str:
    return f"{nbytes / MIB:.1f} MiB"
