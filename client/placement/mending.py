"""A placement around spans that stay where they are: for a route that has lost workers.

What stays is not sent again, its room is taken already, and requests that are under way there are not disturbed. Each
gap gets the placement that is best for the gap alone, by its workers' ways from the client: with what stays it need not
be the best of all. Where the gaps cannot be filled so, all is placed anew (plan.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from operator import itemgetter

from client.placement.needs import ModelNeeds, PlaceOptions
from client.placement.plan import HopSpan, Placement, plan, priced
from protocol import limits
from protocol.errors import InputError, RouteUnavailable
from protocol.swarm import SwarmView


def mended(view: SwarmView, needs: ModelNeeds, standing: Iterable[HopSpan], options: PlaceOptions) -> Placement | None:
    """Of `standing`, spans at workers in `view`, those that are apart stay. None where none does, where there are no
    gaps (then it is something else that is wrong), and where gaps are left."""
    hops = _apart(standing)
    gaps = _gaps(hops, len(needs.block_bytes))
    if not hops or not gaps:
        return None
    for start, end in gaps:
        taken = options.exclude | {peer for peer, _, _ in hops}
        try:
            found = plan(view, _part(needs, start, end), replace(options, hops_min=1, exclude=taken))
        except (RouteUnavailable, InputError):
            return None
        hops += [(hop.peer, start + hop.start, start + hop.end) for hop in found.hops]
    if not options.hops_min <= len(hops) <= limits.HOPS_MAX:
        return None
    return priced(view, needs, sorted(hops, key=itemgetter(1)), options)


def _apart(spans: Iterable[HopSpan]) -> list[HopSpan]:
    """Without those that begin before another has ended."""
    kept: list[HopSpan] = []
    for span in sorted(spans, key=itemgetter(1, 2, 0)):
        if not kept or kept[-1][2] <= span[1]:
            kept.append(span)
    return kept


def _gaps(hops: Sequence[HopSpan], blocks: int) -> list[tuple[int, int]]:
    ends = [0, *(end for _, _, end in hops)]
    starts = [*(start for _, start, _ in hops), blocks]
    return [(end, start) for end, start in zip(ends, starts, strict=True) if end < start]


def _part(needs: ModelNeeds, start: int, end: int) -> ModelNeeds:
    """Of blocks [start, end) alone. What adverts say of the deployment's blocks is of other numbers."""
    return replace(
        needs,
        block_bytes=needs.block_bytes[start:end],
        kv_bytes_per_token=needs.kv_bytes_per_token[start:end],
        deployment=None,
    )
