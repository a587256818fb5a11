"""Speculation: the same tokens whatever is guessed, guesses where they pay, and none where they do not."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from client.generate import Generation, GenerationHost, GenerationParams, GenerationResult
from client.speculation import DRAFT, NO_GUESS, PROBE_SHARE, SLOWER_MAX, Costs, Guess, Pace, PromptLookup, Speculation
from models.sampling import SamplingParams
from simnet.runtime import VirtualClock, run
from tests.helpers.machines import VOCABULARY, HashedEnds, Machine

T = TypeVar("T")


@dataclass
class Scripted:
    """Guesses at random: right ones, wrong ones, too many and none."""

    generator: random.Random
    truth: Sequence[int]
    known: int = 0

    def begin(self, prompt: Sequence[int]) -> None:
        self.known = 0

    def extend(self, ids: Sequence[int]) -> None:
        self.known += len(ids)

    def guess(self, count: int) -> Guess:
        right = list(self.truth[self.known : self.known + self.generator.randint(0, count)])
        if right and self.generator.random() < 0.5:
            right[self.generator.randrange(len(right))] = self.generator.randrange(VOCABULARY)
        return Guess(tuple(right), self.generator.randrange(3)) if right else NO_GUESS


def generated(
    machine: Machine,
    params: GenerationParams,
    speculation: Speculation | None = None,
    prompt: Sequence[int] = (1, 2, 3),
) -> GenerationResult:
    async def main() -> GenerationResult:
        host = GenerationHost(VirtualClock(), speculation=speculation)
        generation = Generation(machine, HashedEnds(), prompt, params, host)
        async for _ in generation.tokens():
            pass
        return generation.result()

    return run(main, 0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("seed", range(6))
def test_the_tokens_are_the_same_whatever_is_guessed(temperature: float, seed: int) -> None:
    params = GenerationParams(
        60, SamplingParams(temperature, seed=seed), stop_ids=frozenset({11}) if seed > 3 else frozenset()
    )
    plain = generated(Machine(), params)
    for proposer in (Scripted(random.Random(seed), plain.ids), PromptLookup()):
        machine = Machine()
        speculated = generated(machine, params, Speculation(proposer))
        assert speculated.ids == plain.ids
        assert speculated.finish_reason == plain.finish_reason
        assert len(machine.held) < 3 + 60, "the last token is never computed, so neither is a guess at it"
        assert speculated.accepted <= speculated.drafted
        assert sum(machine.rows) == 3 + speculated.drafted + len(machine.rows) - 1


def test_right_guesses_save_round_trips() -> None:
    params = GenerationParams(60)
    plain, machine = generated(Machine(), params), Machine()

    class Oracle(Scripted):
        def guess(self, count: int) -> Guess:
            return Guess(tuple(self.truth[self.known : self.known + count]), 0)

    speculated = generated(machine, params, Speculation(Oracle(random.Random(0), plain.ids)))
    assert speculated.ids == plain.ids
    assert len(machine.rows) < 16
    assert speculated.token_times_s[-1] < plain.token_times_s[-1] / 4
    assert speculated.accepted == speculated.drafted == 59 - (len(machine.rows) - 1)


def test_guesses_of_a_request_that_is_given_up_are_no_longer_under_way() -> None:
    class Oracle(Scripted):
        def guess(self, count: int) -> Guess:
            return Guess(tuple(self.truth[self.known : self.known + count]), 0)

    truth, costs, most = generated(Machine(), GenerationParams(60)).ids, Costs(), list[int]()

    async def main() -> None:
        speculation = Speculation(Oracle(random.Random(0), truth), pace=Pace(costs=costs))
        host = GenerationHost(VirtualClock(), speculation=speculation)
        tokens = Generation(Machine(), HashedEnds(), (1, 2, 3), GenerationParams(60), host).tokens()
        async for _ in tokens:
            most.append(costs.guesses)
            if len(most) == 20:
                break
        await tokens.aclose()

    run(main, 0)
    assert max(most) > 3
    assert costs.guesses == 0
    speculation = Speculation(Oracle(random.Random(0), truth), pace=Pace(costs=costs))
    speculation.came(truth[:1])
    assert speculation.next(9)
    assert costs.guesses == 0, "they are chosen in a thread, and the request may have been cancelled meanwhile"


class Wrong(Scripted):
    def guess(self, count: int) -> Guess:
        return Guess((VOCABULARY,) * count, 0)


@pytest.mark.parametrize("tokens", [32, 300])
@pytest.mark.parametrize("row_s", [0.05, 0.1, 0.5])
def test_wrong_guesses_that_cost_are_soon_left_alone(row_s: float, tokens: int) -> None:
    params = GenerationParams(tokens)
    plain = generated(Machine(0.1, row_s), params)
    speculated = generated(Machine(0.1, row_s), params, Speculation(Wrong(random.Random(0), plain.ids)))
    assert speculated.ids == plain.ids
    assert speculated.token_times_s[-1] < 1.05 * plain.token_times_s[-1]


@dataclass
class Text:
    """The tokens 0, 1, 2 and so on. After `matches` of them a guess is made, of which those in `right` are true."""

    matches: Sequence[bool]
    right: Sequence[bool]
    known: int = 0

    @classmethod
    def of(cls, tokens: int, acceptance: float, seed: int = 0) -> Text:
        generator = random.Random(seed)
        made = [(generator.random() < 0.7, generator.random() < acceptance) for _ in range(tokens + 32)]
        return cls([match for match, _ in made], [right for _, right in made])

    def begin(self, prompt: Sequence[int]) -> None:
        self.known = 0

    def extend(self, ids: Sequence[int]) -> None:
        self.known += len(ids)

    def guess(self, count: int) -> Guess:
        if not self.matches[self.known]:
            return NO_GUESS
        return Guess(tuple(n if self.right[n] else -1 for n in range(self.known, self.known + count)), 4)


@dataclass
class Drafting(Text):
    """A draft model that takes `guess_s` for a guess, and has one wherever it is asked."""

    guess_s: float = 0.0
    silent: bool = False
    behind: int = 0
    clock_s: float = 0.0

    def guess(self, count: int) -> Guess:
        self.clock_s += count * self.guess_s
        return Guess(super().guess(count).ids, DRAFT)

    def read(self, count: int) -> None:
        raise AssertionError("it keeps up")


@dataclass
class Arithmetic:
    """Requests over a route where a step of one row takes 1 s, each further row `row_s`, and some steps longer."""

    row_s: float
    disturbed: dict[int, float] = field(default_factory=dict)
    draft: Drafting | None = None
    sent: list[int] = field(default_factory=list)  # guesses in each step

    def plain_s(self, tokens: int, prompt: int) -> float:
        return tokens + (prompt - 1) * self.row_s

    def request_s(self, text: Text, tokens: int, prompt: int = 20, pace: Pace | None = None) -> float:
        speculation = Speculation(text, self.draft, pace or Pace(), lambda: self.draft.clock_s if self.draft else 0.0)
        speculation.begin([0] * prompt)
        spent_s = 1.0 + (prompt - 1) * self.row_s
        speculation.prefilled(prompt, spent_s)
        came, done = [0], 1
        speculation.came(came)
        while done < tokens:
            guesses = speculation.next(tokens - done - 1)
            took_s = 1.0 + len(guesses) * self.row_s + self.disturbed.get(len(self.sent), 0.0)
            self.sent.append(len(guesses))
            speculation.took(1 + len(guesses), took_s)
            spent_s += took_s
            held = next((n for n, guess in enumerate(guesses) if guess != done + n), len(guesses))
            came = list(range(done, done + held + 1))
            done += len(came)
            speculation.came(came)
        return spent_s


@given(
    row_s=st.floats(0.0, 6.0),
    acceptance=st.sampled_from((0.0, 0.3, 0.5, 0.7, 0.9, 1.0)),
    tokens=st.integers(8, 300),
    prompt=st.integers(1, 300),
    seed=st.integers(0, 99),
)
def test_guesses_never_cost_more_than_they_may(
    row_s: float, acceptance: float, tokens: int, prompt: int, seed: int
) -> None:
    """Of a prompt of one row nothing is learnt of rows: then one may be sent that costs more than was thought."""
    route = Arithmetic(row_s)
    spent_s = route.request_s(Text.of(tokens, acceptance, seed), tokens, prompt)
    assert spent_s <= (1 + SLOWER_MAX) * route.plain_s(tokens, prompt) + (row_s if prompt == 1 else 0.0) + 1e-6


def together_s(requests: int, row_s: float, acceptance: float, beside: int, tokens: int = 150) -> float:
    """Requests whose steps are computed together, each row of one delaying all: until the last has its answer."""
    texts, costs = [Text.of(tokens, acceptance, seed) for seed in range(requests)], Costs()
    each = [Speculation(text, pace=Pace(costs=costs), beside=lambda: beside) for text in texts]
    done, spent_s = [1] * requests, 0.0
    for speculation in each:
        speculation.begin([0] * 20)
        speculation.prefilled(20, 1.0 + 19 * row_s)
        speculation.came([0])
    while left := [number for number in range(requests) if done[number] < tokens]:
        sent = {number: each[number].next(tokens - done[number] - 1) for number in left}
        for number, guesses in sent.items():
            each[number].sent(len(guesses))
        took_s = 1.0 + row_s * sum(map(len, sent.values()))
        spent_s += took_s
        for number, guesses in sent.items():
            each[number].took(1 + len(guesses), took_s)
            held = next((n for n, guess in enumerate(guesses) if guess != done[number] + n), len(guesses))
            each[number].came(range(done[number], done[number] + held + 1))
            done[number] += held + 1
    assert costs.guesses == 0
    return spent_s


def test_guesses_are_not_sent_at_the_expense_of_the_requests_beside() -> None:
    plain_s = 149.0
    assert together_s(16, 0.03, 0.3, beside=1) > 1.08 * plain_s, "each weighs what its own rows cost itself"
    assert together_s(16, 0.03, 0.3, beside=16) < 1.04 * plain_s
    assert together_s(16, 0.01, 0.95, beside=16) < 0.6 * plain_s, "what pays for all is sent"


@pytest.mark.parametrize("prompt", [4, 40, 300])
def test_guesses_that_hold_save_what_they_can(prompt: int) -> None:
    for row_s, share in ((0.005, 0.16), (0.05, 0.22), (0.2, 0.4)):  # of the time without; 128 steps need 8 with 16 rows
        route = Arithmetic(row_s)
        spent_s = route.request_s(Text.of(128, 1.0), 128, prompt) - (prompt - 1) * row_s
        assert spent_s < share * 128


@pytest.mark.parametrize("step", range(12))
def test_a_step_that_waits_for_a_strangers_work_ends_no_guessing(step: int) -> None:
    text, calm, disturbed = Text.of(200, 0.9), Arithmetic(0.05), Arithmetic(0.05, {step: 15.0})
    calm_s, disturbed_s = calm.request_s(text, 200), disturbed.request_s(text, 200)
    assert disturbed_s < 15.0 + 1.25 * calm_s


def test_a_probe_that_waits_for_a_strangers_work_puts_nothing_off() -> None:
    """The next one is made when it would have been by what was believed before, not by how long that took."""
    probe, text = 79, Text.of(1000, 0.9)
    for disturbed in ({}, {probe: 15.0}):
        pace, route = Pace(), Arithmetic(0.05, disturbed)
        Arithmetic(4.0).request_s(text, 200, pace=pace)
        route.request_s(text, 1000, pace=pace)
        first, second = [step for step, guesses in enumerate(route.sent) if guesses][:2]
        assert first == probe
        assert second - first < 4.0 / PROBE_SHARE
        assert sum(map(bool, route.sent)) > 20, "it goes on guessing"


def test_a_draft_models_probe_that_waits_ends_no_lookup() -> None:
    """What it learns of rows is believed of those of lookup too."""
    probe, text, spent_s = 74, Text.of(600, 0.9), []
    for disturbed in ({}, {probe: 15.0}):
        route = Arithmetic(0.05, disturbed, Drafting([True] * 632, [True] * 632, guess_s=0.97))
        spent_s.append(route.request_s(text, 600))
        assert route.sent[probe] == 1
    assert spent_s[1] < spent_s[0] + 15.0 + 5.0


def test_a_chat_guesses_again_after_a_turn_whose_rows_were_dear() -> None:
    pace, text = Pace(), Text.of(200, 0.9)
    Arithmetic(4.0).request_s(text, 200, pace=pace)
    cheap = Arithmetic(0.05)
    assert cheap.request_s(text, 200, pace=pace) < 0.8 * cheap.plain_s(200, 20)


def test_what_never_pays_is_tried_for_one_percent_of_the_time() -> None:
    route = Arithmetic(2.0)
    route.request_s(Text.of(3000, 0.9), 3000)
    assert 2 <= sum(route.sent) <= 0.012 * 3000


def test_guesses_begin_again_when_the_text_repeats_itself() -> None:
    """Guesses that are not sent are compared all the same, so a change for the better is noticed."""
    pace = Pace()
    pace.took(1, 0.1)
    pace.took(5, 0.3)
    bad, good = Guess((1, 2, 3, 4), 2), Guess((5, 6, 7, 8), 2)
    for _ in range(20):
        pace.came(bad, (9,))
    assert pace.best(good.kind, 4)[0] == 0
    for _ in range(20):
        pace.came(good, (5,))
    assert pace.best(good.kind, 4)[0] > 0


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(0, 6))
def test_lookup_repeats_what_followed_the_longest_match(ids: list[int], count: int) -> None:
    lookup = PromptLookup()
    lookup.extend(ids[: len(ids) // 2])
    lookup.extend(ids[len(ids) // 2 :])
    guess = lookup.guess(count)
    expected = NO_GUESS
    for length in (2, 3, 4):  # as the definition says: the last place, before the end, where the last tokens stood
        places = [end for end in range(length, len(ids)) if ids[end - length : end] == ids[-length:]]
        if len(ids) >= length and places:
            expected = Guess(tuple(ids[places[-1] : places[-1] + count]), length)
    assert guess == expected


@given(
    st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=40),
    st.floats(0, 10),
    st.floats(0, 10),
    st.integers(0, 20),
)
def test_the_pace_is_within_bounds_whatever_was_seen(
    seen: list[tuple[int, bool]], step_s: float, row_s: float, guessed: int
) -> None:
    pace = Pace()
    pace.took(1, step_s + 1e-6)
    pace.took(3, step_s + 2 * row_s)
    for held, failed in seen:
        pace.came(Guess((1,) * 6, 0), (1,) * held + (2,) * failed)
    assert 0 <= pace.best(0, guessed)[0] <= min(guessed, pace.drafts_max)


@dataclass
class Reader:
    """A draft model that guesses nothing and has all of the prompt to read, which takes `piece_s` at a time."""

    piece_s: float
    silent: bool = False
    guess_s: float = 0.0
    behind: int = 0
    under_way_s: float = 0.0
    pieces: int = 0

    def begin(self, prompt: Sequence[int]) -> None:
        self.behind, self.pieces = len(prompt), 0

    def extend(self, ids: Sequence[int]) -> None:
        self.behind += len(ids)

    def guess(self, count: int) -> Guess:
        return NO_GUESS

    def read(self, count: int) -> None:
        self.behind -= count
        self.pieces += 1
        self.under_way_s = self.piece_s

    async def in_thread(self, function: Callable[[], T], /) -> T:
        result = function()
        taken_s, self.under_way_s = self.under_way_s, 0.0
        await trio.sleep(taken_s)
        return result

    def now(self) -> float:
        return trio.current_time() + self.under_way_s


def read_beside(machine: Machine, reader: Reader, pace: Pace, prompt: int, tokens: int = 2) -> float:
    """Seconds to the first token of a request beside which `reader` reads."""

    async def main() -> float:
        speculation = Speculation(draft=reader, pace=pace, now=reader.now)
        host = GenerationHost(VirtualClock(), reader.in_thread, speculation=speculation)
        generation = Generation(machine, HashedEnds(), [1] * prompt, GenerationParams(tokens), host)
        async for _ in generation.tokens():
            pass
        return generation.token_times_s[0]

    return run(main, 0)


def test_a_draft_model_that_reads_for_longer_than_the_route_makes_no_rows_dear() -> None:
    pace = Pace()
    assert read_beside(Machine(0.1, 0.01), Reader(3.0), pace, 100) == pytest.approx(3.0), "of one piece"
    assert pace.row_s == pytest.approx(0.01)
    assert pace.step_s == pytest.approx(0.1)


def test_of_a_later_prompt_no_piece_is_read_that_would_end_after_it() -> None:
    pace, reader, prompt = Pace(), Reader(0.4), 130
    assert read_beside(Machine(0.1, 0.01), reader, pace, prompt) == pytest.approx(4 * 0.4)
    assert read_beside(Machine(0.1, 0.01), reader, pace, prompt) == pytest.approx(0.1 + 129 * 0.01)
    assert reader.pieces == 3
