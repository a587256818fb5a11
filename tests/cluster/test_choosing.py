"""Which clients get ready to choose strategies: seconds of a processor that others should not spend."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest
import trio

from node.app_client import observe, open_client
from node.choosing import Choosing
from node.client import Client, ClientOptions
from node.groups import ungrouped
from simnet.cluster import Cluster

Opener = Callable[[ClientOptions], AbstractAsyncContextManager[Client]]


@pytest.mark.parametrize(
    ("opened", "changes", "ready"),
    [
        (open_client, {}, True),
        (open_client, {"chooses": False}, False),
        (open_client, {"origin": "bench"}, False),
        (observe, {}, False),
    ],
)
def test_only_clients_that_choose_get_ready_to(
    opened: Opener,
    changes: dict[str, Any],
    ready: bool,
    swarm: Cluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun = list[Choosing]()

    async def prepare(choosing: Choosing, history: object) -> None:
        begun.append(choosing)

    async def main() -> None:
        async with opened(ClientOptions(tmp_path, (swarm.bootstrap,), **changes)) as client:
            for _ in range(3):
                await trio.lowlevel.checkpoint()
            assert begun == ([client.choosing] if ready else [])

    monkeypatch.setattr(Choosing, "prepare", prepare)
    with ungrouped():
        trio.run(main)
