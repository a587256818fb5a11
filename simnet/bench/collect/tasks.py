"""The requests of one run: prompts and answers of the lengths and likenesses that a context asks for.

All strategies of a block get the same lengths, the same prefix in common and the same copying, in tokens of their own:
a run meets nothing in the workers' kept prefixes but what it left there itself. Before the clock starts, one request
with the prefix in common is served, as a service has served its instructions before; then all others are there at
once.

A text copies itself as it goes on: a stretch of it is new, or one that stood earlier. An answer copies its prompt in
order for the share of its tokens that the context says; the prompt copies itself for half of that to all of it, so
that what a client can see of a prompt says something of the answer, and not everything.

Of what an answer does not copy, the context's share is what the draft model says there, and all else is new. So its
guesses hold as often as those of a draft model that agrees with its large one so often, and cost what they cost.
Whether the client knows how often that is, the context says: then it is what held in an earlier answer of this kind.

The same cell, and the same draft model, give the same requests everywhere.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from client.metalearning.features import PrefixMemory, TaskFeatures, repetition
from client.speculation import NGRAMS, NO_GUESS, Guess, Proposer
from simnet.bench.collect.grid import NEW_TOKENS, SEED, Cell, Context, TaskPoint
from simnet.bench.workloads import FIRST_ID, Request, Workload

METHOD = 3  # how runs are made and what the strategies mean: a change here makes them another table's
STRETCH_TOKENS = (4, 24)  # of a prompt, new or copied
TURN_TOKENS = 16  # of an answer: some of them new, then the rest copied
LENGTHS = (0.75, 1.25)  # of a prompt's own part, beside their mean
LEADER_TOKENS = 16  # of the first request's own part
EARLIER_GUESSES = 32  # by which a client knows how often a draft model's hold
LOOKED_UP_FROM = min(NGRAMS)  # copied tokens after which lookup knows how a copy goes on


@dataclass(frozen=True, slots=True)
class Room:
    """What a model has room for: ids below `vocabulary`, its tokenizer's, and a request's tokens, `new_tokens` of them
    its answer's."""

    vocabulary: int
    context_tokens: int
    new_tokens: int = NEW_TOKENS


@dataclass(frozen=True, slots=True)
class Drawn:
    """`leader` is served before the clock starts. `agreement`: what the client knows of its draft model's guesses."""

    leader: Request
    work: Workload
    agreement: float | None = None

    @property
    def longest_tokens(self) -> int:
        """Of a request, its answer included."""
        return max(len(each.prompt) + each.new_tokens for each in (self.leader, *self.work.requests))


def draw(cell: Cell, room: Room, draft: Proposer | None = None) -> Drawn:
    """The requests of `cell`; prompts that would not fit are cut. Without `draft` all is new that is not copied."""
    task = cell.context.task
    rng = random.Random(f"{SEED} {cell.context.number} {cell.block}")
    new = _new_ids(room.vocabulary, f"{SEED} {cell.key}")
    prefix_tokens = round(task.shared_share * task.prompt_tokens)
    prefix = _text(rng, new, prefix_tokens, task.repetition)
    leader = Request(0.0, (*prefix, *_text(rng, new, LEADER_TOKENS, 0.0)), 2, _text(rng, new, 2, 0.0))
    requests = []
    for own in _lengths(rng, task, task.prompt_tokens - prefix_tokens):
        copied = task.repetition * rng.uniform(0.5, 1.0)
        prompt = (*prefix, *_text(rng, new, own, copied, prefix))[: room.context_tokens - room.new_tokens]
        answer = _answer(rng, new, prompt, task, room.new_tokens, draft)
        requests.append(Request(0.0, prompt, room.new_tokens, answer))
    return Drawn(leader, Workload(cell.context.name, "built-in", tuple(requests)), _agreement(cell.context))


def known_before(drawn: Drawn, task: TaskPoint) -> TaskFeatures:
    """What a client can see of the requests before it sends them: means, by the extraction that it uses itself."""
    prompts = [request.prompt for request in drawn.work.requests]
    memory = PrefixMemory()
    memory.share(drawn.leader.prompt)
    return TaskFeatures(
        prompt_tokens=round(statistics.fmean(map(len, prompts))),
        max_new_tokens=drawn.work.requests[0].new_tokens,
        concurrency=task.concurrency,
        shared_prefix=round(statistics.fmean(map(memory.share, prompts)), 4),
        repetition=round(statistics.fmean(map(repetition, prompts)), 4),
        temperature=0.0,
        objective=task.objective,
        exact=task.exact,
        agreement=drawn.agreement,
    )


def _agreement(context: Context) -> float | None:
    """The share of a draft model's guesses that held in an earlier answer; None for a client that has seen none. It is
    asked where nothing is copied, and where a copy begins, until lookup finds the rest: there it is wrong."""
    task, rng = context.task, random.Random(f"{SEED} {context.number} agreement")
    replaced = _replaced(task)
    asked = replaced + min(LOOKED_UP_FROM, TURN_TOKENS - replaced)
    held = sum(rng.random() < task.agreement * replaced / asked for _ in range(EARLIER_GUESSES))
    return held / EARLIER_GUESSES if task.agreement_known else None


def _replaced(task: TaskPoint) -> int:
    """Of a turn's tokens, those that do not copy the prompt."""
    return round(TURN_TOKENS * (1 - task.repetition))


def _new_ids(vocabulary: int, key: str) -> Iterator[int]:
    """Ids in an order of the run's own, each once; then all in another order."""
    rng, order = random.Random(key), list(range(FIRST_ID, vocabulary))
    while True:
        rng.shuffle(order)
        yield from order


def _lengths(rng: random.Random, task: TaskPoint, mean: int) -> list[int]:
    """As many as there are requests, `mean` on average, one at least."""
    drawn = [rng.uniform(*LENGTHS) for _ in range(task.requests)]
    return [max(1, round(mean * each / statistics.fmean(drawn))) for each in drawn]


def _text(
    rng: random.Random, new: Iterator[int], tokens: int, copied: float, before: tuple[int, ...] = ()
) -> tuple[int, ...]:
    """What follows `before`: so many tokens, of which about the share `copied` repeats what stood earlier."""
    ids, end = list(before), len(before) + tokens
    while len(ids) < end:
        stretch = min(rng.randint(*STRETCH_TOKENS), end - len(ids))
        if rng.random() < copied and len(ids) > stretch:
            start = rng.randrange(len(ids) - stretch)
            ids += ids[start : start + stretch]
        else:
            ids += (next(new) for _ in range(stretch))
    return tuple(ids[len(before) :])


def _answer(
    rng: random.Random,
    new: Iterator[int],
    prompt: tuple[int, ...],
    task: TaskPoint,
    tokens: int,
    draft: Proposer | None,
) -> tuple[int, ...]:
    """The prompt from somewhere on, with some of it replaced, a few tokens in each turn, as the task says."""
    start, replaced = rng.randrange(len(prompt)), _replaced(task)
    draft = draft or _Silent()
    draft.begin(prompt)
    ids = list[int]()
    for at in range(tokens):
        if at % TURN_TOKENS >= replaced:
            ids.append(prompt[(start + at) % len(prompt)])
        else:
            said = draft.guess(1).ids if rng.random() < task.agreement else ()
            ids.append(said[0] if said else next(new))
        draft.extend(ids[-1:])
    return tuple(ids)


class _Silent:
    """A draft model that says nothing."""

    def begin(self, prompt: Sequence[int]) -> None:
        pass

    def extend(self, ids: Sequence[int]) -> None:
        pass

    def guess(self, count: int) -> Guess:
        return NO_GUESS
