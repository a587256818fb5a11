"""How near answers in a lower precision are to those in float32, beside the speed that it gives.

Teacher-forced: the answer is the reference's own, so that every token is chosen after the same text. Prompts are
random, and so may be the weights: their logits lie closer together than a trained model's, so that fewer choices agree.
`sotto bench precision` measures a trained model on text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import trio
from torch import Tensor

from models.sampling import SamplingParams, sample
from node.model import Ask, DeployedModel
from protocol.strategy import Strategy, parse
from simnet.bench.library import Library
from simnet.bench.rig import Rig

PROMPTS = 2
PRIVATE = "prefix_cache=off"  # what one precision computed of a prompt must not serve the next


@dataclass(slots=True)
class Taken:
    """An answer of a model that chooses freely, or is `told` what to say: the logits [V] of each choice."""

    prompt_tokens: int
    told: Sequence[int]
    ids: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)

    def choose(self, logits: Tensor, params: SamplingParams, position: int) -> int:
        """As node.model.Choose."""
        self.logits.append(logits.float().clone())
        self.ids.append(self.told[position - self.prompt_tokens] if self.told else sample(logits, params, position))
        return self.ids[-1]


async def with_float32(rig: Rig) -> dict[str, object]:
    """Sealed, over all hops, beside transformers in float32."""
    model, new = await rig.deployed(), rig.sizes.new_tokens
    own = rig.library_dtype == "float32"
    library = (
        await rig.library() if own else await trio.to_thread.run_sync(partial(Library, rig.bench.model, "float32"))
    )
    expected, got = list[Tensor](), list[Tensor]()
    for prompt in rig.prompts(PROMPTS, rig.sizes.prompt_tokens):
        ids, logits = await trio.to_thread.run_sync(library.greedy, prompt, new)
        expected += logits
        got += (await _taken(model, prompt, Taken(len(prompt), ids), parse(PRIVATE, model.default_strategy))).logits
    return agreement(expected, got)


async def with_float32_wire(rig: Rig, wires: Sequence[str]) -> dict[str, object]:
    """The same deployment over each of `wires`, beside itself over float32."""
    model = await rig.deployed()
    strategies = {
        wire: parse(f"wire={wire},{PRIVATE}", model.default_strategy) for wire in ("float32", *wires)
    }  # fmt: skip
    logits = {wire: list[Tensor]() for wire in strategies}
    for prompt in rig.prompts(PROMPTS, rig.sizes.prompt_tokens):
        told: list[int] = []
        for wire, strategy in strategies.items():
            taken = await _taken(model, prompt, Taken(len(prompt), told), strategy, rig.sizes.new_tokens)
            told, logits[wire] = taken.ids, logits[wire] + taken.logits
    return {wire: agreement(logits["float32"], logits[wire]) for wire in wires}


def agreement(expected: Sequence[Tensor], got: Sequence[Tensor]) -> dict[str, object]:
    """Of the logits [V] of each choice."""
    want, have = torch.stack(list(expected)), torch.stack(list(got))
    return {
        "tokens": len(want),
        "same_token": round(float((want.argmax(-1) == have.argmax(-1)).float().mean()), 4),
        "largest_logit_difference": float(f"{float((want - have).abs().max()):.3g}"),
        "logits_deviation": float(f"{float(want.std()):.3g}"),
    }


async def _taken(
    model: DeployedModel, prompt: list[int], taken: Taken, strategy: Strategy, new_tokens: int = 0
) -> Taken:
    ask = Ask(new_tokens or len(taken.told), ignore_eos=True, strategy=strategy, choose=taken.choose)
    await model.generate(prompt, ask)
    return taken
