"""A client that is given no address: it asks the local network, and says what to do when nobody is there.

The network's answers are the test's own; tests/node/test_lan.py and test_private_swarm.py speak real multicast.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from node import app_client
from node.app_client import ClientOptions, observe
from node.groups import ungrouped
from node.lan import Lan, OnSighting, Presence
from protocol.errors import InputError
from protocol.ids import PeerId
from protocol.membership import PUBLIC_SWARM
from simnet.cluster import Cluster

Sightings = tuple[tuple[PeerId, tuple[str, ...]], ...]


def network(sightings: Sightings = (), trouble: str = "") -> Callable[..., object]:
    """An on_lan where these peers are seen a moment after one began to look."""

    @asynccontextmanager
    async def on_lan(swarm: bytes, presence: Presence | None, on_sighting: OnSighting) -> AsyncIterator[Lan]:
        assert (swarm, presence) == (PUBLIC_SWARM, None)  # a client is not advertised
        for peer, addrs in sightings:
            trio.lowlevel.current_trio_token().run_sync_soon(on_sighting, peer, addrs)
        yield Lan(trouble)

    return on_lan


@pytest.fixture
def looking(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., object]], None]:
    monkeypatch.setenv("SOTTO_LAN", "1")
    monkeypatch.setattr(app_client, "LAN_SEARCH_S", 0.3)
    return lambda on_lan: monkeypatch.setattr(app_client, "on_lan", on_lan)


def members(folder: Path) -> set[PeerId]:
    async def main() -> set[PeerId]:
        with trio.fail_after(60):
            async with observe(ClientOptions(folder, ())) as client:
                return set((await client.discover(lambda view: len(view.members) == 3)).members)

    with ungrouped():
        return trio.run(main)


def test_the_swarm_of_a_peer_that_was_seen_is_joined(
    swarm: Cluster, looking: Callable[..., None], tmp_path: Path
) -> None:
    seen = swarm.workers[1]
    looking(network(((PeerId(seen.peer), (seen.bootstrap,)),)))
    assert members(tmp_path) == {worker.peer for worker in swarm.workers}


@pytest.mark.parametrize("trouble", ["", "multicast is not available here"])
def test_nobody_there(trouble: str, looking: Callable[..., None], tmp_path: Path) -> None:
    looking(network(trouble=trouble))
    with pytest.raises(InputError, match="--bootstrap") as error:
        members(tmp_path)
    assert trouble in str(error.value)


def test_told_not_to_look(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SOTTO_LAN", "0")
    with pytest.raises(InputError, match="SOTTO_LAN"):
        members(tmp_path)
