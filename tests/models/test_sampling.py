"""Sampling: the distribution, the filters' supports, determinism, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from models.sampling import SamplingParams, _uniform, gumbel, sample

LOGITS = torch.tensor([1.0, -0.5, 2.0, 0.3, 2.0, -3.0, 0.9, 1.7], dtype=torch.float64)


def draws(logits: Tensor, params: SamplingParams, count: int) -> list[int]:
    return [sample(logits, params, position) for position in range(count)]


def counts(logits: Tensor, params: SamplingParams, count: int) -> Tensor:
    return torch.bincount(torch.tensor(draws(logits, params, count)), minlength=len(logits)).double()


def chi_square(observed: Tensor, probabilities: Tensor) -> float:
    expected = probabilities * observed.sum()
    return float(((observed - expected).square() / expected).sum())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_follow_the_softmax(temperature: float) -> None:
    """7 degrees of freedom: 24.3 is exceeded once in a thousand. A seed's stream over positions is what is drawn."""
    observed = counts(LOGITS, SamplingParams(temperature=temperature, seed=11), 20_000)
    assert chi_square(observed, torch.softmax(LOGITS / temperature, 0)) < 24.3
    other = torch.softmax(LOGITS / (temperature * 1.2), 0)
    assert chi_square(observed, other) > 24.3


def test_seeds_are_independent_draws() -> None:
    tokens = torch.tensor([sample(LOGITS, SamplingParams(temperature=1.0, seed=seed), 5) for seed in range(20_000)])
    observed = torch.bincount(tokens, minlength=len(LOGITS)).double()
    assert chi_square(observed, torch.softmax(LOGITS, 0)) < 24.3


def test_filters_leave_the_rest_in_proportion() -> None:
    observed = counts(LOGITS, SamplingParams(temperature=1.0, top_k=4, seed=2), 20_000)
    kept = [2, 4, 7, 0]
    assert {token for token in range(8) if observed[token]} == set(kept)
    assert chi_square(observed[kept], torch.softmax(LOGITS[kept], 0)) < 16.3  # 3 degrees of freedom, one in a thousand


@pytest.mark.parametrize(
    ("params", "support"),
    [
        ({"top_k": 1}, {2}),
        ({"top_k": 2}, {2, 4}),
        ({"top_k": 3}, {2, 4, 7}),
        ({"top_k": 100}, set(range(8))),
        ({"top_p": 1e-9}, {2}),
        # probabilities from the likeliest: 0.27, 0.27, 0.20, 0.10, 0.09, ...
        ({"top_p": 0.26}, {2}),
        ({"top_p": 0.30}, {2, 4}),
        ({"top_p": 0.80}, {2, 4, 7, 0}),
        ({"top_p": 0.80, "top_k": 3}, {2, 4, 7}),
        # after top-k 3 the probabilities are 0.365, 0.365, 0.27
        ({"top_p": 0.70, "top_k": 3}, {2, 4}),
    ],
)
def test_supports(params: dict[str, Any], support: set[int]) -> None:
    # the least likely token has probability 0.0018: 6000 draws miss it twice in 100,000 seeds
    assert set(draws(LOGITS, SamplingParams(temperature=1.0, seed=4, **params), 6000)) == support


def test_greedy_takes_the_first_of_the_largest() -> None:
    assert sample(LOGITS, SamplingParams(), 0) == 2
    assert sample(LOGITS.flip(0), SamplingParams(top_k=1, top_p=0.1, seed=9), 7) == 3
    assert sample(torch.zeros(151_936, dtype=torch.bfloat16), SamplingParams(), 0) == 0


def test_ties_in_the_filters_go_to_the_lowest_ids() -> None:
    flat = torch.zeros(10)
    mixed = (torch.arange(1000) % 3 == 0).float()
    assert set(draws(mixed, SamplingParams(temperature=1.0, top_k=3), 400)) == {0, 3, 6}
    assert set(draws(torch.zeros(4), SamplingParams(temperature=1.0, top_p=0.5), 400)) == {0, 1}
    assert set(draws(flat, SamplingParams(temperature=1.0, top_p=0.25), 400)) == {0, 1, 2}


def test_a_token_depends_on_seed_and_position_alone() -> None:
    params = SamplingParams(temperature=1.0, seed=3)
    forward = [sample(LOGITS, params, position) for position in range(50)]
    backward = [sample(LOGITS, params, position) for position in reversed(range(50))]
    assert forward == backward[::-1]
    assert forward != draws(LOGITS, SamplingParams(temperature=1.0, seed=4), 50)
    assert len(set(forward)) > 3


def test_the_dtype_of_equal_logits_does_not_matter() -> None:
    rounded = LOGITS.to(torch.bfloat16)
    params = SamplingParams(temperature=0.8, top_p=0.9, seed=1)
    assert draws(rounded, params, 50) == draws(rounded.double(), params, 50) == draws(rounded.float(), params, 50)


def test_the_noise_is_pinned() -> None:
    """A second implementation can be checked against these; a changed stream would change every seed's answers."""
    words = np.random.Philox(key=5, counter=[0, 3, 0, 0]).random_raw(2)
    assert words.tolist() == [15088074416744545301, 11650187046172378219]
    expected = [-math.log(-math.log(((word >> 11) + 0.5) / 2**53)) for word in words.tolist()]
    np.testing.assert_allclose(gumbel(5, 3, 2), expected, rtol=1e-14)
    # positions do not overlap, however many words one takes
    assert not set(gumbel(5, 3, 4000).tolist()) & set(gumbel(5, 4, 4000).tolist())
    assert gumbel(2**64 - 1, 2**40, 3).shape == (3,)


def test_no_noise_is_infinite() -> None:
    ends = _uniform(np.array([0, 2**64 - 1], dtype=np.uint64))
    assert 0 < ends[0] < ends[1] < 1
    assert np.isfinite(-np.log(-np.log(ends))).all()


def test_a_tiny_temperature_is_greedy_and_a_ban_holds() -> None:
    assert sample(LOGITS * 1e30, SamplingParams(temperature=5e-324), 0) in (2, 4)
    banned = LOGITS.clone()
    banned[[2, 4, 7]] = -torch.inf
    assert set(draws(banned, SamplingParams(temperature=1.0, seed=1), 2000)) == {0, 1, 3, 5, 6}


@pytest.mark.parametrize("bad", [[1.0, float("nan")], [float("inf"), 1.0], [-float("inf")] * 2, [], [[1.0]]])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_refused(bad: list[Any], temperature: float) -> None:
    with pytest.raises(ValueError, match="logits"):
        sample(torch.tensor(bad), SamplingParams(temperature=temperature), 0)


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_p": float("nan")},
        {"seed": -1},
        {"seed": 1 << 64},
    ],
)
def test_parameters_that_cannot_be_meant_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        SamplingParams(**values)
