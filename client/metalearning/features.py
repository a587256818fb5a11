"""Features: what is known of a request before it runs. Each field states its unit and its meaning.

Invariant: nothing here depends on how the request went (its length, its acceptance, its hits), so that a choice that is
learnt from these can be made before the request. Extraction is pure; the prompt's ids are read and not kept.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Annotated

from client.placement import ModelNeeds, Placement
from client.placement.distances import rtt_matrix_ms
from models.config import ModelConfig
from protocol.ids import PeerId
from protocol.swarm import Member, SwarmView
from protocol.tensors import DTYPE_BYTES

NGRAM = 3  # shorter ones repeat in any text
PIECE_TOKENS = 16
PAGES_REMEMBERED = 1 << 16  # a million tokens of recent prompts, about 10 MB
STATED_MAX = 1e12  # GB/s, GFLOP/s, us: a worker that states more would leave rows that cannot be read again
WEIGHT_BYTES: Mapping[str, float] = {**DTYPE_BYTES, "int4": 0.5}


@dataclass(frozen=True, slots=True)
class About:
    """What a field says; `unit` is "" for a name or a plain number."""

    unit: str
    meaning: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFeatures:
    family: Annotated[str, About("", "architecture")]
    layers: Annotated[int, About("", "blocks")]
    width: Annotated[int, About("", "hidden size")]
    mlp_width: Annotated[int, About("", "inner size of the MLP")]
    heads: Annotated[int, About("", "query heads of a block")]
    kv_heads: Annotated[int, About("", "key and value heads of a block")]
    vocabulary: Annotated[int, About("tokens", "size of the vocabulary")]
    context: Annotated[int, About("tokens", "longest context")]
    parameters: Annotated[int, About("", "numbers in all blocks; embedding and head are the client's")]
    weight_bytes: Annotated[float, About("bytes", "of one number of the blocks, as deployed; 0 when not known")]


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteFeatures:
    hops: Annotated[int, About("", "workers on the route")]
    span_us: Annotated[
        tuple[float, ...], About("us", "one token through each hop's blocks, by its own measurement, in order")
    ]
    leg_rtt_ms: Annotated[
        tuple[float, ...], About("ms", "round trip of each leg: client to first hop, ..., last hop to client")
    ]
    compute_us: Annotated[float, About("us", "one token through all blocks")]
    compute_us_max: Annotated[float, About("us", "the same at the slowest hop")]
    rtt_ms: Annotated[float, About("ms", "sum of the legs' round trips, halved: the wire's part of one step")]
    rtt_ms_max: Annotated[float, About("ms", "the longest leg's round trip")]
    bandwidth_mbit_s: Annotated[
        float | None,
        About("Mbit/s", "at which shards last came to the slowest of the hops that this client brought some to"),
    ]
    read_gb_s_min: Annotated[
        float, About("GB/s", "the slowest hop's memory, by its own measurement; 0 when it states none")
    ]
    gflop_s_min: Annotated[float, About("GFLOP/s", "the slowest hop's products in float32, the same way")]
    gpus: Annotated[int, About("", "hops on something else than a CPU")]
    kv_free_tokens: Annotated[int, About("tokens", "room in the KV memory of the hop that has least")]
    load_percent_max: Annotated[int, About("%", "how busy the busiest hop said it was")]
    relayed: Annotated[int, About("", "hops that are reached through a relay only")]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskFeatures:
    prompt_tokens: Annotated[int, About("tokens", "length of the prompt")]
    max_new_tokens: Annotated[int, About("tokens", "most that the answer may have; not how many it had")]
    concurrency: Annotated[int, About("", "requests that this client had, or keeps, under way, this one included")]
    shared_prefix: Annotated[
        float, About("", "share of the prompt with which an earlier prompt of this client began, 0 to 1")
    ]
    repetition: Annotated[float, About("", f"share of the prompt's {NGRAM}-grams that occurred in it before, 0 to 1")]
    temperature: Annotated[float, About("", "of sampling; 0 is greedy")]
    objective: Annotated[str, About("", "what the user wants of it: latency, throughput or cost")]
    exact: Annotated[bool, About("", "a strategy that loses precision was ruled out")]
    guess_us: Annotated[
        float | None, About("us", "one guess of the draft model, by a measurement here; empty while none was opened")
    ] = None
    agreement: Annotated[
        float | None, About("", "share of the draft model's guesses that held in earlier requests, 0 to 1")
    ] = None


def model_features(config: ModelConfig, dtype: str | None) -> ModelFeatures:
    """Of a model whose blocks are sealed in `dtype`, None when that is not known."""
    block = config.blocks[0]
    return ModelFeatures(
        family=config.family,
        layers=config.num_blocks,
        width=config.hidden_size,
        mlp_width=block.intermediate_size,
        heads=block.num_heads,
        kv_heads=block.num_kv_heads,
        vocabulary=config.vocab_size,
        context=config.max_position,
        parameters=sum(each.num_parameters for each in config.blocks),
        weight_bytes=float(WEIGHT_BYTES[dtype]) if dtype else 0.0,
    )


def route_features(
    view: SwarmView,
    placement: Placement,
    needs: ModelNeeds,
    client_rtts_ms: Mapping[PeerId, float],
    mbit_s: Mapping[PeerId, float],
) -> RouteFeatures:
    """Of the route over the hops of `placement`, all in `view`. `mbit_s`: of workers of which it was measured."""
    members = [view.members[hop.peer] for hop in placement.hops]
    rtts = rtt_matrix_ms(members, client_rtts_ms)
    ends = [-1, *range(len(members)), -1]
    legs = tuple(round(float(rtts[start, end]), 3) for start, end in pairwise(ends))
    spans = tuple(min(float(hop.compute_us), STATED_MAX) for hop in placement.hops)
    adverts = [member.advert for member in members]
    measured = [min(mbit_s[hop.peer], STATED_MAX) for hop in placement.hops if hop.peer in mbit_s]
    room = [
        advert.kv_free_bytes // max(1, sum(needs.kv_bytes_per_token[hop.start : hop.end]))
        for advert, hop in zip(adverts, placement.hops, strict=True)
    ]
    return RouteFeatures(
        hops=len(members),
        span_us=spans,
        leg_rtt_ms=legs,
        compute_us=sum(spans),
        compute_us_max=max(spans),
        rtt_ms=round(sum(legs) / 2, 3),
        rtt_ms_max=max(legs),
        bandwidth_mbit_s=min(measured, default=None),
        read_gb_s_min=min(_speed(member)[0] for member in members),
        gflop_s_min=min(_speed(member)[1] for member in members),
        gpus=sum(advert.device != "cpu" for advert in adverts),
        kv_free_tokens=min(room),
        load_percent_max=max(advert.load_percent for advert in adverts),
        relayed=sum(advert.relayed for advert in adverts),
    )


def repetition(ids: Sequence[int]) -> float:
    """Share of the n-grams of `ids` that occurred in it before: how much a lookup in the prompt may find."""
    grams = [tuple(ids[start : start + NGRAM]) for start in range(len(ids) - NGRAM + 1)]
    return round(1 - len(set(grams)) / len(grams), 4) if grams else 0.0


@dataclass(slots=True)
class PrefixMemory:
    """What recent prompts began with, as one hash for each page: an estimate, for hashes may meet."""

    pages_max: int = PAGES_REMEMBERED
    _pages: OrderedDict[int, None] = field(default_factory=OrderedDict)

    def share(self, ids: Sequence[int]) -> float:
        """The share of `ids` with which a remembered prompt began; `ids` is remembered from now on."""
        known, same, chain = 0, True, 0
        for start in range(0, len(ids) - PIECE_TOKENS + 1, PIECE_TOKENS):
            chain = hash((chain, *ids[start : start + PIECE_TOKENS]))
            same = same and chain in self._pages
            known += same
            self._pages[chain] = None
            self._pages.move_to_end(chain)
        while len(self._pages) > self.pages_max:
            self._pages.popitem(last=False)
        return round(known * PIECE_TOKENS / len(ids), 4) if ids else 0.0


def _speed(member: Member) -> tuple[float, float]:
    """GB/s and GFLOP/s in float32, else in whatever is stated first; zeros when nothing is."""
    speeds = sorted(member.advert.speeds, key=lambda speed: speed.dtype != "float32")
    return (min(speeds[0].read_gb_s, STATED_MAX), min(speeds[0].gflop_s, STATED_MAX)) if speeds else (0.0, 0.0)
