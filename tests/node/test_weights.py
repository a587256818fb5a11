"""Choosing a precision before a deployment: what it reads, and where."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio

from models.checkpoint import Checkpoint
from models.precision import DEPLOYED
from node.client import Client
from node.weights import Wish, choose_weights
from protocol.errors import RouteUnavailable
from tests.helpers.tiny_models import make_checkpoint


def test_what_is_sealed_is_read_off_the_event_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, on_the_loop = Checkpoint.open(make_checkpoint(tmp_path / "m")), list[bool]()

    async def place(*_: object) -> Any:
        raise RouteUnavailable("nobody has room")

    journal, options = SimpleNamespace(newest=lambda _: []), SimpleNamespace(data_dir=tmp_path)
    client = cast("Client", SimpleNamespace(journal=journal, options=options, place=place))
    monkeypatch.setattr("node.weights.sealed_id", lambda *_: on_the_loop.append(trio.lowlevel.in_trio_run()))
    with pytest.raises(RouteUnavailable, match="room"):
        trio.run(choose_weights, client, checkpoint, None, Wish(None, "latency", 1, 1024))
    assert on_the_loop == [False] * len(DEPLOYED)
