"""Routing: which hops serve a request, from the spans that workers say they hold. Pure.

A hop runs its whole span, so a route is a chain of spans that meet exactly. Among all chains the one with the lowest
predicted time per token wins; ties go to fewer hops, then to the lower peer ids. Workers that take no new work are
passed over. It does not place spans (placement.py) and does not know who is busy.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from client.placement import HOP_SOFTWARE_S, Placement
from protocol import limits
from protocol.errors import RouteUnavailable
from protocol.ids import DeploymentId, PeerId
from protocol.swarm import SwarmView


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


def choose_route(view: SwarmView, deployment: DeploymentId, num_blocks: int, exclude: Collection[PeerId] = ()) -> Route:
    """The fastest chain of held spans over blocks [0, num_blocks). Raises RouteUnavailable saying what is missing."""
    edges: dict[int, list[tuple[Hop, float]]] = {}
    seen: set[PeerId] = set()
    for member, span in view.holders(deployment):
        # A worker holds one span of a deployment; a second one in its advert would make it serve a route twice.
        if not member.advert.accepting or member.peer in exclude or member.peer in seen or span.end > num_blocks:
            continue
        seen.add(member.peer)
        hop = Hop(member.peer, member.advert.addrs, span.start, span.end)
        cost = (span.end - span.start) * span.block_time_us / 1e6 + HOP_SOFTWARE_S
        edges.setdefault(span.start, []).append((hop, cost))
    best: dict[int, tuple[float, tuple[Hop, ...]]] = {0: (0.0, ())}
    for start in range(num_blocks):
        if start not in best:
            continue
        cost, hops = best[start]
        for hop, hop_cost in edges.get(start, []):
            after = (cost + hop_cost, (*hops, hop))
            if len(after[1]) <= limits.HOPS_MAX and (hop.end not in best or _rank(after) < _rank(best[hop.end])):
                best[hop.end] = after
    if num_blocks not in best:
        raise RouteUnavailable(_gap(edges, num_blocks))
    return Route(deployment, best[num_blocks][1])


def _rank(chain: tuple[float, tuple[Hop, ...]]) -> tuple[float, int, tuple[PeerId, ...]]:
    cost, hops = chain
    return cost, len(hops), tuple(hop.peer for hop in hops)


def _gap(edges: dict[int, list[tuple[Hop, float]]], num_blocks: int) -> str:
    held = {block for hops in edges.values() for hop, _ in hops for block in range(hop.start, hop.end)}
    missing = [block for block in range(num_blocks) if block not in held]
    if not missing:
        return f"all {num_blocks} blocks are held, but the spans do not meet end to end; deploy the model again"
    first = missing[0]
    last = next((block for block in range(first, num_blocks) if block in held), num_blocks)
    return f"no worker holds blocks {first} to {last - 1} of {num_blocks}; deploy the model again, or wait for workers"
