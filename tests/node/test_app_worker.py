"""What a worker states of itself in its folder."""

from __future__ import annotations

import errno
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from multiaddr import Multiaddr

from node.app_worker import STATED_EVERY_S, _announced, _meet_neighbours
from node.joining import Leads
from node.lan import Presence
from node.p2p.mesh import MeshConfig, open_mesh
from node.p2p.reach import ReachState
from node.p2p.reaching import Reaching, ReachOptions
from simnet import runtime
from tests.conformance.adapters import GUARD_S, until

DISK_S = 0.3


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """When work was given to a thread. It takes DISK_S of virtual time."""
    began: list[float] = []

    async def inline(work: Callable[..., None], *args: object) -> None:
        began.append(trio.current_time())
        with trio.CancelScope(shield=True):
            await trio.sleep(DISK_S)
        work(*args)

    monkeypatch.setattr("trio.to_thread.run_sync", inline)
    return began


def mesh_of_nobody() -> Any:
    return SimpleNamespace(peer="P", addrs=("a",), listening=("b",), reach=SimpleNamespace(state=ReachState.UNKNOWN))


def stated(folder: Path) -> Any:
    return json.loads((folder / "worker.json").read_text())


@pytest.mark.usefixtures("threads")
def test_a_full_disk_costs_what_is_stated_not_the_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = mesh_of_nobody()

    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    async def main() -> None:
        async with _announced(tmp_path, mesh, {"swarm": "s"}) as renew:
            mesh.reach.state = ReachState.PUBLIC
            with monkeypatch.context() as patched:
                patched.setattr("node.app_worker.write_atomic", full)
                renew()
                await trio.sleep(2 * STATED_EVERY_S)
            assert stated(tmp_path)["reach"] == "unknown"
            renew()
            await trio.sleep(2 * STATED_EVERY_S)
            assert stated(tmp_path)["reach"] == "public"
        assert not (tmp_path / "worker.json").exists()

    runtime.run(main, seed=1)


def test_what_is_stated_is_written_in_a_thread_once_a_second_and_the_last_of_it(
    tmp_path: Path, threads: list[float]
) -> None:
    """Strangers can provoke changes, and the disk may be slow."""
    mesh = mesh_of_nobody()

    async def main() -> None:
        async with _announced(tmp_path, mesh, {}) as renew:
            assert stated(tmp_path)["addrs"] == ["a"]
            for number in range(50):
                mesh.addrs = (str(number),)
                renew()
                await trio.sleep(0.05)
            await trio.sleep(2 * STATED_EVERY_S)
            assert stated(tmp_path)["addrs"] == ["49"]
            assert len(threads) == 3, "two while it changed, one of the last"
            assert all(after - before >= STATED_EVERY_S for before, after in pairwise(threads))
            renew()
            await trio.sleep(DISK_S / 2)
        assert len(threads) == 4
        assert not (tmp_path / "worker.json").exists(), "what was being written does not come back"

    runtime.run(main, seed=1)


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
            with trio.fail_after(GUARD_S):
                async with _announced(tmp_path, mesh, {}) as renew:
                    mesh.reach.on_change = renew
                    nursery.start_soon(_meet_neighbours, mesh, None, Leads())
                    nursery.start_soon(Reaching(mesh, ReachOptions(upnp=False)).run)
                    await until(lambda: bool(on_lan))
                    mesh.host.get_transport_addrs = lambda: [Multiaddr(elsewhere)]  # type: ignore[method-assign]
                    await until(lambda: stated(tmp_path)["addrs"] == [elsewhere])
                    await until(lambda: len(on_lan) == 3)
            nursery.cancel_scope.cancel()
        return before

    monkeypatch.setattr("node.app_worker.on_lan", said)
    before = trio.run(main)
    assert on_lan == [before, (), (elsewhere,), ()]
