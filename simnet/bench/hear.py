"""Who hears what a benchmark does while it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


def nobody(*_: Any) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Hear:
    """`found` gets each result as soon as it is measured; `update(done, total)` how much is done, in what the benchmark
    counts (parts, points, requests), the one under way in proportion; `say` what is measured now."""

    found: Callable[[dict[str, Any]], None] = nobody
    update: Callable[[float, int], None] = nobody
    say: Callable[[str], None] = nobody
