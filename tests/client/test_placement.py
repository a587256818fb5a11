"""Placement: covers exactly, never exceeds memory, optimal on small swarms, and says what is missing."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.placement import EXACT_WORKERS, HOP_SOFTWARE_S, RTT_UNKNOWN_MS, ModelNeeds, Placement, PlaceOptions, plan
from protocol.adverts import Advert, Speed
from protocol.errors import InputError, RouteUnavailable
from protocol.swarm import SwarmView
from tests.helpers.adverts import MIB, advert, peer, view


def needs(*block_mib: float, kv_mib: float = 0.0) -> ModelNeeds:
    """KV of `kv_mib` for each block, as one token."""
    return ModelNeeds(tuple(int(size * MIB) for size in block_mib), (int(kv_mib * MIB),) * len(block_mib), 1, "float32")


def spans(placement: Placement) -> list[tuple[int, int]]:
    return [(hop.start, hop.end) for hop in placement.hops]


def check(placement: Placement, swarm: SwarmView, model: ModelNeeds) -> None:
    starts = [0, *(hop.end for hop in placement.hops)]
    assert [hop.start for hop in placement.hops] == starts[:-1]
    assert starts[-1] == len(model.block_bytes)
    assert len({hop.peer for hop in placement.hops}) == len(placement.hops)
    for hop in placement.hops:
        offer = swarm.members[hop.peer].advert
        assert hop.end > hop.start
        assert hop.weight_bytes == sum(model.block_bytes[hop.start : hop.end]) <= offer.memory_free_bytes
        assert sum(model.kv_bytes[hop.start : hop.end]) <= offer.kv_free_bytes


def brute_force_ms(swarm: SwarmView, model: ModelNeeds, hops_min: int = 1) -> float:
    """The least predicted time over every order of every subset and every cut; inf when nothing fits."""
    members, blocks = swarm.ranked(), len(model.block_bytes)
    best = math.inf

    def place(order: tuple[int, ...], start: int, seconds: float) -> None:
        nonlocal best
        if not order:
            best = min(best, seconds) if start == blocks else best
            return
        offer = members[order[0]].advert
        for end in range(start + 1, blocks + 1):
            weights, kv = sum(model.block_bytes[start:end]), sum(model.kv_bytes[start:end])
            if weights <= offer.memory_free_bytes and kv <= offer.kv_free_bytes:
                hop_s = HOP_SOFTWARE_S + RTT_UNKNOWN_MS / 2000
                place(order[1:], end, seconds + weights / (offer.speeds[0].read_gb_s * 1e9) + hop_s)

    for count in range(hops_min, len(members) + 1):
        for order in permutations(range(len(members)), count):
            place(order, 0, 0.0)
    return best * 1000


offers = st.builds(
    advert,
    memory_mib=st.integers(0, 8),
    kv_mib=st.integers(0, 8),
    read_gb_s=st.sampled_from([0.1, 0.5, 1.0, 2.0, 16.0]),
)
models = st.builds(
    needs,
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    kv_mib=st.sampled_from([0.0, 0.5, 2.0]),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(offers, min_size=1, max_size=4), models)
def test_the_exact_search_agrees_with_brute_force(adverts: list[Advert], model: ModelNeeds) -> None:
    swarm = view(*adverts)
    expected = brute_force_ms(swarm, model)
    if math.isinf(expected):
        with pytest.raises(RouteUnavailable):
            plan(swarm, model)
        return
    placement = plan(swarm, model)
    check(placement, swarm, model)
    assert placement.predicted_ms_per_token == pytest.approx(expected, abs=0.001 * len(placement.hops))


@settings(max_examples=60, deadline=None)
@given(st.lists(offers, min_size=3, max_size=16), st.integers(1, 3), st.integers(1, 12))
def test_any_placement_covers_exactly_within_memory(adverts: list[Advert], hops_min: int, blocks: int) -> None:
    swarm, model = view(*adverts), needs(*[1.0] * max(blocks, hops_min), kv_mib=0.25)
    try:
        placement = plan(swarm, model, PlaceOptions(hops_min=hops_min))
    except RouteUnavailable:
        return
    check(placement, swarm, model)
    assert len(placement.hops) >= hops_min


def test_with_memory_for_all_one_fast_worker_serves_alone() -> None:
    placement = plan(view(advert(64, read_gb_s=5), advert(64, read_gb_s=20), advert(64, read_gb_s=10)), needs(*[4] * 6))
    assert [hop.peer for hop in placement.hops] == [peer(1)]
    assert placement.bottleneck == peer(1)


def test_a_weak_worker_is_left_out_when_that_is_faster() -> None:
    # The weak one would add its hop and slow the blocks that it takes; the strong two hold everything.
    swarm = view(advert(16, read_gb_s=20), advert(64, read_gb_s=0.05), advert(16, read_gb_s=20))
    placement = plan(swarm, needs(*[4] * 8))
    assert {hop.peer for hop in placement.hops} == {peer(0), peer(2)}


def test_a_weak_worker_gets_only_what_the_others_cannot_hold() -> None:
    swarm = view(advert(12, read_gb_s=20), advert(64, read_gb_s=0.05), advert(12, read_gb_s=20))
    placement = plan(swarm, needs(*[4] * 8))
    blocks = {hop.peer: hop.end - hop.start for hop in placement.hops}
    assert blocks == {peer(0): 3, peer(1): 2, peer(2): 3}
    assert placement.bottleneck == peer(1)


def test_a_distant_worker_loses_to_a_slower_near_one() -> None:
    swarm = view(advert(read_gb_s=20, rtts_ms=(200.0, 180.0, 190.0)), advert(read_gb_s=10, rtts_ms=(2.0,)))
    assert plan(swarm, needs(*[4] * 4)).hops[0].peer == peer(1)


def test_a_worker_that_states_no_speed_comes_last() -> None:
    swarm = view(advert(read_gb_s=0), advert(read_gb_s=2))
    assert plan(swarm, needs(*[4] * 4)).hops[0].peer == peer(1)


def test_arithmetic_bounds_where_it_is_slower_than_memory() -> None:
    slow = replace(advert(), speeds=(Speed("float32", 100.0, 0.5),))
    assert plan(view(slow, advert(read_gb_s=10)), needs(*[4] * 4)).hops[0].peer == peer(1)


def test_the_speed_of_the_deployments_dtype_counts() -> None:
    trap = replace(advert(), speeds=(Speed("float32", 1.0, 1e6), Speed("bfloat16", 90.0, 1e6)))
    assert plan(view(trap, advert(read_gb_s=10)), needs(*[4] * 4)).hops[0].peer == peer(1)


@pytest.mark.parametrize(("blocks", "expected"), [(6, [2, 2, 2]), (8, [3, 3, 2]), (3, [1, 1, 1])])
def test_spreading_gives_even_shares(blocks: int, expected: list[int]) -> None:
    placement = plan(view(advert(), advert(), advert()), needs(*[1] * blocks), PlaceOptions(hops_min=3))
    assert sorted((end - start for start, end in spans(placement)), reverse=True) == expected


def test_spreading_gives_up_even_shares_before_it_gives_up() -> None:
    placement = plan(view(advert(1), advert(64), advert(1)), needs(*[1] * 9), PlaceOptions(hops_min=3))
    assert sorted(end - start for start, end in spans(placement)) == [1, 1, 7]


def test_spreading_over_more_than_there_are_says_how_many_were_found() -> None:
    with pytest.raises(RouteUnavailable, match="2 workers found, 3 needed"):
        plan(view(advert(), advert()), needs(1, 1, 1), PlaceOptions(hops_min=3))
    with pytest.raises(InputError, match="2 blocks cannot be spread over 3"):
        plan(view(advert(), advert(), advert()), needs(1, 1), PlaceOptions(hops_min=3))
    with pytest.raises(RouteUnavailable, match="0 workers found"):
        plan(SwarmView(), needs(1))


def test_excluded_workers_get_nothing() -> None:
    swarm = view(advert(read_gb_s=20), advert(read_gb_s=5))
    placement = plan(swarm, needs(1, 1), PlaceOptions(exclude=frozenset([peer(0)])))
    assert [hop.peer for hop in placement.hops] == [peer(1)]


def test_too_little_memory_says_how_much_is_missing() -> None:
    with pytest.raises(RouteUnavailable) as caught:
        plan(view(advert(10), advert(6.5), advert(3)), needs(*[4] * 8))
    text = str(caught.value)
    assert "needs 32.0 MiB" in text
    assert "3 workers offer 19.5 MiB" in text
    assert "12.5 MiB are missing" in text
    assert "largest worker offers 10.0 MiB" in text
    assert "--memory" in text


def test_too_little_room_for_kv_says_so() -> None:
    with pytest.raises(RouteUnavailable, match=r"needs 8.0 MiB for its KV cache.*6.0 MiB are missing.*--kv-memory"):
        plan(view(advert(kv_mib=2)), needs(*[1] * 4, kv_mib=2))


def test_memory_in_pieces_too_small_for_a_block_says_so() -> None:
    with pytest.raises(RouteUnavailable, match="not in pieces that fit whole blocks"):
        plan(view(*[advert(3)] * 4), needs(4, 4))


def test_many_workers_still_get_a_placement() -> None:
    adverts = [advert(1 + number % 3, read_gb_s=1 + number % 7) for number in range(4 * EXACT_WORKERS)]
    swarm, model = view(*adverts), needs(*[1] * 60)
    check(plan(swarm, model), swarm, model)
    check(plan(swarm, needs(*[1] * 12)), swarm, needs(*[1] * 12))


def test_equal_inputs_give_equal_placements() -> None:
    adverts = [advert(4)] * 6
    model = needs(*[1] * 12)
    forwards = view(*adverts)
    backwards = SwarmView()
    for member in reversed(forwards.ranked()):
        backwards = backwards.with_advert(member.peer, member.advert, member.peer)
    assert plan(forwards, model) == plan(backwards, model)
