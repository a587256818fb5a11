from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.engines import Shop, random_tensors


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path, [random_tensors(seed) for seed in range(3)])
