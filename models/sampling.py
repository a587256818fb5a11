"""From logits to the next token: greedy, or argmax(logits / T + Gumbel(seed, position)) after top-k and top-p.

Invariant: the token depends on (logits, params, position) alone. The noise comes from a counter-based stream (Philox,
key = seed, counter = position), so a run that is cut, resumed, batched or speculated gives the same tokens for a seed.
Adding Gumbel noise and taking the argmax draws exactly from the softmax (the Gumbel-max trick). No state, no torch
generator, no stop conditions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose. Raises ValueError, naming the field, on values that cannot be meant."""

    temperature: float = 0.0  # 0 is greedy: top_k, top_p and seed then have no effect
    top_k: int = 0  # keep the k likeliest; 0 keeps all
    top_p: float = 1.0  # keep the fewest likeliest tokens that together have this probability; 1 keeps all
    seed: int = 0  # 64 bits

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be 0 or more, not {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (all) or more, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], not {self.top_p}")
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"seed must lie in 0..2^64-1, not {self.seed}")


def sample(logits: Tensor, params: SamplingParams, position: int) -> int:
    """The token id to put at `position` (counted from the prompt's first token, from 0), given logits [V].

    In float64 whatever the logits' dtype. Equal values: the lowest id wins, in the filters too. Raises ValueError when
    a logit is NaN or +infinity (-infinity bans a token) or when none is left.
    """
    if logits.dim() != 1 or logits.numel() == 0:
        raise ValueError(f"logits must be [V], not {list(logits.shape)}")
    values: _Floats = logits.detach().double().cpu().numpy()
    best = int(values.argmax())  # numpy: NaN counts as largest, the first of equals is taken
    if not np.isfinite(values[best]):
        raise ValueError("logits are not numbers: no token can be chosen")
    if params.temperature == 0:
        return best
    # shifted first, so that a tiny temperature gives -infinity to the others and leaves the best at 0
    with np.errstate(over="ignore"):
        scaled = (values - values[best]) / params.temperature
    kept = _top_p(_top_k(scaled, params.top_k), params.top_p)
    return int((kept + gumbel(params.seed, position, len(kept))).argmax())


def gumbel(seed: int, position: int, count: int) -> _Floats:
    """`count` standard Gumbel variates for one position of one seed.

    Raw 64-bit words are made into uniforms here, since numpy promises the words of a bit generator for ever and the
    floats of a Generator not. `position` sits in the counter's second word: the first one counts the words drawn.
    """
    noise: _Floats = -np.log(-np.log(_uniform(np.random.Philox(key=seed, counter=position << 64).random_raw(count))))
    return noise


def _uniform(words: npt.NDArray[np.uint64]) -> _Floats:
    """Inside (0, 1): at an end the noise would be infinite, and choose a token that was ruled out. The largest word and
    a half rounds to 2^53."""
    uniform: _Floats = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return np.minimum(uniform, 1 - 2.0**-53)


def _top_k(scaled: _Floats, k: int) -> _Floats:
    if k == 0 or k >= len(scaled):
        return scaled
    return _only(scaled, _ranked(scaled)[:k])


def _top_p(scaled: _Floats, p: float) -> _Floats:
    """Keeps tokens from the likeliest down until their probability reaches p: the one that crosses it is kept."""
    if p == 1.0:
        return scaled
    order = _ranked(scaled)
    weights = np.exp(scaled[order])
    before = np.cumsum(weights) - weights  # of the tokens ahead of each
    return _only(scaled, order[before < p * weights.sum()])


def _ranked(scaled: _Floats) -> npt.NDArray[np.intp]:
    """Ids from the likeliest down; equals by id."""
    return np.argsort(-scaled, kind="stable")


def _only(scaled: _Floats, ids: npt.NDArray[np.intp]) -> _Floats:
    kept = np.full_like(scaled, -np.inf)
    kept[ids] = scaled[ids]
    return kept
