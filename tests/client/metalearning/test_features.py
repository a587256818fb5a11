"""Features: extraction from a prompt, a model and a route, by hand-made examples."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from client.metalearning.features import (
    PIECE_TOKENS,
    STATED_MAX,
    PrefixMemory,
    RouteFeatures,
    model_features,
    repetition,
    route_features,
)
from client.placement import ModelNeeds, PlaceOptions, priced
from protocol.adverts import Advert
from tests.helpers.adverts import MIB, advert, peer, view
from tests.helpers.records import BLOCK, CONFIG


def test_a_model() -> None:
    found = model_features(CONFIG, "bfloat16")
    assert (found.family, found.layers, found.width, found.heads, found.kv_heads) == ("llama", 4, 64, 4, 2)
    assert found.parameters == 4 * BLOCK.num_parameters
    assert found.weight_bytes == 2.0
    assert model_features(CONFIG, "int4").weight_bytes == 0.5
    assert model_features(CONFIG, None).weight_bytes == 0.0


@pytest.mark.parametrize(
    ("ids", "share"),
    [
        ([], 0.0),
        ([1, 2], 0.0),
        ([1, 2, 3, 4, 5], 0.0),
        ([1, 1, 1, 1, 1], 0.6667),  # three 3-grams, all the same: two of them are repetitions
        ([1, 2, 3, 4, 1, 2, 3, 4], 0.3333),  # six, of which two came before
    ],
)
def test_repetition(ids: list[int], share: float) -> None:
    assert repetition(ids) == share


def test_a_shared_prefix_is_found_page_by_page() -> None:
    memory = PrefixMemory()
    first = list(range(3 * PIECE_TOKENS))
    assert memory.share(first) == 0.0
    assert memory.share(first) == 1.0
    assert memory.share(first[: 2 * PIECE_TOKENS] + [9] * 2 * PIECE_TOKENS) == 0.5
    assert memory.share([7, *first]) == 0.0  # the same text, but not at the beginning
    assert memory.share([*first[:PIECE_TOKENS], 8]) == pytest.approx(PIECE_TOKENS / (PIECE_TOKENS + 1), abs=1e-4)
    assert memory.share([]) == 0.0
    assert memory.share([1] * (PIECE_TOKENS - 1)) == 0.0


def test_what_a_middle_page_was_counts_only_after_the_same_beginning() -> None:
    memory = PrefixMemory()
    a, b, c = ([number] * PIECE_TOKENS for number in (1, 2, 3))
    memory.share(a + c)
    memory.share(c + b)
    assert memory.share(a + b) == 0.5  # b was seen, but never after a
    assert memory.share(b + b) == 0.0


def test_the_memory_is_bounded_and_the_oldest_are_forgotten() -> None:
    memory = PrefixMemory(pages_max=4)
    old = list(range(2 * PIECE_TOKENS))
    memory.share(old)
    for start in range(100, 105):
        memory.share([start] * PIECE_TOKENS)
    assert memory.share(old) == 0.0


def route(*adverts: Advert, mbit_s: Sequence[float] = ()) -> RouteFeatures:
    """Of a route over workers with these adverts, the blocks shared evenly; the first is 4 ms away, the last 8 ms, and
    of the first ones it was measured how fast they take shards."""
    swarm, count = view(*adverts), len(adverts)
    needs = ModelNeeds.of_configs(CONFIG.blocks, "float32", 100)
    spans = [(peer(number), number * 4 // count, (number + 1) * 4 // count) for number in range(count)]
    rtts_ms = {peer(0): 4.0, peer(count - 1): 8.0}
    placement = priced(swarm, needs, spans, PlaceOptions(client_rtts_ms=rtts_ms))
    inflow = {peer(number): value for number, value in enumerate(mbit_s)}
    return route_features(swarm, placement, needs, rtts_ms, inflow)


def test_a_route() -> None:
    found = route(advert(kv_mib=2, read_gb_s=5.0), advert(kv_mib=1, load_percent=50, relayed=True))
    assert (found.hops, found.relayed, found.load_percent_max, found.gpus) == (2, 1, 50, 0)
    assert len(found.span_us) == 2
    assert found.compute_us == sum(found.span_us) > found.compute_us_max == max(found.span_us)
    assert found.leg_rtt_ms[0] == 4.0
    assert found.leg_rtt_ms[-1] == 8.0
    assert found.rtt_ms == pytest.approx(sum(found.leg_rtt_ms) / 2, abs=1e-3)
    assert found.rtt_ms_max == max(found.leg_rtt_ms)
    assert found.read_gb_s_min == 5.0
    assert found.kv_free_tokens == MIB // (2 * 4 * BLOCK.kv_values_per_token)  # two blocks in float32, 1 MiB


def test_a_route_of_one_hop_has_two_legs() -> None:
    assert len(route(advert()).leg_rtt_ms) == 2


def test_the_bandwidth_is_that_of_the_slowest_hop_of_which_it_is_known() -> None:
    assert route(advert(), advert()).bandwidth_mbit_s is None
    assert route(advert(), advert(), mbit_s=[80.0]).bandwidth_mbit_s == 80.0
    assert route(advert(), advert(), mbit_s=[80.0, 20.0, 5.0]).bandwidth_mbit_s == 20.0  # the third is not on it
    assert route(advert(), mbit_s=[1e300]).bandwidth_mbit_s == STATED_MAX  # a worker tells how much it has by now


def test_a_worker_that_states_no_speed_counts_as_unknown() -> None:
    assert route(advert(), advert(read_gb_s=0)).read_gb_s_min == 0.0
