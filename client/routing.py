"""Routing: which hops serve a request, from the spans that workers say they hold. Pure.

A hop runs its whole span, so a route is a chain of spans that meet exactly. Among all chains the one with the lowest
predicted time per token wins, by the same costs as placements (client/placement/costs.py): measured block times, load,
legs. Ties go to fewer hops, then to the lower peer ids. Adverts claim what they like, so of more than HELD_MAX spans
that many are compared; there is a route whenever spans meet. It passes over paused workers, and does not place spans.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from client.placement import Placement
from client.placement.costs import legs_s, slowdown_of
from client.placement.distances import rtt_matrix_ms
from protocol import limits
from protocol.errors import RouteUnavailable
from protocol.ids import DeploymentId, PeerId
from protocol.swarm import Member, SwarmView

HELD_MAX = 256  # time and memory grow with the square: 40 ms


@dataclass(frozen=True, slots=True)
class Hop:
    """Blocks [start, end) at one worker, and where to dial it."""

    peer: PeerId
    addrs: tuple[str, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Route:
    """Hops in order, covering [0, L) of a deployment, each worker once. Raises ValueError otherwise."""

    deployment: DeploymentId
    hops: tuple[Hop, ...]

    def __post_init__(self) -> None:
        starts = [0, *(hop.end for hop in self.hops)]
        if not self.hops or any(hop.start != start or hop.end <= start for hop, start in zip(self.hops, starts)):  # noqa: B905
            raise ValueError("the hops of a route cover the blocks from 0 on without gap or overlap")
        if len({hop.peer for hop in self.hops}) != len(self.hops):
            raise ValueError("a worker serves a route at one hop only")
        if len(self.hops) > limits.HOPS_MAX:
            raise ValueError(f"a route of {len(self.hops)} hops; {limits.HOPS_MAX} at most")


def route_of(placement: Placement, view: SwarmView, deployment: DeploymentId) -> Route:
    """The route over a fresh placement, before adverts tell of its spans. Raises RouteUnavailable."""
    gone = [hop.peer for hop in placement.hops if hop.peer not in view.members]
    if gone:
        raise RouteUnavailable(f"{len(gone)} of the placed workers left the swarm; place again")
    addrs = {member.peer: member.advert.addrs for member in view.members.values()}
    return Route(deployment, tuple(Hop(hop.peer, addrs[hop.peer], hop.start, hop.end) for hop in placement.hops))


def choose_route(
    view: SwarmView,
    deployment: DeploymentId,
    num_blocks: int,
    exclude: Collection[PeerId] = (),
    client_rtts_ms: Mapping[PeerId, float] | None = None,
) -> Route:
    """The fastest chain of held spans over blocks [0, num_blocks). Raises RouteUnavailable saying what is missing."""
    held = _held(view, deployment, num_blocks, exclude)
    shortest = _shortest(held, num_blocks)
    if shortest is None:
        raise RouteUnavailable(_gap([hop for _, hop, _ in held], num_blocks))
    rtts_ms = client_rtts_ms or {}
    compared = _compared(held, rtts_ms)
    chain = _fastest(compared, num_blocks, rtts_ms)
    return Route(deployment, shortest if chain is None else tuple(compared[index][1] for index in chain))


def spans_meet(view: SwarmView, deployment: DeploymentId, num_blocks: int, exclude: Collection[PeerId] = ()) -> bool:
    """Whether `choose_route` finds a route, without looking for the fastest: quick enough for every advert."""
    return _shortest(_held(view, deployment, num_blocks, exclude), num_blocks) is not None


def held_route(
    view: SwarmView,
    deployment: DeploymentId,
    num_blocks: int,
    exclude: Collection[PeerId] = (),
    client_rtts_ms: Mapping[PeerId, float] | None = None,
) -> Route | None:
    """As `choose_route`; None when there is none."""
    try:
        return choose_route(view, deployment, num_blocks, exclude, client_rtts_ms)
    except RouteUnavailable:
        return None


_Held = list[tuple[Member, Hop, float]]  # with the seconds that the span takes


def _held(view: SwarmView, deployment: DeploymentId, num_blocks: int, exclude: Collection[PeerId]) -> _Held:
    """The spans that may be used, in the order of their starts and then of the peer ids."""
    held: dict[PeerId, tuple[Member, Hop, float]] = {}
    for member, span in view.holders(deployment):
        # A worker holds one span of a deployment; a second one in its advert would make it serve a route twice.
        if member.peer in exclude or member.peer in held or span.end > num_blocks or not member.advert.accepting:
            continue
        hop = Hop(member.peer, member.advert.addrs, span.start, span.end)
        seconds = (span.end - span.start) * span.block_time_us / 1e6 * slowdown_of(member.advert.load_percent)
        held[member.peer] = (member, hop, seconds)
    return sorted(held.values(), key=lambda each: (each[1].start, each[1].peer))


def _shortest(held: _Held, num_blocks: int) -> tuple[Hop, ...] | None:
    """A chain of the fewest hops. A chain to a block is known when the first span that starts there is looked at."""
    chains: dict[int, tuple[Hop, ...]] = {0: ()}
    for _, hop, _ in held:
        before, known = chains.get(hop.start), chains.get(hop.end)
        if before is not None and (known is None or len(before) + 1 < len(known)):
            chains[hop.end] = (*before, hop)
    found = chains.get(num_blocks)
    return found if found is not None and len(found) <= limits.HOPS_MAX else None


def _compared(held: _Held, client_rtts_ms: Mapping[PeerId, float]) -> _Held:
    """HELD_MAX at most: as many of each span as of the others, those that the client measured and those said to be fast
    first, so that who claims much drives out no other span."""
    if len(held) <= HELD_MAX:
        return held
    ranks, count = list[tuple[int, int]](), Counter[tuple[int, int]]()
    order = sorted(range(len(held)), key=lambda at: _preference(held[at], client_rtts_ms))
    for place, at in enumerate(order):
        span = (held[at][1].start, held[at][1].end)
        ranks.append((count[span], place))
        count[span] += 1
    return [held[at] for at in sorted(order[place] for _, place in sorted(ranks)[:HELD_MAX])]


def _preference(each: tuple[Member, Hop, float], client_rtts_ms: Mapping[PeerId, float]) -> tuple[bool, float, PeerId]:
    _, hop, seconds = each
    return hop.peer not in client_rtts_ms, seconds, hop.peer


def _fastest(held: _Held, num_blocks: int, client_rtts_ms: Mapping[PeerId, float]) -> tuple[int, ...] | None:
    """Best chain to each held span, in the order of starts: those before it in a chain start before it does."""
    members = [member for member, _, _ in held]
    legs = legs_s(members, rtt_matrix_ms(members, client_rtts_ms), [peer.peer in client_rtts_ms for peer in members])
    best: dict[int, tuple[float, int, tuple[int, ...]]] = {}
    for index, (_, hop, seconds) in enumerate(held):
        options = [
            (cost + float(legs[before, index]), count + 1, (*chain, index))
            for before, (cost, count, chain) in best.items()
            if held[before][1].end == hop.start and count < limits.HOPS_MAX
        ]
        if hop.start == 0:
            options = [(float(legs[-1, index]), 1, (index,))]
        if options:
            cost, count, chain = min(options)
            best[index] = (cost + seconds, count, chain)
    whole = [(cost + float(legs[i, -1]), count, chain) for i, (cost, count, chain) in best.items()]
    whole = [each for each in whole if held[each[2][-1]][1].end == num_blocks]
    return min(whole)[2] if whole else None


def _gap(hops: list[Hop], num_blocks: int) -> str:
    held = {block for hop in hops for block in range(hop.start, hop.end)}
    missing = [block for block in range(num_blocks) if block not in held]
    if not missing:
        return f"all {num_blocks} blocks are held, but the spans do not meet end to end; deploy the model again"
    first = missing[0]
    last = next((block for block in range(first, num_blocks) if block in held), num_blocks)
    return f"no worker holds blocks {first} to {last - 1} of {num_blocks}; deploy the model again, or wait for workers"
