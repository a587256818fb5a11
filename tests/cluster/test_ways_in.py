"""How a client finds its way in without an address, what it says when nobody is there, and how it finds back.

The local network's answers are the test's own; tests/node/test_lan.py and test_private_swarm.py speak real multicast.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from node import entering, joining
from node.app_client import observe
from node.client import ClientOptions
from node.groups import ungrouped
from node.lan import Lan, OnSighting, Presence
from node.p2p.mesh import Mesh, MeshConfig, open_mesh
from protocol.errors import InputError, TransportError
from protocol.ids import PeerId, public_key_of
from protocol.invites import InvitePeer, make_invite, print_invite
from protocol.membership import PUBLIC_SWARM, SwarmKey
from protocol.signed import Identity
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
    monkeypatch.setattr(entering, "LAN_SEARCH_S", 0.3)
    return lambda on_lan: monkeypatch.setattr(entering, "on_lan", on_lan)


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


@pytest.mark.parametrize("there", ["nobody", "another node"])
def test_an_invite_that_is_out_of_date_says_so(there: str, tmp_path: Path) -> None:
    gone = InvitePeer(public_key_of(Identity(b"\x31" * 32).peer), ("/ip4/127.0.0.1/tcp/9",))

    async def main() -> None:
        async with open_mesh(MeshConfig(bytes(32))) as node:
            peer = gone if there == "nobody" else replace(gone, addrs=(node.addrs[0],))
            invite = print_invite(make_invite(SwarmKey(bytes(32)), (peer,)))
            with pytest.raises(TransportError, match="a member must print a new one with 'sotto invite'"):
                async with observe(ClientOptions(tmp_path, (invite,))):
                    pass

    with ungrouped():
        trio.run(_guarded, main)


def test_a_client_that_lost_its_way_in_finds_it_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    joined, connect = [], Mesh.connect

    async def noted(mesh: Mesh, addr: str) -> PeerId:
        joined.append(await connect(mesh, addr))
        return joined[-1]

    monkeypatch.setattr(Mesh, "connect", noted)
    monkeypatch.setattr(joining, "CHECK_S", 0.1)

    async def main() -> None:
        async with open_mesh(MeshConfig(bytes(32))) as node:
            addr, peer = node.addrs[0], node.peer
            async with observe(ClientOptions(tmp_path, (f"{addr}/p2p/{peer}",))) as client:
                transport = client.ports.transport
                assert transport.connected() == (peer,)
                await node._host.shut_down()  # what is left listens, and lets it in again
                while len(joined) < 2 or not transport.connected():  # the gap between may be too short to see
                    await trio.sleep(0.02)

    with ungrouped():
        trio.run(_guarded, main)


async def _guarded(main: Callable[[], Awaitable[None]]) -> None:
    with trio.fail_after(30):
        await main()
