"""Speculation: guesses at the next tokens, sent along with the token that is known, and how many of them pay.

Exact by construction: a guess is kept only when it equals the token that sampling gives at its position, so the answer
is the same with and without (generate.py does that). What costs is the work on guesses that fail, and a draft model's
own; what is won are the round trips of those that hold. `Pace` weighs them from what it has seen in this request and
stops when they do not pay. It goes on comparing free guesses with what came, and tries one of the draft model's now and
then, so that it can begin again.

Pure: no network; what time it is, `Speculation` is told by `now`. After Leviathan et al. 2023 (verification), Saxena
2023 (prompt lookup) and Chen et al. 2023 (draft models).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from protocol import limits

NGRAMS = (4, 3, 2)  # longest first: a longer match is a better guess
DRAFT = 1  # the kind of a draft model's guesses; those of lookup are the lengths of their n-grams
GAIN_MIN = 1.02  # below this predicted gain the noise of the measurements decides
MEMORY = 0.85  # weight of the past in a running mean
PRIOR_RATE, PRIOR_WEIGHT = 0.6, 2.0  # what a kind of guess is believed to hold before it was seen, as so many guesses
ROW_SHARE_UNKNOWN = 0.1  # of a step's time, for each further row, until one was measured
PROBE_SHARE = 0.01  # of the time, for trying a draft model that does not pay
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
    def behind(self) -> int:
        """Known tokens that it has not read."""

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


@dataclass(slots=True)
class Pace:
    """How many guesses to send: the number with the highest predicted rate of tokens, 0 when none pays.

    A step of 1 + k rows is taken to cost `step_s` + k (`row_s` + what a guess costs); all are running means of what was
    measured. It may serve several requests over the same route, one after the other.
    """

    drafts_max: int = limits.DRAFTS_MAX
    _kinds: dict[int, _Kind] = field(default_factory=dict)
    _step_s: float | None = None
    _row_s: float | None = None

    @property
    def step_s(self) -> float | None:
        """Seconds of a step of one row; None before there was one."""
        return self._step_s

    def best(self, kind: int, count_max: int, guess_s: float = 0.0) -> tuple[int, float]:
        """How many guesses of `kind` to send, at most `count_max`, and the predicted gain: 1 is a step without any.

        `guess_s` is what each one costs before it can be sent.
        """
        rate = self._kind(kind).rate
        share = self.row_share + (guess_s / self._step_s if self._step_s else 0.0)
        best, best_gain = 0, GAIN_MIN
        expected, chance = 1.0, 1.0
        for count in range(1, min(count_max, self.drafts_max) + 1):
            chance *= rate
            expected += chance
            gain = expected / (1 + count * share)
            if gain > best_gain:
                best, best_gain = count, gain
        return best, best_gain if best else 1.0

    @property
    def row_share(self) -> float:
        """Cost of one further row, as a share of a step of one."""
        if self._step_s is None or self._row_s is None:
            return ROW_SHARE_UNKNOWN
        return self._row_s / self._step_s

    def came(self, guess: Guess, ids: Sequence[int]) -> None:
        """`ids` came where `guess` was made, whether or not it was sent."""
        if not guess.ids or not ids:
            return
        pairs = list(zip(guess.ids, ids, strict=False))
        held = next((index for index, (guessed, came) in enumerate(pairs) if guessed != came), len(pairs))
        self._kind(guess.kind).note(held, failed=held < len(pairs))

    def took(self, rows: int, seconds: float) -> None:
        """A step of `rows` rows took so long."""
        if rows == 1:
            self._step_s = _mean(self._step_s, seconds)
        elif self._step_s is not None:
            if seconds < self._step_s:  # more rows in less time: the route became faster
                self._step_s = _mean(self._step_s, seconds)
            self._row_s = _mean(self._row_s, max(0.0, seconds - self._step_s) / (rows - 1))

    def _kind(self, kind: int) -> _Kind:
        return self._kinds.setdefault(kind, _Kind())


def _mean(past: float | None, now: float) -> float:
    return now if past is None else MEMORY * past + (1 - MEMORY) * now


def _no_time() -> float:
    return 0.0


@dataclass(slots=True)
class Speculation:
    """One request's guesses: `begin` with the prompt, then `came` and `next` for each answer.

    Of a lookup and a draft model the one with the higher predicted gain is sent. `now` gives monotonic seconds, by
    which the draft model's cost is measured. `drafted` counts the guesses that were sent, `accepted` those that held.
    """

    lookup: Proposer | None = None
    draft: Drafter | None = None
    pace: Pace = field(default_factory=Pace)
    now: Callable[[], float] = _no_time
    drafted: int = 0
    accepted: int = 0
    _made: tuple[Guess, ...] = ()
    _guess_s: float | None = None  # of the draft model, in this request
    _read_s: float | None = None  # of the draft model, for one token of many
    _since_probe_s: float = 0.0

    def begin(self, prompt: Sequence[int]) -> None:
        self._made = ()
        for proposer in self._proposers:
            proposer.begin(prompt)

    def came(self, ids: Sequence[int]) -> None:
        """These tokens came: the guesses that held, and one more."""
        for guess in self._made:
            self.pace.came(guess, ids)
        self.accepted += len(ids) - 1
        for proposer in self._proposers:
            proposer.extend(ids)

    def took(self, rows: int, seconds: float) -> None:
        """A step of `rows` rows took so long."""
        self.pace.took(rows, seconds)
        self._since_probe_s += seconds

    def next(self, room: int) -> tuple[int, ...]:
        """The guesses to send after what came last, at most `room`; none before a step without any was measured."""
        room = max(0, min(room, self.pace.drafts_max))
        looked = self.lookup.guess(room) if self.lookup else NO_GUESS
        count, gain = self.pace.best(looked.kind, len(looked.ids)) if self.pace.step_s else (0, 1.0)
        drafted = self._draft(room, gain)
        self._made = (looked, drafted)
        sent = drafted.ids or looked.ids[:count]
        self.drafted += len(sent)
        return sent

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

    def _draft(self, room: int, gain_else: float) -> Guess:
        """The draft model's guesses, when they promise more than `gain_else`."""
        step_s = self.pace.step_s
        if self.draft is None or step_s is None or not room or self._lags:
            return NO_GUESS
        guess_s = self.draft.guess_s if self._guess_s is None else self._guess_s
        count, gain = self.pace.best(DRAFT, room, guess_s)
        if gain <= gain_else:
            if gain_else > 1.0 or PROBE_SHARE * self._since_probe_s < guess_s + self.pace.row_share * step_s:
                return NO_GUESS
            count = 1
        started, self._since_probe_s = self.now(), 0.0
        guess = self.draft.guess(count)
        if guess.ids:
            self._guess_s = _mean(self._guess_s, (self.now() - started) / len(guess.ids))
        return guess

    @property
    def _lags(self) -> bool:
        """The draft model has more to read than a step can bring: it reads before it guesses, while the route works."""
        return self.draft is not None and self.draft.behind > self.pace.drafts_max + 1

    @property
    def _proposers(self) -> tuple[Proposer, ...]:
        return tuple(each for each in (self.lookup, self.draft) if each is not None)
