"""Speculation: guesses at the next tokens, sent along with the token that is known, and how many of them pay.

Exact by construction: a guess is kept only when it equals the token that sampling gives at its position, so the answer
is the same with and without (generate.py does that). What costs is the work on guesses that fail; what is won are the
round trips of those that hold. `Pace` weighs the two from what it has seen in this request and stops when it does not
pay: it goes on comparing free guesses with what came, so that it can begin again.

Pure: no network, no clock. After Leviathan et al. 2023 (verification) and Saxena 2023 (prompt lookup).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from protocol import limits

NGRAMS = (4, 3, 2)  # longest first: a longer match is a better guess
GAIN_MIN = 1.02  # below this predicted gain the noise of the measurements decides
MEMORY = 0.85  # weight of the past in a running mean
PRIOR_RATE, PRIOR_WEIGHT = 0.6, 2.0  # what a kind of guess is believed to hold before it was seen, as so many guesses
ROW_SHARE_UNKNOWN = 0.1  # of a step's time, for each further row, until one was measured


@dataclass(frozen=True, slots=True)
class Guess:
    """Token ids that may come next. `kind` groups guesses that are equally good, for `Pace`."""

    ids: tuple[int, ...]
    kind: int


NO_GUESS = Guess((), 0)


class Proposer(Protocol):
    """Where guesses come from."""

    def extend(self, ids: Sequence[int]) -> None:
        """These tokens follow what is known so far."""

    def guess(self, count: int) -> Guess:
        """At most `count` tokens that may follow."""


@dataclass(slots=True)
class PromptLookup:
    """Guesses that what followed the last tokens before will follow them again. The last occurrence counts."""

    _ids: list[int] = field(default_factory=list)
    _after: dict[tuple[int, ...], int] = field(default_factory=dict)  # n-gram -> index of what followed it last

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

    A step of 1 + k rows is taken to cost `step_s` + k `row_s`; both are running means of what was measured.
    """

    drafts_max: int = limits.DRAFTS_MAX
    _kinds: dict[int, _Kind] = field(default_factory=dict)
    _step_s: float | None = None
    _row_s: float | None = None

    def drafts(self, guess: Guess) -> int:
        """How many tokens of `guess` to send."""
        rate = self._kind(guess).rate
        best, best_gain = 0, GAIN_MIN
        expected, chance = 1.0, 1.0
        for count in range(1, min(len(guess.ids), self.drafts_max) + 1):
            chance *= rate
            expected += chance
            gain = expected / (1 + count * self.row_share)
            if gain > best_gain:
                best, best_gain = count, gain
        return best

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
        self._kind(guess).note(held, failed=held < len(pairs))

    def took(self, rows: int, seconds: float) -> None:
        """A step of `rows` rows took so long."""
        if rows == 1:
            self._step_s = _mean(self._step_s, seconds)
        elif self._step_s is not None:
            self._row_s = _mean(self._row_s, max(0.0, seconds - self._step_s) / (rows - 1))

    def _kind(self, guess: Guess) -> _Kind:
        return self._kinds.setdefault(guess.kind, _Kind())


def _mean(past: float | None, now: float) -> float:
    return now if past is None else MEMORY * past + (1 - MEMORY) * now


@dataclass(slots=True)
class Speculation:
    """One request's guesses: `begin` with the prompt, then `came` and `next` for each answer.

    `drafted` counts the guesses that were sent, `accepted` those that held.
    """

    proposer: Proposer
    pace: Pace = field(default_factory=Pace)
    drafted: int = 0
    accepted: int = 0
    _guess: Guess = NO_GUESS

    def begin(self, prompt: Sequence[int]) -> None:
        self.proposer.extend(prompt)

    def came(self, ids: Sequence[int]) -> None:
        """These tokens came: the guesses that held, and one more."""
        self.pace.came(self._guess, ids)
        self.accepted += len(ids) - 1
        self.proposer.extend(ids)

    def next(self, room: int) -> tuple[int, ...]:
        """The guesses to send after what came last, at most `room`."""
        self._guess = self.proposer.guess(max(0, min(room, self.pace.drafts_max)))
        sent = self.pace.drafts(self._guess)
        self.drafted += sent
        return self._guess.ids[:sent]
