"""Speculation: guesses at the next tokens, sent along with the token that is known, and how many of them pay.

Exact by construction: a guess is kept only when it equals the token that sampling gives at its position, so the answer
is the same with and without (generate.py does that). What costs is the work on guesses that fail, and a draft model's
own; what is won are the round trips of those that hold. `Pace` weighs them from what it has seen and sends none when
they do not pay. It goes on comparing free guesses with what came, and tries one now and then, so that it can begin
again. How good a guess is and what it costs is only believed, so what may be lost by it is bounded too: the predicted
cost of a step's guesses, and what earlier ones of the request lost, stay within SLOWER_MAX of the request's time.
Excepted from that is reading, which a draft model does while the route is busy: where it is not known yet how long
that will be (of a first prompt), or how long reading takes, an answer may wait for the READ_TOKENS that were begun.

A row is computed beside those of other requests and delays them all. So it is weighed as often as there are requests
under way, else each would send what pays for itself, at the others' expense; and what a row costs is learnt from all
guesses that were under way, else each would take the others' for its own (`Costs`, which they share).

Pure: no network; what time it is, `Speculation` is told by `now`. After Leviathan et al. 2023 (verification), Saxena
2023 (prompt lookup) and Chen et al. 2023 (draft models).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Protocol

from protocol import limits

NGRAMS = (4, 3, 2)  # longest first: a longer match is a better guess
DRAFT = 1  # the kind of a draft model's guesses; those of lookup are the lengths of their n-grams
GAIN_MIN = 1.02  # below this predicted gain the noise of the measurements decides
MEMORY = 0.85  # weight of the past in a running mean
PRIOR_RATE, PRIOR_WEIGHT = 0.6, 2.0  # what a kind of guess is believed to hold before it was seen, as so many guesses
KNOWN_MAX = 8.0  # guesses, by which a draft model is known from earlier requests: this text may be another
STEPS_REMEMBERED = 7  # whose median counts: one that waited for a stranger's work says nothing of the next
SLOWER_MAX = 0.05  # of the time that a request takes without guesses, for those that fail
PROBE_SHARE = 0.01  # of the time, for trying guesses that do not pay; a request's first may take SLOWER_MAX
ROW_SHARE_CHEAP = 0.1  # of a step's time: what a row might cost when it is tried again
AGREEMENT_MEMORY = 0.98  # weight of the past for each guess of a draft model: about the last fifty count
READ_TOKENS = 32  # a draft model reads so many at once, and looks up whether the answer has come


@dataclass(frozen=True, slots=True)
class Guess:
    """Token ids that may come next. `kind` groups guesses that are equally good, for `Pace`."""

    ids: tuple[int, ...]
    kind: int


NO_GUESS = Guess((), 0)


class Proposer(Protocol):
    """Where guesses come from."""

    def begin(self, prompt: Sequence[int]) -> None:
        """A request begins: these tokens are known."""

    def extend(self, ids: Sequence[int]) -> None:
        """These tokens follow what is known so far."""

    def guess(self, count: int) -> Guess:
        """At most `count` tokens that may follow."""


class Drafter(Proposer, Protocol):
    """A proposer whose guesses cost time: client.draft.DraftModel. It makes no more guesses than it is asked for."""

    @property
    def guess_s(self) -> float:
        """Seconds that a guess took when that was measured last."""

    @property
    def silent(self) -> bool:
        """It makes no more guesses at this text: it does not know one of its tokens, or has no room for them."""

    @property
    def behind(self) -> int:
        """Known tokens that it has not read; 0 where it is silent."""

    def read(self, count: int) -> None:
        """Read the next `count` of them."""


@dataclass(slots=True)
class PromptLookup:
    """Guesses that what followed the last tokens before will follow them again. The last occurrence counts."""

    _ids: list[int] = field(default_factory=list)
    _after: dict[tuple[int, ...], int] = field(default_factory=dict)  # n-gram -> index of what followed it last

    def begin(self, prompt: Sequence[int]) -> None:
        self._ids, self._after = [], {}
        self.extend(prompt)

    def extend(self, ids: Sequence[int]) -> None:
        for token in ids:
            for length in NGRAMS:
                if len(self._ids) >= length:
                    self._after[tuple(self._ids[-length:])] = len(self._ids)
            self._ids.append(token)

    def guess(self, count: int) -> Guess:
        for length in NGRAMS:
            start = self._after.get(tuple(self._ids[-length:])) if len(self._ids) >= length else None
            if start is not None:
                return Guess(tuple(self._ids[start : start + count]), length)
        return NO_GUESS


@dataclass(slots=True)
class _Kind:
    """How often guesses of one kind held, as a running mean over single tokens."""

    held: float = PRIOR_RATE * PRIOR_WEIGHT
    seen: float = PRIOR_WEIGHT

    @property
    def rate(self) -> float:
        return self.held / self.seen

    def note(self, held: int, failed: bool) -> None:
        self.held = MEMORY * self.held + held
        self.seen = MEMORY * self.seen + held + failed

    def add(self, held: float, seen: float) -> None:
        self.held += held
        self.seen += seen


@dataclass(slots=True)
class Agreement:
    """How often guesses of a draft model hold, over the requests of a model: what is known before the next one."""

    _held: float = 0.0
    _seen: float = 0.0

    @property
    def known(self) -> tuple[float, float]:
        """So many guesses held of so many, KNOWN_MAX at most: what is believed of the next request."""
        share = min(1.0, KNOWN_MAX / self._seen) if self._seen else 0.0
        return share * self._held, share * self._seen

    def believe(self, rate: float | None, guesses: int) -> None:
        """Nothing is known but that `rate` of so many guesses held; None: nothing at all."""
        self._seen = 0.0 if rate is None else float(guesses)
        self._held = self._seen * (rate or 0.0)

    @property
    def rate(self) -> float | None:
        """Of single guesses, 0 to 1; None before there was one."""
        return self._held / self._seen if self._seen else None

    def note(self, held: int, failed: bool) -> None:
        """So many guesses in a row held, and the next one did not, or there was none."""
        past = AGREEMENT_MEMORY ** (held + failed)
        self._held = past * self._held + held
        self._seen = past * self._seen + held + failed


@dataclass(slots=True)
class Costs:
    """What steps take over one route, of all requests of a model. Medians of the last ones. `guesses`: those under
    way. Changed on the event loop alone; what is read in threads is replaced as a whole."""

    guesses: int = 0
    _steps_s: tuple[float, ...] = ()
    _rows_s: tuple[float, ...] = ()

    @property
    def step_s(self) -> float | None:
        """Seconds of a step of one row; None before there was one."""
        return _median(self._steps_s) if self._steps_s else None

    @property
    def row_s(self) -> float:
        """Seconds for each further row; as much as a whole step before anything is known."""
        return _median(self._rows_s) if self._rows_s else self.step_s or 0.0

    @property
    def knows_rows(self) -> bool:
        return bool(self._rows_s)

    def prefilled(self, rows: int, seconds: float) -> None:
        """A prompt took so long: what a row costs is believed from that until guesses say it."""
        if not self._rows_s:
            self._note_rows(rows, seconds)

    def took(self, rows: int, seconds: float, probe: bool, others: int) -> None:
        """A step of `rows` rows took so long, while `others` more were under way; see `Pace.took`."""
        beside = rows + others
        if probe and seconds - (self.step_s or 0.0) < self.row_s * (beside - 1):
            self._rows_s = ()
        if beside == 1 or self.step_s is None:
            self._steps_s = _latest(self._steps_s, seconds)
        else:  # more rows in less time: the route became faster
            self._steps_s = _latest(self._steps_s, min(self.step_s, seconds))
            self._note_rows(beside, seconds)

    def _note_rows(self, rows: int, seconds: float) -> None:
        self._rows_s = _latest(self._rows_s, max(0.0, seconds - (self.step_s or 0.0)) / (rows - 1))


@dataclass(slots=True)
class Pace:
    """How many guesses to send: the number with the highest predicted rate of tokens, 0 when none pays.

    A step of 1 + k rows is taken to cost `step_s` + k (`row_s` + what a guess costs), by `costs`. A draft model is
    believed to hold as often as it did before, by `agreement`, until this text shows otherwise.
    It may serve several requests over the same route, one after the other.
    """

    drafts_max: int = limits.DRAFTS_MAX
    costs: Costs = field(default_factory=Costs)
    agreement: Agreement = field(default_factory=Agreement)
    _kinds: dict[int, _Kind] = field(default_factory=dict)
    _prompt: tuple[int, float] | None = None  # rows and seconds, until a step of one row says what they mean
    _prompt_row_s: float = inf  # of the last prompt

    @property
    def step_s(self) -> float | None:
        """Seconds of a step of one row; None before there was one."""
        return self.costs.step_s

    @property
    def row_s(self) -> float:
        """Seconds for each further row."""
        return self.costs.row_s

    def prompt_s(self, rows: int) -> float:
        """Seconds for a prompt of so many rows, at the rate of the last one; infinite before there was one."""
        return max(rows * self._prompt_row_s, self.step_s or 0.0)

    def best(self, kind: int, count_max: int, guess_s: float = 0.0, beside: int = 1) -> tuple[int, float]:
        """How many guesses of `kind` to send, at most `count_max`, and the predicted gain: 1 is a step without any.

        `guess_s` is what each one costs before it can be sent, `beside` how many requests its row delays.
        """
        step_s = self.step_s
        return self._best(kind, count_max, (beside * self.row_s + guess_s) / step_s if step_s else 1.0)

    def hopeful(self, kind: int) -> bool:
        """Whether a guess of `kind` would pay if a row cost little."""
        return self._best(kind, 1, ROW_SHARE_CHEAP)[0] > 0

    def came(self, guess: Guess, ids: Sequence[int]) -> None:
        """`ids` came where `guess` was made, whether or not it was sent."""
        if not guess.ids or not ids:
            return
        pairs = list(zip(guess.ids, ids, strict=False))
        held = next((index for index, (guessed, came) in enumerate(pairs) if guessed != came), len(pairs))
        self._kind(guess.kind).note(held, failed=held < len(pairs))
        if guess.kind == DRAFT:
            self.agreement.note(held, failed=held < len(pairs))

    def prefilled(self, rows: int, seconds: float) -> None:
        """A prompt of `rows` rows took so long: what a row costs is believed from that until guesses say it."""
        self._prompt_row_s = seconds / rows
        if rows > 1 and not self.costs.knows_rows:
            self._prompt = (rows, seconds)

    def took(self, rows: int, seconds: float, probe: bool = False, others: int = 0) -> None:
        """A step of `rows` rows took so long, while `others` guesses of other requests were under way. A `probe` was
        sent to see whether rows are cheaper than was believed: if they are, it counts alone; if not, it is one of
        several, for it may have waited for a stranger's work."""
        if rows == 1 or self.step_s is not None:
            self.costs.took(rows, seconds, probe, others)
        if rows == 1 and self._prompt is not None:
            self.costs.prefilled(*self._prompt)
            self._prompt = None

    def _best(self, kind: int, count_max: int, share: float) -> tuple[int, float]:
        """`best` where each guess costs `share` of a step of one row."""
        rate = self._kind(kind).rate
        best, best_gain = 0, GAIN_MIN
        expected, chance = 1.0, 1.0
        for count in range(1, min(count_max, self.drafts_max) + 1):
            chance *= rate
            expected += chance
            gain = expected / (1 + count * share)
            if gain > best_gain:
                best, best_gain = count, gain
        return best, best_gain if best else 1.0

    def _kind(self, kind: int) -> _Kind:
        if kind not in self._kinds:
            self._kinds[kind] = _Kind()
            if kind == DRAFT:
                self._kinds[kind].add(*self.agreement.known)
        return self._kinds[kind]


def _latest(seen: tuple[float, ...], now: float) -> tuple[float, ...]:
    return (*seen, now)[-STEPS_REMEMBERED:]


def _median(seen: tuple[float, ...]) -> float:
    """Of an even number the lower of the two in the middle: what disturbs a step only makes it slower."""
    return sorted(seen)[(len(seen) - 1) // 2]


def _mean(past: float | None, now: float) -> float:
    return now if past is None else MEMORY * past + (1 - MEMORY) * now


def _no_time() -> float:
    return 0.0


def _alone() -> int:
    return 1


@dataclass(slots=True)
class Speculation:
    """One request's guesses: `begin` with the prompt, then `came` and `next` for each answer.

    Of a lookup and a draft model the one with the higher predicted gain is sent. `now` gives monotonic seconds, by
    which the draft model's cost is measured, `beside` how many requests are under way. `drafted` counts the guesses
    that were sent, `accepted` those that held.
    """

    lookup: Proposer | None = None
    draft: Drafter | None = None
    pace: Pace = field(default_factory=Pace)
    now: Callable[[], float] = _no_time
    beside: Callable[[], int] = _alone
    drafted: int = 0
    accepted: int = 0
    _made: tuple[Guess, ...] = ()
    _probing: bool = False
    _under_way: int = 0  # guesses
    _others: int = 0  # of other requests, when these were sent
    _guess_s: float | None = None  # of the draft model, in this request
    _read_s: float | None = None  # of the draft model, for one token of many
    _time_s: float = 0.0  # of this request: its prompt, its steps, its draft model
    _lost_s: float = 0.0  # of that, by guesses; less than 0: won
    _sent_at_s: float = 0.0  # in `_time_s`: guesses were sent last
    _drafted_at_s: float = 0.0  # in `_time_s`: the draft model was asked last

    def begin(self, prompt: Sequence[int]) -> None:
        self._made = ()
        for proposer in self._proposers:
            proposer.begin(prompt)

    def sent(self, guesses: int) -> None:
        """A step with so many guesses is on its way: `took`, or `landed`, follows. On the event loop, as these."""
        self._others, self._under_way = self.pace.costs.guesses, guesses
        self.pace.costs.guesses += guesses

    def landed(self) -> None:
        """Nothing is under way any more. Idempotent."""
        self.pace.costs.guesses -= self._under_way
        self._under_way = 0

    def came(self, ids: Sequence[int]) -> None:
        """These tokens came: the guesses that held, and one more."""
        for guess in self._made:
            self.pace.came(guess, ids)
        self.accepted += len(ids) - 1
        self._lost_s -= (len(ids) - 1) * (self.pace.step_s or 0.0)
        for proposer in self._proposers:
            proposer.extend(ids)

    def prefilled(self, rows: int, seconds: float) -> None:
        """The prompt, or what of it was not held, took so long."""
        self.pace.prefilled(rows, seconds)
        self._time_s += seconds

    def took(self, rows: int, seconds: float) -> None:
        """A step of `rows` rows took so long."""
        self.landed()
        others = max(self._others, self.pace.costs.guesses)
        self.pace.took(rows, seconds, self._probing and rows > 1, others)
        self._time_s += seconds
        self._lost_s += (rows - 1) * self._row_s  # as believed: a stranger's work is not the guesses' fault

    def next(self, room: int) -> tuple[int, ...]:
        """The guesses to send after what came last, at most `room`; none before a step without any was measured."""
        looked, count, gain = self._looked(room)
        asked, self._probing = self._asked(room, gain)
        drafted = self._drafted(asked)
        self._made = (looked, drafted)
        sent = drafted.ids or looked.ids[:count] or self._probe(looked)
        if sent:
            self.drafted += len(sent)
            self._sent_at_s = self._time_s
        return sent

    def asks(self, room: int) -> bool:
        """Whether `next` would have the draft model guess, which takes a while."""
        return self._asked(room, self._looked(room)[2])[0] > 0

    def readable(self, wait_s: float) -> int:
        """How many tokens the draft model can read in `wait_s` seconds of waiting; 0 when it keeps up anyway."""
        if self.draft is None or not self._lags or wait_s < READ_TOKENS * (self._read_s or 0.0):
            return 0
        return min(READ_TOKENS, self.draft.behind)

    def read(self, tokens: int) -> None:
        """Let the draft model read."""
        if self.draft is not None and tokens:
            started = self.now()
            self.draft.read(tokens)
            self._read_s = _mean(self._read_s, (self.now() - started) / tokens)

    def _looked(self, room: int) -> tuple[Guess, int, float]:
        """What lookup finds, how many of that to send, and the predicted gain."""
        looked = self.lookup.guess(self._within(room)) if self.lookup else NO_GUESS
        affordable = min(len(looked.ids), self._affordable(self._row_s))
        return looked, *self.pace.best(looked.kind, affordable, beside=self.beside())

    def _asked(self, room: int, gain_else: float) -> tuple[int, bool]:
        """How many guesses to ask the draft model for, which must promise more than `gain_else`, and whether that is to
        see how it does."""
        room = self._within(room)
        if self.draft is None or self.draft.silent or not room or self._lags:
            return 0, False
        guess_s = self.draft.guess_s if self._guess_s is None else self._guess_s
        cost_s = guess_s + self._row_s
        count, gain = self.pace.best(DRAFT, min(room, self._affordable(cost_s)), guess_s, self.beside())
        if gain > gain_else:
            return count, False
        probes = gain_else <= 1.0 and self._may_probe(cost_s, self._drafted_at_s)
        return int(probes), probes

    def _within(self, room: int) -> int:
        return max(0, min(room, self.pace.drafts_max))

    def _drafted(self, count: int) -> Guess:
        """So many of the draft model's guesses."""
        if self.draft is None or not count:
            return NO_GUESS
        started = self.now()
        guess = self.draft.guess(count)
        took_s = self.now() - started
        self._time_s += took_s
        self._lost_s += took_s
        self._drafted_at_s = self._time_s
        if guess.ids:
            self._guess_s = _mean(self._guess_s, took_s / len(guess.ids))
        return guess

    def _probe(self, looked: Guess) -> tuple[int, ...]:
        """One guess that does not pay, by what is believed, and would if that were wrong."""
        if looked.ids and self.pace.hopeful(looked.kind) and self._may_probe(self._row_s, self._sent_at_s):
            self._probing = True
            return looked.ids[:1]
        return ()

    def _may_probe(self, cost_s: float, last_s: float) -> bool:
        """Whether a guess that costs so much may be tried, as far as the time goes that one was made last."""
        share = PROBE_SHARE if self.drafted else SLOWER_MAX
        return cost_s <= share * (self._time_s - last_s) and self._affordable(cost_s) > 0

    def _affordable(self, cost_s: float) -> int:
        """How many guesses that cost so much may fail without making the request slower than it may be; 0 before a step
        was measured."""
        if self.pace.step_s is None:
            return 0
        left_s = SLOWER_MAX * (self._time_s - self._lost_s) - self._lost_s
        most = self.pace.drafts_max
        if most * cost_s <= max(0.0, left_s):
            return most
        return int(left_s / cost_s) if left_s > 0 else 0

    @property
    def _row_s(self) -> float:
        """What a row costs all requests that are computed beside it."""
        return self.beside() * self.pace.row_s

    @property
    def _lags(self) -> bool:
        """The draft model has more to read than a step can bring: it reads before it guesses, while the route works."""
        return self.draft is not None and self.draft.behind > self.pace.drafts_max + 1

    @property
    def _proposers(self) -> tuple[Proposer, ...]:
        return tuple(each for each in (self.lookup, self.draft) if each is not None)
