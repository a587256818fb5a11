"""Answers that are dictated: the model computes everything, and what it should have said is taken.

So an answer does not depend on what a model is capable of, and speed can be measured on models of random weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from models.sampling import SamplingParams, sample


@dataclass(frozen=True, slots=True)
class Dictated:
    """The answer `ids` to a prompt of so many tokens."""

    prompt_tokens: int
    ids: Sequence[int]

    def choose(self, logits: Tensor, params: SamplingParams, position: int) -> int:
        """What was dictated for `position`, after as much work as a choice takes."""
        sample(logits, params, position)
        return self.ids[position - self.prompt_tokens]
