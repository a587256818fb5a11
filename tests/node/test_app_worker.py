"""What a worker states of itself in its folder."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from node.app_worker import _announced
from node.p2p.reach import ReachState


def test_a_full_disk_costs_what_is_stated_not_the_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mesh: Any = SimpleNamespace(
        peer="P", addrs=("a",), listening=("b",), reach=SimpleNamespace(state=ReachState.UNKNOWN)
    )

    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with _announced(tmp_path, mesh, {"swarm": "s"}) as announce:
        mesh.reach.state = ReachState.PUBLIC
        with monkeypatch.context() as patched:
            patched.setattr("node.app_worker.write_atomic", full)
            announce()
        assert json.loads((tmp_path / "worker.json").read_text())["reach"] == "unknown"
        announce()
        assert json.loads((tmp_path / "worker.json").read_text())["reach"] == "public"
    assert not (tmp_path / "worker.json").exists()
