"""What a worker states of itself in its folder."""

from __future__ import annotations

import errno
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from multiaddr import Multiaddr

from node.app_worker import _announced, _meet_neighbours
from node.joining import Leads
from node.lan import Presence
from node.p2p.mesh import MeshConfig, open_mesh
from node.p2p.reach import ReachState
from node.p2p.reaching import Reaching, ReachOptions
from tests.conformance.adapters import GUARD_S, until


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


def test_what_is_stated_follows_the_machine_to_another_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has an address only after the worker was started, or gets another."""
    on_lan: list[tuple[str, ...]] = []
    elsewhere = "/ip4/192.0.2.7/tcp/4517"

    @asynccontextmanager
    async def said(swarm: bytes, presence: Presence, sighted: object) -> AsyncIterator[None]:
        on_lan.append(presence.addrs)
        try:
            yield
        finally:
            on_lan.append(())

    async def main() -> tuple[str, ...]:
        async with open_mesh(MeshConfig(bytes(32))) as mesh, trio.open_nursery() as nursery:
            before = mesh.listening
            with trio.fail_after(GUARD_S), _announced(tmp_path, mesh, {}) as announce:
                mesh.reach.on_change = announce
                nursery.start_soon(_meet_neighbours, mesh, None, Leads())
                nursery.start_soon(Reaching(mesh, ReachOptions(upnp=False)).run)
                await until(lambda: bool(on_lan))
                mesh.host.get_transport_addrs = lambda: [Multiaddr(elsewhere)]  # type: ignore[method-assign]
                await until(lambda: json.loads((tmp_path / "worker.json").read_text())["addrs"] == [elsewhere])
                await until(lambda: len(on_lan) == 3)
            nursery.cancel_scope.cancel()
        return before

    monkeypatch.setattr("node.app_worker.on_lan", said)
    before = trio.run(main)
    assert on_lan == [before, (), (elsewhere,), ()]
