"""Placements around spans that stay, and room that is the client's own."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.placement import Placement, PlaceOptions, could_fit, mended, plan
from client.placement.plan import HopSpan
from protocol.adverts import HeldSpan
from protocol.errors import RouteUnavailable
from protocol.ids import DeploymentId, PeerId
from protocol.limits import HOPS_MAX
from tests.helpers.adverts import MIB, advert, peer, view
from tests.helpers.placing import needs

DEPLOYMENT = DeploymentId(bytes(16))
MODEL = replace(needs(1, 1, 1, 1, kv_mib=1), deployment=DEPLOYMENT)


def held(start: int, end: int) -> tuple[HeldSpan, ...]:
    return (HeldSpan(DEPLOYMENT, start, end, 100),)


def hops(placement: Placement | None) -> list[HopSpan]:
    assert placement is not None
    return [(hop.peer, hop.start, hop.end) for hop in placement.hops]


# The first worker holds the first half and has no more room; the second one is lost; the third has room for a half.
LEFT = view(advert(0.5, 0.5, spans=held(0, 2)), advert(0, 0, spans=held(2, 4)), advert(2, 2))
LOST = PlaceOptions(exclude=frozenset([peer(1)]))


def test_what_stays_stays_and_the_gap_is_filled() -> None:
    assert hops(mended(LEFT, MODEL, [(peer(0), 0, 2)], LOST)) == [(peer(0), 0, 2), (peer(2), 2, 4)]


def test_own_room_counts_where_all_is_placed_anew() -> None:
    """The worker would have the half twice, were its span not to give way."""
    assert not could_fit(LEFT, MODEL, LOST)
    with pytest.raises(RouteUnavailable, match="are missing"):
        plan(LEFT, MODEL, LOST)
    own = replace(LOST, own={peer(0): (2 * MIB, 2 * MIB)})
    assert could_fit(LEFT, MODEL, own)
    assert {hop.peer for hop in plan(LEFT, MODEL, own).hops} == {peer(0), peer(2)}
    weights_alone = replace(LOST, own={peer(0): (2 * MIB, 0)})
    assert not could_fit(LEFT, MODEL, weights_alone)


def test_gaps_at_both_ends_and_between() -> None:
    swarm = view(advert(0, 0), advert(0, 0), *(advert(1, 1) for _ in range(2)))
    found = hops(mended(swarm, MODEL, [(peer(1), 3, 4), (peer(0), 1, 2)], PlaceOptions()))
    assert [(start, end) for _, start, end in found] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert {found[0][0], found[2][0]} == {peer(2), peer(3)}


def test_of_spans_that_overlap_one_stays() -> None:
    swarm = view(advert(0, 0), advert(0, 0), advert(4, 4))
    assert hops(mended(swarm, MODEL, [(peer(0), 0, 3), (peer(1), 2, 4)], PlaceOptions())) == [
        (peer(0), 0, 3),
        (peer(2), 3, 4),
    ]


def test_who_is_left_out_fills_no_gap() -> None:
    swarm = view(advert(0, 0), advert(4, 4), advert(2, 2))
    assert hops(mended(swarm, MODEL, [(peer(0), 0, 2)], LOST)) == [(peer(0), 0, 2), (peer(2), 2, 4)]


def test_what_is_said_of_other_blocks_says_nothing_of_a_gap() -> None:
    """The slow worker holds blocks that have the numbers of the gap's, when these are counted from the gap's start."""
    quick, slow = advert(2, 2, read_gb_s=10.0), advert(2, 2, read_gb_s=0.1, spans=(HeldSpan(DEPLOYMENT, 0, 2, 1),))
    swarm = view(advert(0, 0), slow, quick)
    assert hops(mended(swarm, MODEL, [(peer(0), 0, 2)], PlaceOptions())) == [(peer(0), 0, 2), (peer(2), 2, 4)]


def test_a_gap_need_not_be_spread_when_the_whole_is() -> None:
    swarm = view(advert(0, 0), advert(1, 1))
    found = mended(swarm, MODEL, [(peer(0), 0, 3)], PlaceOptions(hops_min=2))
    assert hops(found) == [(peer(0), 0, 3), (peer(1), 3, 4)]


def test_there_is_nothing_to_mend() -> None:
    assert mended(LEFT, MODEL, [], LOST) is None
    assert mended(LEFT, MODEL, [(peer(0), 0, 2), (peer(1), 2, 4)], PlaceOptions()) is None, "no gap: it failed for else"
    assert mended(LEFT, MODEL, [(peer(0), 0, 2)], replace(LOST, hops_min=3)) is None, "it asks for more workers"
    assert mended(LEFT, MODEL, [(peer(2), 1, 2)], PlaceOptions()) is None, "nobody has room for the first block"
    assert mended(view(advert(0, 0), advert(1, 1)), MODEL, [(peer(0), 0, 2)], PlaceOptions()) is None, "no room"


def test_a_route_has_no_more_hops_than_it_may() -> None:
    model = replace(needs(*([1] * (HOPS_MAX + 1))), deployment=DEPLOYMENT)
    swarm = view(*(advert(0) for _ in range(HOPS_MAX)), advert(1))
    standing = [(peer(number), number, number + 1) for number in range(HOPS_MAX)]
    assert mended(swarm, model, standing, PlaceOptions()) is None
    assert (
        mended(
            swarm,
            replace(model, block_bytes=model.block_bytes[1:], kv_bytes_per_token=(0,) * HOPS_MAX),
            standing[1:],
            PlaceOptions(),
        )
        is not None
    )


@settings(max_examples=60, deadline=None)
@given(
    rooms=st.lists(st.integers(0, 4), min_size=1, max_size=6),
    standing=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(1, 3)), max_size=4),
)
def test_every_block_is_there_once_and_each_worker_has_room(
    rooms: list[int], standing: list[tuple[int, int, int]]
) -> None:
    model = replace(needs(*([1] * 6), kv_mib=0.5), deployment=DEPLOYMENT)
    swarm = view(*(advert(room, room / 2) for room in rooms))
    spans = {peer(worker): (start, min(6, start + count)) for worker, start, count in standing if worker < len(rooms)}
    placement = mended(swarm, model, [(who, *span) for who, span in spans.items()], PlaceOptions())
    if placement is None:
        return
    found = hops(placement)
    assert [start for _, start, _ in found] == [0, *(end for _, _, end in found)][:-1]
    assert found[-1][2] == 6
    assert len({who for who, _, _ in found}) == len(found)
    for who, start, end in found:
        assert spans.get(who) == (start, end) or end - start <= rooms[_number(who)]


def _number(who: PeerId) -> int:
    return next(number for number in range(6) if peer(number) == who)
