"""The strategies that may be chosen for a request, and the order in which they are taken where nothing is known.

They differ in what a request can say; the weights are the deployment's. Simple names, in the text form of
protocol/strategy.py. A record of another strategy teaches nothing about these.
"""

from __future__ import annotations

from typing import Literal, get_args

from protocol.strategy import DEPLOYMENT_TIME, Facts, Strategy, infeasible, lossy, parse

DEFAULT = "default"
NONE = "batching=off,prefix_cache=false,prefill_chunk=2048"
CANDIDATES: tuple[str, ...] = (
    NONE,
    "prefix_cache=false,prefill_chunk=2048",  # continuous batching alone
    "batching=off,prefill_chunk=2048",  # prefix caching alone
    "batching=off,prefix_cache=false,prefill_chunk=128",  # chunked prefill alone
    DEFAULT,  # all three
    "speculation=lookup",
    "wire=int8",
    "speculation=lookup,wire=int8",
    "speculation=draft",  # beside lookup, where there is a draft model
    "speculation=draft,wire=int8",
)
RANKING = (DEFAULT, "speculation=lookup")  # before there are records: what loses nothing and seldom costs

Why = Literal["only one is possible", "records", "unsure", "ranking", "trial", "peers", "budget"]
"""records: what the records advise, or own requests showed to be better. unsure: something else may be better, but not
beyond doubt, so what is usual stays. ranking: nothing is known. peers: a hint of theirs is tried. budget: nothing else
is within it, or nothing at all."""
WHYS: tuple[Why, ...] = get_args(Why)


def possible(facts: Facts, weights: str, lossless: bool) -> dict[str, Strategy]:
    """The candidates that can work with `facts`, over blocks in `weights`; `lossless`: none that changes numbers more
    than the deployment does by itself."""
    base = parse(f"weights={weights}")
    all_of_them = {name: parse(name, base) for name in CANDIDATES}
    return {
        name: strategy
        for name, strategy in all_of_them.items()
        if infeasible(strategy, facts) is None and not (lossless and set(lossy(strategy)) - DEPLOYMENT_TIME)
    }


def like(name: str) -> str:
    """The candidate whose predictions stand for those of `name` where there are none of it: a draft model guesses
    beside lookup, and stops where it does not pay."""
    return name.replace("speculation=draft", "speculation=lookup")


def name_of(strategy: Strategy) -> str | None:
    """The candidate that a recorded strategy is, whatever its weights; None when it is none of them."""
    texts = {parse(name, parse(f"weights={strategy.weights}")): name for name in CANDIDATES}
    return texts.get(strategy)
