"""A deployed model timed for real: per token at the client, and per token at each hop, by what hops say of a step.

Two short generations: one as any request, for the time per token; one that is traced, since only then does each hop
say how long it computed. Greedy; an end of sequence does not stop it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise
from math import inf
from statistics import median

import torch

from client.generate import Generation, GenerationHost, GenerationParams
from client.session import SessionTerms
from client.tracing import StepTrace
from equivariant.ends import ClientEnds
from node.model import DeployedModel, in_thread
from protocol.ids import PeerId

TOKENS = 32
ENDS_RUNS = 3
PROMPT = "The"


@dataclass(frozen=True, slots=True)
class MeasuredHop:
    peer: PeerId
    compute_ms: float  # a token, on average


@dataclass(frozen=True, slots=True)
class Measured:
    """`ms_per_token`: the median time between one token and the next."""

    ms_per_token: float
    hops: tuple[MeasuredHop, ...]


async def measure(model: DeployedModel, tokens: int = TOKENS) -> Measured:
    """Time `tokens` tokens, two at least. Raises what a generation raises."""
    tokens = max(2, min(tokens, model.config.max_position - 8))
    times, _ = await _generate(model, tokens, None)
    gaps = [later - earlier for earlier, later in pairwise(times)]
    _, computes = await _generate(model, tokens, StepTrace())
    hops = zip(model.route.hops, computes, strict=True)
    return Measured(median(gaps) * 1000, tuple(MeasuredHop(hop.peer, compute_ms) for hop, compute_ms in hops))


def time_ends(ends: ClientEnds) -> float:
    """Seconds that the client itself takes per token: its embedding, norm and head; the best of a few."""
    hidden = torch.zeros(1, ends.embedding.shape[1])
    best = inf
    for _ in range(ENDS_RUNS):
        started = time.perf_counter()
        ends.embed([0])
        ends.logits(hidden)
        best = min(best, time.perf_counter() - started)
    return best


async def _generate(model: DeployedModel, tokens: int, trace: StepTrace | None) -> tuple[list[float], list[float]]:
    """Times of the tokens, and each hop's mean milliseconds over the decoding steps that it told of."""
    ids = model.tokenizer.encode(PROMPT)[:4]
    terms = SessionTerms(len(ids) + tokens, trace=trace)
    async with model.driver.session(model.route, terms) as session:
        host = GenerationHost(model.ports.clock, in_thread, head_batches=model.head_batches)
        generation = Generation(session, model.ends, ids, GenerationParams(max_new_tokens=tokens), host)
        async for _ in generation.tokens():
            if len(generation.ids) == 1:  # what was computed up to here is the prompt
                session.computed.clear()
        computed = [session.computed.get(hop.peer, (1, 0)) for hop in model.route.hops]
        return generation.token_times_s, [micros / steps / 1000 for steps, micros in computed]
