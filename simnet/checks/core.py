"""Checks of a whole system with real processes: each a claim that the README makes, tried out and measured.

A check is a function that takes a Scene, and returns the figures that it measured or raises CheckFailed. Checks do not
depend on each other. What they start ends with them, whatever happens.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from node.groups import leaf

Figures = dict[str, Any]


class CheckFailed(Exception):
    """The claim does not hold; the text says what was seen instead."""

    def __init__(self, message: str, figures: Figures | None = None) -> None:
        super().__init__(message)
        self.figures = figures or {}


@dataclass(frozen=True, slots=True)
class Scene:
    """Where a check runs. `folder` is its own and empty; `model` a checkpoint; `say` tells people what goes on."""

    folder: Path
    model: Path
    rounds: int  # how often what depends on chance is tried
    random: random.Random
    say: Callable[[str], None]


Check = Callable[[Scene], Figures]


@dataclass(frozen=True, slots=True)
class Finding:
    """How one check ended."""

    name: str
    passed: bool
    figures: Figures
    detail: str
    seconds: float


def run_checks(
    checks: Mapping[str, Check], model: Path, rounds: int, seed: int, say: Callable[[str], None]
) -> Iterator[Finding]:
    """One finding for each check, in order. Whatever a check raises is its failure; the others run all the same."""
    for name, check in checks.items():
        say(f"{name} ...")
        started = time.monotonic()
        with _folder() as folder:
            scene = Scene(folder, model, rounds, random.Random(f"{seed} {name}"), lambda text: say(f"    {text}"))
            passed, figures, detail = _run(check, scene)
        seconds = round(time.monotonic() - started, 1)
        say(f"    {'passed' if passed else 'FAILED: ' + detail} ({seconds:g} s)")
        yield Finding(name, passed, figures, detail, seconds)


def require(holds: bool, what: str, figures: Figures | None = None) -> None:
    """Raises CheckFailed(what) unless it holds."""
    if not holds:
        raise CheckFailed(what, figures)


def _run(check: Check, scene: Scene) -> tuple[bool, Figures, str]:
    try:
        return True, check(scene), ""
    except CheckFailed as failure:
        return False, failure.figures, str(failure)
    except Exception as error:
        cause = leaf(error)
        return False, {}, f"{type(cause).__name__}: {cause}"


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="sotto-check-") as folder:
        yield Path(folder)
