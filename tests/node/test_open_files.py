"""The limit of open files is raised, and never lowered."""

from __future__ import annotations

import resource
from collections.abc import Iterator

import pytest

from node.open_files import allow_many

FILES = resource.RLIMIT_NOFILE


@pytest.fixture
def few() -> Iterator[int]:
    """The most that this process may ask for; it may have open fewer."""
    soft, most = resource.getrlimit(FILES)
    resource.setrlimit(FILES, (min(soft, 1024) - 1, most))
    yield most
    resource.setrlimit(FILES, (soft, most))


def test_the_limit_rises_to_what_the_system_lets(few: int) -> None:
    allow_many()
    assert resource.getrlimit(FILES) == (few, few)


def test_a_system_that_grants_less_than_it_says(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def setrlimit(kind: int, limits: tuple[int, int]) -> None:
        asked.append(limits)
        if limits[0] == few:
            raise ValueError("current limit exceeds maximum limit")

    monkeypatch.setattr(resource, "setrlimit", setrlimit)
    allow_many()
    assert asked == [(few, few), (10_240, few)]
