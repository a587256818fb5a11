from __future__ import annotations

import pytest


@pytest.fixture(params=["virtual", "libp2p", "private virtual", "private libp2p"])
def adapter(request: pytest.FixtureRequest) -> str:
    return str(request.param)
