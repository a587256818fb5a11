"""A draft model: the same tokens as without; its KV follows the truth; it costs nothing where it is wrong."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache

import pytest
import torch
import trio
from torch import Tensor

from client.draft import DraftModel
from client.generate import Generation, GenerationHost, GenerationParams, GenerationResult
from client.head_batches import HeadBatches
from client.speculation import DRAFT, Agreement, Guess, Pace, PromptLookup, Speculation
from client.tensors import to_payload, to_tensor
from models.checkpoint import Checkpoint
from models.local import LocalModel
from models.sampling import SamplingParams, sample
from models.sequence import LocalSequence
from models.tokenizer import Tokenizer
from protocol.tensors import Payload
from simnet.runtime import VirtualClock, run
from sotto.demo import demo_checkpoint, demo_draft

STEP_S = 0.1


@cache
def demo() -> tuple[LocalModel, LocalModel, Tokenizer]:
    checkpoint = Checkpoint.open(demo_checkpoint())
    tokenizer = Tokenizer.open(checkpoint.tokenizer_file)
    return LocalModel(checkpoint), LocalModel(Checkpoint.open(demo_draft())), tokenizer


@dataclass
class LocalEnds:
    model: LocalModel

    def embed(self, ids: Sequence[int]) -> Tensor:
        return self.model.embed(ids)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.model.head(hidden)


class LocalRoute:
    """A session whose route is a model in this process; each step takes STEP_S of virtual time."""

    def __init__(self, model: LocalModel) -> None:
        self.model, self.caches = model, model.new_caches(256)
        self.rows: list[int] = []
        self.ready: list[tuple[float, Payload]] = []

    async def submit(self, payload: Payload, position: int, tail: int = 1) -> int:
        hidden = self.model.run_blocks(to_tensor(payload), self.caches, position)
        self.rows.append(len(hidden))
        self.ready.append((trio.current_time() + STEP_S, to_payload(hidden[-tail:], torch.float32)))
        return len(self.ready) - 1

    def ready_s(self, step: int) -> float | None:
        waited_s = trio.current_time() - self.ready[step][0]
        return waited_s if waited_s >= 0 else None

    async def result(self, step: int) -> Payload:
        await trio.sleep_until(self.ready[step][0])
        return self.ready[step][1]


def drafter(sampling: SamplingParams) -> DraftModel:
    target, draft, _ = demo()
    made = DraftModel(draft, target.config.vocab_size, guess_s=0.001)
    made.sampling = sampling
    return made


def answer(route: LocalRoute, sampling: SamplingParams, speculation: Speculation | None) -> GenerationResult:
    target, _, tokenizer = demo()

    async def main() -> GenerationResult:
        host = GenerationHost(VirtualClock(), speculation=speculation)
        params, prompt = GenerationParams(80, sampling), tokenizer.encode("If the optional argument is given,")
        generation = Generation(route, LocalEnds(target), prompt, params, host)
        async for _ in generation.tokens():
            pass
        return generation.result()

    return run(main, 0)


@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(0.8, seed=5), SamplingParams(1.0, 40, 0.9, 7)])
def test_the_answer_is_the_models_own_in_fewer_steps(sampling: SamplingParams) -> None:
    plain, route = answer(LocalRoute(demo()[0]), sampling, None), LocalRoute(demo()[0])
    drafted = answer(route, sampling, Speculation(draft=drafter(sampling)))
    assert drafted.ids == plain.ids
    assert drafted.accepted > 40, "more than half of the tokens were guessed"
    assert len(route.rows) < 0.6 * 80
    assert len(route.rows) == 80 - drafted.accepted


def test_the_same_noise_makes_a_draft_that_is_the_model_always_right() -> None:
    """The strongest statement of "the same stream": a draft with the model's own weights is never wrong."""
    sampling = SamplingParams(1.5, seed=3)
    target, _, _ = demo()
    draft = DraftModel(target, target.config.vocab_size, 0.001)
    draft.sampling = sampling
    drafted = answer(LocalRoute(target), sampling, Speculation(draft=draft))
    assert drafted.accepted == drafted.drafted > 60


def test_what_was_guessed_wrong_leaves_no_trace_in_the_drafts_kv() -> None:
    """Whatever is accepted, the next guess is that of a draft that never guessed before."""
    generator, sampling = random.Random(0), SamplingParams(0.7, seed=1)
    _, model, _ = demo()
    draft, known = drafter(sampling), [0, 54, 660, 27]
    draft.begin(known)
    for _ in range(25):
        count = generator.randint(1, 6)
        guess = draft.guess(count)
        sequence, fresh = LocalSequence(model), list[int]()
        for token in range(count):
            logits = sequence.read(known if not token else fresh[-1:])
            fresh.append(sample(logits, sampling, len(known) + token))
        assert guess == Guess(tuple(fresh), DRAFT)
        other = [generator.randrange(2048) for _ in range(generator.randint(1, 4))]
        came = [*guess.ids[: generator.randint(0, count)], *other]
        draft.extend(came)
        known += came
    assert draft.behind <= 10


def test_the_next_turn_reads_only_what_is_new() -> None:
    draft, first = drafter(SamplingParams()), list(range(2, 60))
    draft.begin(first)
    assert draft.behind == 58
    draft.read(40)
    draft.read(40)
    assert draft.behind == 0
    draft.begin([*first[:50], 9, 9, 9])
    assert draft.behind == 3


def test_a_draft_without_a_tokens_embedding_makes_no_more_guesses() -> None:
    draft = drafter(SamplingParams())
    draft.begin([1, 2, 5000])
    assert (draft.behind, draft.guess(3).ids) == (0, ())
    draft.begin([1, 2])
    assert len(draft.guess(3).ids) == 3


def in_a_new_thread(work: Callable[[], object]) -> object:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def test_guessing_leaves_the_process_as_many_threads_as_it_had() -> None:
    usual = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        draft = drafter(SamplingParams())
        draft.begin([1, 2])
        in_a_new_thread(lambda: torch.set_num_threads(1))  # another draft model is in the middle of a guess
        in_a_new_thread(lambda: draft.guess(1))
        assert in_a_new_thread(torch.get_num_threads) == 3
    finally:
        torch.set_num_threads(usual)


def test_a_draft_ends_with_its_context_and_reads_nothing_in_vain() -> None:
    draft = drafter(SamplingParams())
    draft.begin([7] * 1030)
    assert (draft.silent, draft.behind, draft.guess(1).ids) == (True, 0, ())
    draft.begin([7] * 1021)
    while draft.behind:
        draft.read(200)
    assert len(draft.guess(8).ids) == 3
    draft.extend([7, 7, 7])
    assert (draft.silent, draft.guess(1).ids) == (True, ())


def test_a_draft_that_is_silent_is_not_asked() -> None:
    speculation = Speculation(draft=drafter(SamplingParams()))
    speculation.begin([1, 2])
    for rows in (1, 2):
        speculation.took(rows, 0.1)
    assert speculation.asks(8)
    speculation.came([5000])
    assert not speculation.asks(8)
    assert speculation.next(8) == ()


@dataclass
class Priced:
    """A drafter that takes time for each guess, and holds as often as it is told."""

    clock: SlowClock
    truth: Sequence[int]
    guess_s: float
    right: float
    generator: random.Random = field(default_factory=lambda: random.Random(0))
    known: int = 0
    silent: bool = False
    behind: int = 0
    guesses: int = 0

    def begin(self, prompt: Sequence[int]) -> None:
        self.known = 0

    def extend(self, ids: Sequence[int]) -> None:
        self.known += len(ids)

    def read(self, count: int) -> None:
        raise AssertionError("it is never behind")

    def guess(self, count: int) -> Guess:
        self.clock.late_s += self.guess_s * count
        self.guesses += count
        truth = self.truth[self.known : self.known + count]
        return Guess(tuple(t if self.generator.random() < self.right else 2047 for t in truth), DRAFT)


@dataclass
class SlowClock:
    """Virtual time, and what was computed meanwhile."""

    late_s: float = 0.0

    def monotonic(self) -> float:
        return trio.current_time() + self.late_s

    def time(self) -> float:
        return self.monotonic()


def timed(guess_s: float, right: float, tokens: int = 200) -> tuple[float, Priced]:
    """The time that a request takes as a share of what it takes without the drafter."""
    target, _, tokenizer = demo()
    clock, prompt = SlowClock(), tokenizer.encode("This module provides")
    truth = target.generate(prompt, tokens)
    priced = Priced(clock, truth, guess_s, right)

    async def main() -> float:
        host = GenerationHost(clock, speculation=Speculation(draft=priced, now=clock.monotonic))
        route = LocalRoute(target)
        generation = Generation(route, LocalEnds(target), prompt, GenerationParams(tokens), host)
        started = clock.monotonic()
        assert [token async for token in generation.tokens()] == truth
        return (clock.monotonic() - started) / (STEP_S * tokens)

    return run(main, 0), priced


@pytest.mark.parametrize("guess_s", [0.001, 0.01, 0.05, 0.1, 1.0])
def test_a_draft_that_is_wrong_or_slow_costs_less_than_five_percent(guess_s: float) -> None:
    share, priced = timed(guess_s, right=0.02)
    assert share < 1.05
    assert priced.guesses > 0 or guess_s >= 0.1, "it is tried as long as that is cheap"


def test_a_draft_that_is_right_but_slower_than_the_route_is_left_alone() -> None:
    share, _ = timed(2 * STEP_S, right=1.0)
    assert share < 1.05


def test_a_draft_that_pays_is_used() -> None:
    share, _ = timed(0.005, right=0.8)
    assert share < 0.5


def test_lookup_is_preferred_where_it_promises_as_much() -> None:
    speculation = Speculation(PromptLookup(), drafter(SamplingParams()))
    speculation.begin([5, 6, 7, 8, 9, 5, 6, 7])
    speculation.prefilled(8, 0.1)
    speculation.took(1, 0.1)
    for came in ([8], [9], [5], [6], [7], [8], [9]):
        speculation.next(4)
        speculation.came(came)
    assert speculation.next(4) == (5, 6, 7, 8)


@dataclass
class CountedEnds(LocalEnds):
    products: list[int] = field(default_factory=list)

    def logits(self, hidden: Tensor) -> Tensor:
        self.products.append(len(hidden))
        return super().logits(hidden)


def test_requests_that_a_draft_model_guesses_for_share_products_of_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each asks its draft model apart, which is kept for its next request: others neither wait for it nor run it."""
    target, _, tokenizer = demo()
    prompts = [tokenizer.encode(text) for text in ("This module provides", "If the file is closed,")]
    alone, threads = [target.generate(prompt, 30) for prompt in prompts], list[bool]()
    apart = list[bool]()

    async def main() -> tuple[list[list[int]], CountedEnds]:
        ends, found = CountedEnds(target), dict[int, list[int]]()
        batches = HeadBatches(ends, rows_inline=64)

        async def in_thread(work: Callable[[], object], /) -> object:
            threads.append(True)
            try:
                return work()
            finally:
                threads.pop()

        async def request(number: int) -> None:
            draft = drafter(SamplingParams())
            guess = draft.guess
            monkeypatch.setattr(draft, "guess", lambda count: apart.append(bool(threads)) or guess(count))
            drafting = Speculation(PromptLookup(), draft)
            host = GenerationHost(VirtualClock(), in_thread, speculation=drafting, head_batches=batches)  # type: ignore[arg-type]
            generation = Generation(LocalRoute(target), ends, prompts[number], GenerationParams(30), host)
            found[number] = [token async for token in generation.tokens()]
            assert drafting.pace.agreement.rate is not None

        async with trio.open_nursery() as nursery:
            for number in range(2):
                nursery.start_soon(request, number)
        return [found[0], found[1]], ends

    answers, ends = run(main, 0)
    assert answers == alone
    assert set(apart) == {True}, "never where others' rows are computed"
    requests = sum(1 for rows in ends.products if rows > 1)
    assert requests > 0.5 * len(ends.products), "guesses, or both requests, in one product"


def test_what_is_known_of_a_draft_models_guesses_follows_what_they_do_now() -> None:
    agreement = Agreement()
    assert agreement.rate is None
    agreement.note(3, failed=True)
    assert agreement.rate == 0.75
    for _ in range(100):
        agreement.note(0, failed=True)
    assert agreement.rate is not None
    assert agreement.rate < 0.1
    for _ in range(50):
        agreement.note(9, failed=True)
    assert agreement.rate == pytest.approx(0.9, abs=0.01)


def test_a_request_begins_with_what_earlier_ones_showed_of_the_draft_model() -> None:
    counts = dict[tuple[float | None, int], int]()
    for rate, seen in ((None, 0), (0.0, 1), (0.02, 32), (0.5, 32), (0.95, 32)):
        pace = Pace()
        pace.agreement.believe(rate, seen)
        assert pace.agreement.rate == rate
        pace.took(1, 0.1)
        pace.took(2, 0.102)
        counts[rate, seen] = pace.best(DRAFT, 16, guess_s=0.005)[0]
    assert counts[0.02, 32] < counts[0.0, 1] < counts[None, 0] < counts[0.95, 32], "one guess says little"
    assert counts[0.02, 32] < counts[0.5, 32] < counts[0.95, 32]
    pace.came(Guess((1, 2, 3), DRAFT), (1, 9))
    assert pace.agreement.rate < 0.95, "and tells what it shows itself"
