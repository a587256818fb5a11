"""Workloads: what arrives when, as plain data. The same seed gives the same requests on every machine.

Arrivals and lengths of the chat workload come from a published trace where `data` names a folder that holds it, else
from a generator with the same shape: the constants are fitted to that trace. Token ids are drawn at random where
nothing depends on them. Texts are used by the editing workload alone, and only where an encoder is given.

No network, no model, no clock.
"""

from __future__ import annotations

import bisect
import csv
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import accumulate
from pathlib import Path

from protocol.errors import InputError

CHAT_TRACE, EDIT_PROMPTS = "azure_llm_trace_conv_2023.csv", "spec_bench_question.jsonl"
FIRST_ID = 3  # below are special tokens
# Azure's conversation trace of 2023: gaps as if by chance (their deviation is 1.09 times their mean), prompts and
# answers independent (correlation 0.09), each by its quantiles. Answers have two humps, about 85 and 400 tokens.
QUANTILES = (0.0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
PROMPT_QUANTILES = (8, 29, 207, 396, 1020, 1189, 2734, 4083, 4142, 14050)
ANSWER_QUANTILES = (1, 16, 54, 85, 129, 395, 424, 451, 601, 1000)
EDITED_SHARE = 0.04  # of an edited text's tokens: a rename, or a few corrections
ANSWER_TOKENS = 16  # to agents, and to long prompts
COMMON_WORDS = 600  # different tokens of a built-in text, by Zipf's law


@dataclass(frozen=True, slots=True)
class Request:
    """`arrival_s` from the workload's start. `output`: the ids that the answer must be forced to, () for none."""

    arrival_s: float
    prompt: tuple[int, ...]
    new_tokens: int
    output: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests in the order of their arrival. `origin`: "built-in", or the file that they were taken from."""

    name: str
    origin: str
    requests: tuple[Request, ...]

    @property
    def new_tokens(self) -> int:
        return sum(request.new_tokens for request in self.requests)

    @property
    def prompt_tokens(self) -> int:
        return sum(len(request.prompt) for request in self.requests)

    def at_once(self) -> Workload:
        """The same requests, all there at the start."""
        return replace(self, requests=tuple(replace(request, arrival_s=0.0) for request in self.requests))

    def unseen(self, source: Source) -> Workload:
        """The same requests in other words: each token id is another one, the same for all, by `source`'s seed. What
        requests have in common stays in common, and what workers kept of the former ones does not help."""
        count = source.vocabulary - FIRST_ID
        shift = source.rng("unseen").randrange(1, count)

        def renamed(ids: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(FIRST_ID + (token - FIRST_ID + shift) % count for token in ids)

        requests = (replace(each, prompt=renamed(each.prompt), output=renamed(each.output)) for each in self.requests)
        return replace(self, requests=tuple(requests))

    def at_rate(self, per_s: float) -> Workload:
        """The same requests and the same bursts, `per_s` of them a second on average; evenly where all came at once."""
        times = [request.arrival_s for request in self.requests]
        if not times[-1]:
            times = [float(number) for number in range(len(times))]
        speed = per_s * times[-1] / max(1, len(times) - 1) or 1.0
        paced = (replace(each, arrival_s=at / speed) for each, at in zip(self.requests, times, strict=True))
        return replace(self, requests=tuple(paced))


@dataclass(frozen=True, slots=True)
class Source:
    """Where a workload comes from. `data`: the folder with traces and prompts. `encode`: text to token ids."""

    seed: int
    vocabulary: int
    data: Path | None = None
    encode: Callable[[str], list[int]] | None = None

    def rng(self, name: str) -> random.Random:
        return random.Random(f"{self.seed} {name}")

    def ids(self, rng: random.Random, count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(FIRST_ID, self.vocabulary) for _ in range(count))

    def file(self, name: str) -> Path | None:
        path = None if self.data is None else self.data / name
        return path if path is not None and path.is_file() else None


@dataclass(frozen=True, slots=True)
class ChatShape:
    """How a trace is made to fit a machine: each length times `scale`, and no request longer than `tokens_max`, of
    which the answer has half at most."""

    scale: float = 1.0
    tokens_max: int = 8192


def chat(source: Source, count: int, shape: ChatShape | None = None) -> Workload:
    """Requests as users of a chat service send them. Raises InputError on a trace that cannot be read."""
    shape = shape or ChatShape()
    rng, path = source.rng("chat"), source.file(CHAT_TRACE)
    rows = _drawn_chats(rng, count) if path is None else _trace(path, rng, count)
    requests = []
    for at, prompt, answer in rows:
        new = min(max(1, round(answer * shape.scale)), shape.tokens_max // 2)
        held = min(max(1, round(prompt * shape.scale)), shape.tokens_max - new)
        requests.append(Request(at - rows[0][0], source.ids(rng, held), new))
    return Workload("chat", "built-in" if path is None else path.name, tuple(requests))


def agents(source: Source, count: int, prefix_tokens: int, own_tokens: int, prefixes: int = 2) -> Workload:
    """Agents that share long instructions: each prompt is one of a few prefixes and something of its own."""
    rng = source.rng("agents")
    shared = [source.ids(rng, prefix_tokens) for _ in range(prefixes)]
    requests = [
        Request(0.5 * number, shared[number % prefixes] + source.ids(rng, own_tokens), ANSWER_TOKENS)
        for number in range(count)
    ]
    return Workload("agents", "built-in", tuple(requests))


def long_prompts(source: Source, count: int, tokens: int) -> Workload:
    """Documents with a short answer each, all there at the start."""
    rng = source.rng("long")
    return Workload(
        "long", "built-in", tuple(Request(0.0, source.ids(rng, tokens), ANSWER_TOKENS) for _ in range(count))
    )


def single(source: Source, prompt_tokens: int, new_tokens: int) -> Workload:
    """One user who waits for each token."""
    return Workload("single", "built-in", (Request(0.0, source.ids(source.rng("single"), prompt_tokens), new_tokens),))


def editing(source: Source, count: int, tokens: int) -> Workload:
    """A text, and as the answer the same text with a few words changed: what editors and code assistants write."""
    rng, path = source.rng("editing"), source.file(EDIT_PROMPTS)
    texts: list[tuple[int, ...]] = []
    if path is not None and source.encode is not None:
        texts = _long_texts(path, source.encode, tokens)
        rng.shuffle(texts)
    origin = path.name if path is not None and texts else "built-in"
    requests = []
    for number in range(count):
        text = texts[number % len(texts)] if texts else _wordy(source, rng, tokens)
        output = tuple(rng.randrange(FIRST_ID, source.vocabulary) if rng.random() < EDITED_SHARE else i for i in text)
        requests.append(Request(0.0, text, len(output), output))
    return Workload("editing", origin, tuple(requests))


def first_turns(path: Path) -> list[str]:
    """The first question of every line of a file of prompts. Raises InputError."""
    try:
        return [str(json.loads(line)["turns"][0]) for line in path.read_text(encoding="utf-8").splitlines() if line]
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise InputError(f"{path} holds no prompts ({error}): leave --data out, or give another folder") from None


def _drawn_chats(rng: random.Random, count: int) -> list[tuple[float, int, int]]:
    times = accumulate(rng.expovariate(1.0) for _ in range(count))
    return [(at, between(PROMPT_QUANTILES, rng.random()), between(ANSWER_QUANTILES, rng.random())) for at in times]


def between(quantiles: Sequence[int], chance: float) -> int:
    """The length that a share `chance` of those with these quantiles (at QUANTILES) does not exceed; between two of
    them evenly in its logarithm."""
    above = min(bisect.bisect_right(QUANTILES, chance), len(QUANTILES) - 1)
    share = (chance - QUANTILES[above - 1]) / (QUANTILES[above] - QUANTILES[above - 1])
    low, high = math.log(quantiles[above - 1]), math.log(quantiles[above])
    return round(math.exp(low + share * (high - low)))


def _trace(path: Path, rng: random.Random, count: int) -> list[tuple[float, int, int]]:
    """`count` requests in a row, from anywhere in the trace; from its start again where it is shorter."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [
                (_seconds(row["TIMESTAMP"]), int(row["ContextTokens"]), int(row["GeneratedTokens"]))
                for row in csv.DictReader(file)
            ]
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(
            f"{path} is no trace of arrivals ({error}): leave --data out, or give another folder"
        ) from None
    if not rows:
        raise InputError(f"{path} holds no requests: leave --data out, or give another folder")
    rows.sort()
    start, length = rng.randrange(len(rows)), rows[-1][0] - rows[0][0] + 1.0
    taken = []
    for number in range(start, start + count):
        at, prompt, answer = rows[number % len(rows)]
        taken.append((at + length * (number // len(rows)), prompt, answer))
    return taken


def _seconds(stamp: str) -> float:
    return datetime.fromisoformat(f"{stamp[:26]}+00:00").timestamp()


def _long_texts(path: Path, encode: Callable[[str], list[int]], tokens: int) -> list[tuple[int, ...]]:
    """The first `tokens` of every prompt that has so many. Raises InputError."""
    encoded = (encode(text) for text in first_turns(path))
    return [tuple(ids[:tokens]) for ids in encoded if len(ids) >= tokens]


def _wordy(source: Source, rng: random.Random, tokens: int) -> tuple[int, ...]:
    """A text whose words are as common as words are: the n-th with a chance of 1 / n."""
    words = source.ids(rng, COMMON_WORDS)
    return tuple(rng.choices(words, [1 / (rank + 1) for rank in range(len(words))], k=tokens))
