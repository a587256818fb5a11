"""Routing over held spans: the fastest chain that meets exactly, each worker once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client import routing
from client.placement import HOP_SOFTWARE_S, Placement, PlannedHop
from client.placement.arrays import Floats
from client.placement.distances import RTT_UNKNOWN_MS, rtt_matrix_ms
from client.routing import Hop, Route, choose_route, route_of, spans_meet
from protocol.adverts import HeldSpan, Rtt, peer_tag
from protocol.errors import RouteUnavailable
from protocol.ids import DeploymentId, PeerId
from protocol.limits import HOPS_MAX
from protocol.swarm import Member, SwarmView
from tests.helpers.adverts import advert, peer, view

DEPLOYMENT, OTHER = DeploymentId(b"d" * 16), DeploymentId(b"o" * 16)
BLOCKS = 6
PER_HOP_S = HOP_SOFTWARE_S + RTT_UNKNOWN_MS / 2000


def holding(*spans: tuple[int, int, int]) -> SwarmView:
    """Worker i holds blocks [start, end) at so many microseconds each."""
    return view(*[advert(spans=(HeldSpan(DEPLOYMENT, start, end, us),)) for start, end, us in spans])


def planned(number: int, start: int, end: int) -> PlannedHop:
    return PlannedHop(peer(number), start, end, 1, 1, 1, 1, 1, 1)


def spans(route: Route) -> list[tuple[int, int]]:
    return [(hop.start, hop.end) for hop in route.hops]


def test_spans_that_meet_make_a_route_with_addresses() -> None:
    route = choose_route(holding((2, 4, 10), (0, 2, 10), (4, 6, 10)), DEPLOYMENT, BLOCKS)
    assert [(hop.peer, hop.start, hop.end) for hop in route.hops] == [(peer(1), 0, 2), (peer(0), 2, 4), (peer(2), 4, 6)]
    assert route.hops[0].addrs == ("/ip4/10.0.0.1/tcp/4001",)


def test_fewer_hops_win_unless_they_are_slower() -> None:
    assert spans(choose_route(holding((0, 6, 10), (0, 3, 10), (3, 6, 10)), DEPLOYMENT, BLOCKS)) == [(0, 6)]
    assert spans(choose_route(holding((0, 6, 900), (0, 3, 10), (3, 6, 10)), DEPLOYMENT, BLOCKS)) == [(0, 3), (3, 6)]


def test_the_faster_replica_wins_and_an_excluded_one_is_passed_over() -> None:
    swarm = holding((0, 6, 20), (0, 6, 10))
    assert choose_route(swarm, DEPLOYMENT, BLOCKS).hops[0].peer == peer(1)
    assert choose_route(swarm, DEPLOYMENT, BLOCKS, exclude=[peer(1)]).hops[0].peer == peer(0)


def test_blocks_that_nobody_holds_are_named() -> None:
    with pytest.raises(RouteUnavailable, match="no worker holds blocks 2 to 3 of 6"):
        choose_route(holding((0, 2, 1), (4, 6, 1)), DEPLOYMENT, BLOCKS)
    with pytest.raises(RouteUnavailable, match="blocks 0 to 5"):
        choose_route(SwarmView(), DEPLOYMENT, BLOCKS)
    with pytest.raises(RouteUnavailable, match="blocks 0 to 5"):
        choose_route(holding((0, 6, 1)), OTHER, BLOCKS)


def test_a_near_replica_wins_over_a_slightly_faster_far_one() -> None:
    swarm = holding((0, 6, 100), (0, 6, 90))
    client = {peer(0): 2.0, peer(1): 30.0}
    assert choose_route(swarm, DEPLOYMENT, BLOCKS, client_rtts_ms=client).hops[0].peer == peer(0)


def test_paused_and_busy_replicas_are_passed_over() -> None:
    span = (HeldSpan(DEPLOYMENT, 0, BLOCKS, 1000),)
    swarm = view(advert(spans=span, accepting=False), advert(spans=span, load_percent=80), advert(spans=span))
    assert choose_route(swarm, DEPLOYMENT, BLOCKS).hops[0].peer == peer(2)
    assert choose_route(swarm, DEPLOYMENT, BLOCKS, exclude=[peer(2)]).hops[0].peer == peer(1)
    with pytest.raises(RouteUnavailable, match="blocks 0 to 5"):
        choose_route(swarm, DEPLOYMENT, BLOCKS, exclude=[peer(1), peer(2)])


def test_legs_between_replicas_count() -> None:
    """Two replicas of the second half: the one near the worker of the first half serves, by what both say."""
    first = HeldSpan(DEPLOYMENT, 0, 3, 100)
    second = HeldSpan(DEPLOYMENT, 3, 6, 100)
    said = tuple(Rtt(peer_tag(peer(number)), rtt_ms) for number, rtt_ms in ((1, 90.0), (2, 3.0)))
    swarm = view(replace(advert(spans=(first,)), rtts=said), advert(spans=(second,)), advert(spans=(second,)))
    client = {peer(number): 10.0 for number in range(3)}
    route = choose_route(swarm, DEPLOYMENT, BLOCKS, client_rtts_ms=client)
    assert [hop.peer for hop in route.hops] == [peer(0), peer(2)]


def test_spans_that_overlap_without_meeting_are_no_route() -> None:
    with pytest.raises(RouteUnavailable, match="do not meet"):
        choose_route(holding((0, 4, 1), (2, 6, 1)), DEPLOYMENT, BLOCKS)


def test_a_worker_that_claims_two_spans_serves_at_one_hop() -> None:
    liar = view(advert(spans=(HeldSpan(DEPLOYMENT, 0, 3, 1), HeldSpan(DEPLOYMENT, 3, 6, 1))))
    with pytest.raises(RouteUnavailable):
        choose_route(liar, DEPLOYMENT, BLOCKS)


def test_a_span_beyond_the_model_is_ignored() -> None:
    with pytest.raises(RouteUnavailable):
        choose_route(holding((0, 9, 1)), DEPLOYMENT, BLOCKS)


held = st.tuples(st.integers(0, 5), st.integers(1, 6), st.sampled_from([1, 50, 3000])).filter(lambda s: s[0] < s[1])


@settings(max_examples=100, deadline=None)
@given(st.lists(held, max_size=5))
def test_the_route_is_the_fastest_chain(held_spans: list[tuple[int, int, int]]) -> None:
    best = None
    for count in range(1, len(held_spans) + 1):
        for chain in permutations(held_spans, count):
            starts = [0, *(end for _, end, _ in chain)]
            if [start for start, _, _ in chain] == starts[:-1] and starts[-1] == BLOCKS:
                cost = sum((end - start) * us / 1e6 + PER_HOP_S for start, end, us in chain)
                best = cost if best is None else min(best, cost)
    swarm = holding(*held_spans)
    assert spans_meet(swarm, DEPLOYMENT, BLOCKS) == (best is not None)
    if best is None:
        with pytest.raises(RouteUnavailable):
            choose_route(swarm, DEPLOYMENT, BLOCKS)
        return
    route = choose_route(swarm, DEPLOYMENT, BLOCKS)
    us = {peer(index): span[2] for index, span in enumerate(held_spans)}
    assert sum((h.end - h.start) * us[h.peer] / 1e6 + PER_HOP_S for h in route.hops) == pytest.approx(best)


def compared(monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """Of how many workers the distances were looked at, one number for each time."""
    counts: list[int] = []

    def noted(members: Sequence[Member], client_rtts_ms: Mapping[PeerId, float]) -> Floats:
        counts.append(len(members))
        return rtt_matrix_ms(members, client_rtts_ms)

    monkeypatch.setattr(routing, "HELD_MAX", most)
    monkeypatch.setattr(routing, "rtt_matrix_ms", noted)
    return counts


def test_who_claims_much_neither_costs_much_nor_drives_out_other_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = compared(monkeypatch, 6)
    claims = [(0, 2, 0)] * 20
    swarm = holding(*claims, (0, 4, 90), (4, 6, 90), (4, 6, 10), (0, 4, 10))
    assert [hop.peer for hop in choose_route(swarm, DEPLOYMENT, BLOCKS).hops] == [peer(23), peer(22)]
    assert counts == [6]
    counts = compared(monkeypatch, 3)
    near = choose_route(swarm, DEPLOYMENT, BLOCKS, client_rtts_ms={peer(20): 1.0, peer(21): 1.0})
    assert [hop.peer for hop in near.hops] == [peer(20), peer(21)]
    assert counts == [3]


def test_there_is_a_route_whatever_else_is_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = compared(monkeypatch, 3)
    claims = [(start, end, 0) for start in range(1, 5) for end in range(start + 1, 6)]
    swarm = holding(*claims, (0, 3, 900), (3, 6, 900))
    assert spans(choose_route(swarm, DEPLOYMENT, BLOCKS)) == [(0, 3), (3, 6)]
    assert counts == [3]


def test_more_hops_than_a_route_may_have_do_not_meet() -> None:
    each = holding(*[(block, block + 1, 1) for block in range(HOPS_MAX + 1)])
    assert spans_meet(each, DEPLOYMENT, HOPS_MAX)
    assert not spans_meet(each, DEPLOYMENT, HOPS_MAX + 1)
    with pytest.raises(RouteUnavailable):
        choose_route(each, DEPLOYMENT, HOPS_MAX + 1)


def test_a_fresh_placement_is_a_route() -> None:
    swarm = view(advert(), advert())
    placement = Placement((planned(1, 0, 4), planned(0, 4, 6)), 0)
    route = route_of(placement, swarm, DEPLOYMENT)
    assert [(hop.peer, hop.start, hop.end) for hop in route.hops] == [(peer(1), 0, 4), (peer(0), 4, 6)]
    with pytest.raises(RouteUnavailable, match="1 of the placed workers left"):
        route_of(placement, view(advert()), DEPLOYMENT)


@pytest.mark.parametrize(
    "hops",
    [
        [],
        [(0, 1, 2)],
        [(0, 0, 2), (1, 3, 4)],
        [(0, 0, 2), (1, 1, 4)],
        [(0, 0, 2), (1, 2, 2)],
        [(0, 0, 2), (0, 2, 4)],
        [(index, index, index + 1) for index in range(HOPS_MAX + 1)],
    ],
)
def test_a_route_covers_exactly_each_worker_once(hops: list[tuple[int, int, int]]) -> None:
    with pytest.raises(ValueError, match="route"):
        Route(DEPLOYMENT, tuple(Hop(peer(number), (), start, end) for number, start, end in hops))
