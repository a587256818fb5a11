from __future__ import annotations

import pytest


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "adapter" in metafunc.fixturenames:  # gossip has no direct connections
        gossip = "gossip" in metafunc.module.__name__
        bare = ["virtual", "libp2p"] if gossip else ["virtual", "libp2p", "direct"]
        metafunc.parametrize("adapter", [*bare, *(f"private {name}" for name in bare)])
