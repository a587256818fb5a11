"""Whose turn it is: all that have work get the same time of the engine. Pure: times are told, in seconds.

Who takes turns are deployments, and within one its queues. Start-time fair queueing (Goyal and others, 1996): each is
charged what its forwards took, over the number that it stands for, and who was charged least goes next. One that comes,
or comes back after long, starts no lower than the one that was served last; one that had a forward lately starts lower
by CREDIT_S at most, as far as it was charged less. So nobody saves time up while they have no work, and nobody is rid
of a debt, or loses a turn, by having none for a moment, as a client has between an answer and its next step.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from math import inf

from worker.row_times import FORWARD_S

CREDIT_S = FORWARD_S  # so that a token waits for one forward of others, however many they are
COMPANY_S = 10.0  # of the engine's time: longer than clients take between two steps while others have their forwards


@dataclass(slots=True)
class _Account:
    charged_s: float
    ended_s: float = -inf  # when its last forward ended, by the sum of all forwards


@dataclass(slots=True)
class TimeShares:
    _accounts: dict[Hashable, _Account] = field(default_factory=dict)
    _level_s: float = 0.0  # the most that one which was served had been charged before
    _busy_s: float = 0.0  # the sum of all forwards

    def enter(self, who: Hashable) -> None:
        """It has work, perhaps after a time without."""
        account = self._accounts.get(who)
        if account is None:
            self._accounts[who] = _Account(self._level_s)
        else:
            lately = account.ended_s >= self._busy_s - COMPANY_S
            account.charged_s = max(account.charged_s, self._level_s - (CREDIT_S if lately else 0.0))

    def charged_s(self, who: Hashable) -> float:
        """Of one that has entered."""
        return self._accounts[who].charged_s

    def serve(self, who: Hashable) -> None:
        """Its turn has come; no other that has work was charged less."""
        self._level_s = max(self._level_s, self._accounts[who].charged_s)

    def charge(self, who: Hashable, took_s: float, among: int = 1) -> None:
        """A forward of it has ended, in which it stood for so many."""
        account = self._accounts[who]
        self._busy_s += took_s
        account.charged_s += took_s / among
        account.ended_s = self._busy_s

    def used_beside(self, who: Hashable) -> bool:
        """Whether another had a forward not long ago, so that its next step may come at any moment."""
        since = self._busy_s - COMPANY_S
        return any(other != who and account.ended_s >= since for other, account in self._accounts.items())

    def forget(self, who: Hashable) -> None:
        """It has no work, and will have none. Idempotent."""
        self._accounts.pop(who, None)

    @property
    def busy_s(self) -> float:
        """The sum of all forwards."""
        return self._busy_s

    def __len__(self) -> int:
        """How many are known."""
        return len(self._accounts)

    def keep(self, who: Iterable[Hashable]) -> None:
        """Forget all others."""
        self._accounts = {each: self._accounts[each] for each in who}
