"""Placement: covers exactly, never exceeds memory, optimal on small swarms, and says what is missing."""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.placement import ModelNeeds, Placement, PlaceOptions, alone, could_fit, lower_bound_ms, plan
from client.placement.arrays import Floats
from client.placement.distances import rtt_matrix_ms
from client.placement.plan import PlannedHop
from client.placement.search import EXACT_WORKERS
from protocol.adverts import Advert, HeldSpan, Rtt, Speed, peer_tag
from protocol.errors import InputError, RouteUnavailable
from protocol.ids import DeploymentId, PeerId
from protocol.limits import HOPS_MAX
from protocol.swarm import Member, SwarmView
from tests.helpers.adverts import advert, peer, view
from tests.helpers.placing import Judge, needs


def spans(placement: Placement) -> list[tuple[int, int]]:
    return [(hop.start, hop.end) for hop in placement.hops]


offers = st.builds(
    advert,
    memory_mib=st.integers(0, 8),
    kv_mib=st.integers(0, 8),
    disk_mib=st.sampled_from([1.0, 4.0, 1024.0]),
    read_gb_s=st.sampled_from([0.1, 0.5, 1.0, 2.0, 16.0]),
    relayed=st.booleans(),
    accepting=st.sampled_from([True, True, True, False]),
    load_percent=st.sampled_from([0, 0, 50, 100]),
)
models = st.builds(
    lambda sizes, kv_mib: needs(*sizes, kv_mib=kv_mib),
    st.lists(st.integers(1, 3), min_size=1, max_size=8),
    st.sampled_from([0.0, 0.5, 2.0]),
)
delays = st.sampled_from([0.2, 1.0, 5.0, 40.0, 300.0])


@st.composite
def swarms(draw: st.DrawFn, workers: int, model: st.SearchStrategy[ModelNeeds] = models) -> Judge:
    """A few workers of any kind, whose adverts state all round trips, each by one or both ends."""
    adverts = draw(st.lists(offers, min_size=1, max_size=workers))
    swarm = SwarmView()
    for number, each in enumerate(adverts):
        rtts = tuple(
            Rtt(peer_tag(peer(other)), draw(delays)) for other in range(len(adverts)) if other < number
        )  # of the second of each pair
        rtts += tuple(
            Rtt(peer_tag(peer(other)), 1.0) for other in range(number + 1, len(adverts)) if draw(st.booleans())
        )
        swarm = swarm.with_advert(peer(number), replace(each, rtts=rtts), peer(number), each.issued_ms)
    client: dict[PeerId, float] = {}
    if draw(st.booleans()):
        client = {peer(number): draw(delays) for number in range(len(adverts))}
    elif len(adverts) > 1:  # what a client that measured nothing expects is tested below
        client = {peer(number): 1.0 for number in range(len(adverts))}
    concurrency, client_s = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([0.0, 0.0, 0.005, 0.05]))
    return Judge(swarm, draw(model), client, concurrency, client_s)


@settings(max_examples=120, deadline=None)
@given(swarms(4))
def test_the_exact_search_agrees_with_brute_force(judge: Judge) -> None:
    agree(judge, "latency")


@settings(max_examples=80, deadline=None)
@given(swarms(4))
def test_the_best_rate_agrees_with_brute_force(judge: Judge) -> None:
    agree(judge, "throughput")


@settings(max_examples=6, deadline=None)
@given(swarms(5, st.builds(lambda sizes: needs(*sizes), st.lists(st.integers(1, 3), min_size=8, max_size=8))))
def test_the_exact_search_agrees_with_brute_force_on_five_workers_and_eight_blocks(judge: Judge) -> None:
    agree(judge, "latency")


def agree(judge: Judge, objective: str) -> None:
    client = {"client_rtts_ms": judge.client_rtts_ms, "client_s": judge.client_s}
    options = PlaceOptions(objective, judge.concurrency, **client)  # type: ignore[arg-type]
    expected = judge.best_s(objective)
    if math.isinf(expected):
        with pytest.raises(RouteUnavailable):
            plan(judge.swarm, judge.model, options)
        return
    placement = plan(judge.swarm, judge.model, options)
    judge.check(placement)
    chain = judge.chain(placement)
    rounding_ms = 0.002 * (len(chain) + 1)
    assert placement.predicted_ms_per_token == pytest.approx(judge.latency_s(chain) * 1000, abs=rounding_ms)
    assert placement.period_ms == pytest.approx(judge.period_s(chain) * 1000, abs=rounding_ms)
    found = judge.latency_s(chain) if objective == "latency" else judge.period_s(chain)
    assert found == pytest.approx(expected, rel=1e-6)
    assert placement.exact
    assert lower_bound_ms(judge.swarm, judge.model, placement, options) <= expected * 1000 + rounding_ms


@settings(max_examples=60, deadline=None)
@given(
    st.lists(offers, min_size=3, max_size=16),
    st.integers(1, 3),
    st.integers(1, 12),
    st.sampled_from(["latency", "throughput"]),
)
def test_any_placement_covers_exactly_within_memory(
    adverts: list[Advert], hops_min: int, blocks: int, objective: str
) -> None:
    swarm, model = view(*adverts), needs(*[1.0] * max(blocks, hops_min), kv_mib=0.25)
    options = PlaceOptions(objective, concurrency=2, hops_min=hops_min)  # type: ignore[arg-type]
    try:
        placement = plan(swarm, model, options)
    except RouteUnavailable:
        return
    Judge(swarm, model, concurrency=2).check(placement)
    assert len(placement.hops) >= hops_min


@settings(max_examples=40, deadline=None)
@given(swarms(4), st.integers(0, 3), st.integers(1, 8))
def test_more_memory_never_makes_it_slower(judge: Judge, number: int, more_mib: int) -> None:
    options = PlaceOptions(client_rtts_ms=judge.client_rtts_ms)
    try:
        before = plan(judge.swarm, judge.model, options)
    except RouteUnavailable:
        return
    member = judge.swarm.ranked()[number % len(judge.swarm.members)]
    more = more_mib << 20
    richer = replace(
        member.advert,
        memory_bytes=member.advert.memory_bytes + more,
        memory_free_bytes=member.advert.memory_free_bytes + more,
        disk_free_bytes=member.advert.disk_free_bytes + more,
    )
    after = plan(judge.swarm.with_advert(member.peer, richer, member.peer, richer.issued_ms), judge.model, options)
    assert after.predicted_ms_per_token <= before.predicted_ms_per_token + 0.002 * (len(after.hops) + 1)


def test_a_worker_without_room_on_its_disk_is_passed_over() -> None:
    swarm = view(advert(read_gb_s=20, disk_mib=1), advert(read_gb_s=5))
    assert [hop.peer for hop in plan(swarm, needs(2, 2)).hops] == [peer(1)]


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


def test_spreading_over_more_than_a_route_may_have_asks_for_fewer() -> None:
    with pytest.raises(InputError, match="at most 64 workers, 65 were asked for; ask for fewer"):
        plan(view(*[advert()] * 65), needs(*[1] * 80), PlaceOptions(hops_min=65))


@pytest.mark.parametrize("options", [PlaceOptions(hops_min=0), PlaceOptions(concurrency=0)])
def test_no_workers_or_no_streams_ask_for_one(options: PlaceOptions) -> None:
    with pytest.raises(InputError, match="ask for at least 1 of each"):
        plan(view(advert()), needs(1), options)


@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_a_model_that_needs_more_hops_than_a_route_may_have_asks_for_larger_workers(objective: str) -> None:
    swarm, options = view(*[advert(1)] * (HOPS_MAX + 2)), PlaceOptions(objective, concurrency=64)  # type: ignore[arg-type]
    fits, too_long = (needs(*[1] * blocks) for blocks in (HOPS_MAX, HOPS_MAX + 1))
    assert len(plan(swarm, fits, options).hops) == HOPS_MAX
    assert could_fit(swarm, fits, options)
    assert not could_fit(swarm, too_long, options)
    with pytest.raises(RouteUnavailable, match=r"64 with most room hold at most 64 of the model's 65 blocks.*--memory"):
        plan(swarm, too_long, options)


def test_a_rate_is_not_sought_over_more_hops_than_a_route_may_have() -> None:
    """The quick small workers alone could take all blocks, in too many hops: a slow large one takes some."""
    blocks = HOPS_MAX + 6
    swarm = view(*[advert(1)] * blocks, *[advert(16, read_gb_s=0.5)] * 2)
    placement = plan(swarm, needs(*[1] * blocks), PlaceOptions("throughput", concurrency=1000))
    Judge(swarm, needs(*[1] * blocks)).check(placement)
    assert len(placement.hops) <= HOPS_MAX


def test_too_few_workers_with_room_to_spread_over_says_how_many_have_some() -> None:
    swarm = view(advert(8), advert(0), advert(0))
    with pytest.raises(RouteUnavailable, match=r"1 of the swarm's 3 workers have room.*2 needed.*or ask for fewer"):
        plan(swarm, needs(1, 1), PlaceOptions(hops_min=2))


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


def test_too_little_room_on_disks_says_so() -> None:
    with pytest.raises(RouteUnavailable, match=r"needs 8.0 MiB.*6.0 MiB are missing.*--memory and --disk$"):
        plan(view(advert(disk_mib=2)), needs(*[1] * 8))


def test_too_little_room_for_kv_says_so() -> None:
    with pytest.raises(RouteUnavailable, match=r"needs 8.0 MiB for its KV cache.*6.0 MiB are missing.*--kv-memory"):
        plan(view(advert(kv_mib=2)), needs(*[1] * 4, kv_mib=2))


def test_memory_in_pieces_too_small_for_a_block_says_so() -> None:
    with pytest.raises(RouteUnavailable, match="not in pieces that fit whole blocks"):
        plan(view(*[advert(3)] * 4), needs(4, 4))


def test_many_workers_still_get_a_placement() -> None:
    adverts = [advert(1 + number % 3, read_gb_s=1 + number % 7) for number in range(4 * EXACT_WORKERS)]
    swarm = view(*adverts)
    for blocks in (12, 60):
        model = needs(*[1] * blocks)
        placement = plan(swarm, model)
        Judge(swarm, model).check(placement)
        assert not placement.exact
        bound_ms = lower_bound_ms(swarm, model, placement, PlaceOptions())
        assert 0 < bound_ms <= placement.predicted_ms_per_token


def test_equal_inputs_give_equal_placements() -> None:
    adverts = [advert(4)] * 6
    model = needs(*[1] * 12)
    forwards = view(*adverts)
    backwards = SwarmView()
    for member in reversed(forwards.ranked()):
        backwards = backwards.with_advert(member.peer, member.advert, member.peer, member.advert.issued_ms)
    assert plan(forwards, model) == plan(backwards, model)


@pytest.mark.parametrize(
    ("compute_us", "least"), [((10, 20, 10), 1), ((900, 900, 900), 4), ((2500, 600, 2500), 7), ((9_000_000, 1, 1), 16)]
)
def test_requests_are_parted_over_the_hops_unless_rows_are_cheap_beside_weights(
    compute_us: tuple[int, ...], least: int
) -> None:
    hops = tuple(PlannedHop(peer(at), at, at + 1, 1, 1, us, 1, 1, 1) for at, us in enumerate(compute_us))
    assert Placement(hops, 1).micro_batches == 3
    assert Placement(hops, 1).micro_batch_min == least


def test_a_busy_machines_rows_are_as_slow_as_its_products() -> None:
    idle, busy = (plan(view(advert(load_percent=load)), needs(*[4] * 4)) for load in (0, 90))
    assert busy.hops[0].compute_us > 9 * idle.hops[0].compute_us
    assert busy.micro_batch_min == idle.micro_batch_min


def test_paused_workers_are_passed_over_and_named() -> None:
    swarm = view(advert(read_gb_s=20, accepting=False), advert(read_gb_s=5))
    assert [hop.peer for hop in plan(swarm, needs(1, 1)).hops] == [peer(1)]
    with pytest.raises(RouteUnavailable, match=r"2 workers found \(1 of them paused\), 2 needed"):
        plan(swarm, needs(1, 1), PlaceOptions(hops_min=2))


def test_a_relayed_worker_loses_to_a_direct_one_that_is_a_little_slower() -> None:
    swarm = view(advert(read_gb_s=10, relayed=True), advert(read_gb_s=9))
    assert plan(swarm, needs(*[4] * 4)).hops[0].peer == peer(1)
    far_slower = view(advert(read_gb_s=10, relayed=True), advert(read_gb_s=0.1))
    assert plan(far_slower, needs(*[4] * 4)).hops[0].peer == peer(0)


def test_a_busy_worker_counts_as_a_slower_one() -> None:
    swarm = view(advert(read_gb_s=10, load_percent=80), advert(read_gb_s=5), advert(read_gb_s=9, load_percent=100))
    assert plan(swarm, needs(*[4] * 4)).hops[0].peer == peer(1)


def test_the_nearest_worker_wins_by_what_the_client_measured() -> None:
    swarm = view(advert(rtts_ms=(1.0,)), advert(rtts_ms=(90.0,)))
    client = {peer(0): 80.0, peer(1): 4.0}
    assert plan(swarm, needs(*[4] * 4), PlaceOptions(client_rtts_ms=client)).hops[0].peer == peer(1)


def test_measured_block_times_of_the_deployment_count_before_the_machines_speed() -> None:
    deployment = DeploymentId(b"d" * 16)
    model = replace(needs(*[4] * 4), deployment=deployment)
    slow_in_truth = advert(read_gb_s=100, spans=(HeldSpan(deployment, 1, 3, 9_000),))
    assert plan(view(slow_in_truth, advert(read_gb_s=10)), model).hops[0].peer == peer(1)
    other = advert(read_gb_s=100, spans=(HeldSpan(DeploymentId(b"o" * 16), 1, 3, 9_000),))
    assert plan(view(other, advert(read_gb_s=10)), model).hops[0].peer == peer(0)


def test_order_follows_the_round_trips() -> None:
    """Two sites far apart, two workers at each, all needed: the way goes over once and comes back once."""
    site = {0: 0.0, 1: 80.0, 2: 0.0, 3: 80.0}
    swarm = SwarmView()
    for number, place in site.items():
        rtts = tuple(Rtt(peer_tag(peer(o)), 2.0 + abs(place - at)) for o, at in site.items() if o != number)
        swarm = swarm.with_advert(peer(number), replace(advert(4), rtts=rtts), peer(number), 0)
    client = {peer(number): 50.0 for number in site}
    placement = plan(swarm, needs(*[4] * 4), PlaceOptions(client_rtts_ms=client))
    places = [site[number] for hop in placement.hops for number in site if peer(number) == hop.peer]
    assert places in ([0.0, 0.0, 80.0, 80.0], [80.0, 80.0, 0.0, 0.0])
    assert placement.network_ms == pytest.approx((50 + 2 + 82 + 2 + 50) / 2, abs=0.01)


def test_many_streams_spread_over_more_workers_than_one() -> None:
    swarm, model = view(*[advert(64, read_gb_s=0.5)] * 4), needs(*[8] * 8)
    assert len(plan(swarm, model).hops) == 1
    rate = plan(swarm, model, PlaceOptions("throughput", concurrency=16))
    assert len(rate.hops) == 4
    assert rate.predicted_tokens_per_second > 3 * plan(swarm, model).predicted_tokens_per_second
    assert len(plan(swarm, model, PlaceOptions("throughput", concurrency=1)).hops) == 1


@pytest.mark.parametrize(("workers", "client_s", "hops"), [(4, 0.2, 1), (4, 0.06, 3), (12, 0.2, 1), (12, 0.06, 3)])
def test_many_streams_spread_no_further_than_the_client_keeps_up(workers: int, client_s: float, hops: int) -> None:
    """More hops than make each as fast as the client would give no token more, and each later."""
    swarm, model = view(*[advert(64, read_gb_s=0.5)] * workers), needs(*[8] * 8)
    options = PlaceOptions("throughput", concurrency=16, client_s=client_s)
    placement = plan(swarm, model, options)
    assert len(placement.hops) == hops
    assert placement.period_ms == pytest.approx(client_s * 1000)
    assert lower_bound_ms(swarm, model, placement, options) == pytest.approx(placement.period_ms)


def test_of_single_workers_that_keep_up_with_the_client_the_fastest_counts() -> None:
    swarm, options = view(advert(read_gb_s=1), advert(read_gb_s=2)), PlaceOptions("throughput", 16, client_s=0.2)
    single = alone(swarm, needs(*[8] * 4), options)
    assert single is not None
    assert [hop.peer for hop in single.hops] == [peer(1)]


def test_concurrency_asks_for_room_for_every_stream() -> None:
    swarm, model = view(advert(kv_mib=8)), needs(*[1] * 4, kv_mib=1)
    assert plan(swarm, model, PlaceOptions(concurrency=2)).hops[0].kv_bytes == 8 << 20
    with pytest.raises(RouteUnavailable, match="KV cache"):
        plan(swarm, model, PlaceOptions(concurrency=3))


def test_an_unknown_objective_names_the_known() -> None:
    with pytest.raises(InputError, match="latency, throughput"):
        plan(view(advert()), needs(1), PlaceOptions("speed"))  # type: ignore[arg-type]


def test_one_worker_alone_or_none() -> None:
    swarm = view(advert(4, read_gb_s=50), advert(16, read_gb_s=1), advert(16, read_gb_s=2))
    single = alone(swarm, needs(*[4] * 4))
    assert single is not None
    assert [hop.peer for hop in single.hops] == [peer(2)]
    assert alone(swarm, needs(*[4] * 5)) is None


def test_of_very_many_workers_the_measured_and_the_roomiest_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["client.placement.plan"]
    counts: list[int] = []

    def noted(members: list[Member], rtts_ms: dict[PeerId, float]) -> Floats:
        counts.append(len(members))
        return rtt_matrix_ms(members, rtts_ms)

    monkeypatch.setattr(module, "WORKERS_MAX", 3)
    monkeypatch.setattr(module, "rtt_matrix_ms", noted)
    swarm, model = view(*[advert(memory) for memory in (4, 5, 9, 6, 8, 7)]), needs(4, 4, 4)
    assert {hop.peer for hop in plan(swarm, model).hops} <= {peer(2), peer(4), peer(5)}
    options = PlaceOptions(client_rtts_ms={peer(0): 1.0}, hops_min=3)
    assert {hop.peer for hop in plan(swarm, model, options).hops} == {peer(0), peer(2), peer(4)}
    assert counts == [3, 3]


def test_very_many_workers_without_kv_memory_keep_nobody_from_being_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["client.placement.plan"], "WORKERS_MAX", 3)
    full = [advert(64, kv_mib=0) for _ in range(3)]
    placement = plan(view(*full, advert(5, kv_mib=4)), needs(4, kv_mib=1))
    assert [hop.peer for hop in placement.hops] == [peer(3)]
    assert not placement.exact, "not all were looked at"
