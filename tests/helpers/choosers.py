"""Advice for choosers that is the same for every task."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from client.metalearning.table import Task


@dataclass
class Known:
    """Records that say this of every task."""

    fractions: dict[str, float]
    spread: float = 0.02

    @property
    def ranking(self) -> tuple[str, ...]:
        return tuple(sorted(self.fractions, key=lambda name: -self.fractions[name]))

    def expect(self, tasks: Sequence[Task]) -> list[dict[str, tuple[float, float]]]:
        return [{name: (fraction, self.spread) for name, fraction in self.fractions.items()} for _ in tasks]

    def consider(self, task: Task, allowed: Collection[str]) -> tuple[dict[str, tuple[float, float]], str | None]:
        return self.expect((task,))[0], next((name for name in self.ranking if name in allowed), None)
