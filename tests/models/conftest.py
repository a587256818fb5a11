"""Both ways in which rows are computed: by the compiled kernels, and by torch's operations alone."""

from __future__ import annotations

import pytest

from models import kernels


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor that has none."""
    monkeypatch.setattr(kernels, "SUPPORTED", frozenset())


@pytest.fixture(params=["compiled", "torch"])
def in_both_ways(request: pytest.FixtureRequest) -> None:
    if request.param == "torch":
        request.getfixturevalue("without_kernels")
