"""Round trips that nobody measured, estimated from those that somebody did; and liars among the measurers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from client.placement.arrays import Floats
from client.placement.distances import RTT_UNKNOWN_MS, rtt_matrix_ms
from protocol.adverts import Rtt, peer_tag
from protocol.swarm import Member
from tests.helpers.adverts import advert, peer


def members(rtts: Mapping[int, Mapping[int, float]], count: int) -> list[Member]:
    """Worker i states `rtts[i]`. In the order of their numbers, which matrices here follow."""
    return [
        Member(
            peer(number),
            replace(advert(), rtts=tuple(Rtt(peer_tag(peer(o)), ms) for o, ms in rtts.get(number, {}).items())),
            peer(number),
            until_ms=0,
        )
        for number in range(count)
    ]


def plane(count: int, seed: int) -> Floats:
    """True round trips of points on a plane, each with an access delay, the client last; 1 to about 160 ms."""
    rng = np.random.default_rng(seed)
    points, access = rng.uniform(0, 100, (count + 1, 2)), rng.exponential(3.0, count + 1)
    rtt = np.linalg.norm(points[:, None] - points[None, :], axis=2) + access[:, None] + access[None, :]
    np.fill_diagonal(rtt, 0.0)
    return np.asarray(rtt)


def test_what_was_measured_stands_and_both_ends_take_the_larger() -> None:
    told = members({0: {1: 20.0, 2: 7.0}, 1: {0: 5.0}}, 3)
    matrix = rtt_matrix_ms(told, {peer(0): 11.0})
    assert matrix[0, 1] == matrix[1, 0] == 20.0
    assert matrix[0, 2] == matrix[2, 0] == 7.0
    assert matrix[3, 0] == matrix[0, 3] == 11.0
    assert np.array_equal(matrix, matrix.T)
    assert not matrix.diagonal().any()


def test_nothing_is_known_of_a_swarm_that_measured_nothing() -> None:
    matrix = rtt_matrix_ms(members({}, 3), {})
    assert np.array_equal(matrix, RTT_UNKNOWN_MS * (1 - np.eye(4)))


def test_round_trips_to_peers_unknown_here_tell_how_far_a_worker_is_from_everybody() -> None:
    strangers = members({0: {90: 80.0, 91: 100.0, 92: 90.0}, 1: {93: 4.0}}, 2)
    matrix = rtt_matrix_ms(strangers, {})
    assert matrix[2, 0] == 90.0  # to the client, which measured nothing
    assert matrix[2, 1] == 4.0
    assert matrix[0, 1] == pytest.approx(47.0)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_unmeasured_pairs_are_estimated_well_from_a_few_neighbours(seed: int) -> None:
    count = 60
    truth, rng = plane(count, seed), np.random.default_rng(seed)
    rtts = {n: {int(o): float(truth[n, o]) for o in rng.permutation(count)[:12] if o != n} for n in range(count)}
    client = {peer(n): float(truth[count, n]) for n in range(0, count, 4)}
    told = members(rtts, count)
    estimated = rtt_matrix_ms(told, client)
    assert np.array_equal(estimated, rtt_matrix_ms(told, client))
    upper = np.triu_indices(count + 1, 1)
    errors = np.abs(estimated - truth)[upper] / np.maximum(truth[upper], 5.0)
    assert np.median(errors) < 0.1
    assert np.quantile(errors, 0.9) < 0.5


def test_an_estimate_is_no_longer_than_the_way_over_a_third() -> None:
    told = members({0: {1: 10.0}, 2: {1: 15.0}, 3: {0: 200.0}}, 4)
    assert rtt_matrix_ms(told, {})[0, 2] <= 25.0


def test_who_claims_to_be_next_to_two_does_not_bring_them_together() -> None:
    apart = {0: {3: 50.0, 4: 60.0}, 2: {3: 180.0, 4: 150.0}, 3: {4: 100.0}}
    liar = {1: {0: 0.01, 2: 0.01}}
    assert rtt_matrix_ms(members({**apart, **liar}, 5), {})[0, 2] > 20.0


@pytest.mark.parametrize("claim_ms", [0.01, 50_000.0])
def test_liars_hardly_move_the_others(claim_ms: float) -> None:
    """A tenth of the swarm claims to be next to everybody it names, or infinitely far."""
    count = 60
    truth, rng = plane(count, 4), np.random.default_rng(4)
    rtts = {n: {int(o): float(truth[n, o]) for o in rng.permutation(count)[:12] if o != n} for n in range(count)}
    for liar in range(0, count, 10):
        rtts[liar] = dict.fromkeys(rtts[liar], claim_ms)
    estimated = rtt_matrix_ms(members(rtts, count), {})
    honest = [n for n in range(count) if n % 10]
    pairs = np.ix_(honest, honest)
    upper = np.triu_indices(len(honest), 1)
    errors = np.abs(estimated[pairs] - truth[pairs])[upper] / np.maximum(truth[pairs][upper], 5.0)
    assert np.median(errors) < 0.12
    assert np.quantile(errors, 0.9) < 0.2


def test_absurd_claims_stay_finite() -> None:
    matrix = rtt_matrix_ms(members({0: {1: 1e300, 2: 0.0}, 1: {2: 1e300}}, 4), {peer(3): 1e300})
    assert np.isfinite(matrix).all()
    assert matrix.max() <= 60_000.0
