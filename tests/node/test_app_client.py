"""What a client's root makes of the way into the swarm that its user gave."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from node.app_client import observe
from node.client import ClientOptions
from protocol.ids import public_key_of
from protocol.invites import InvitePeer, make_invite, print_invite
from protocol.membership import SECRET_BYTES, SwarmKey
from protocol.signed import Identity

SERVER, HOME = "/ip4/8.8.8.8/tcp/4001", "/ip4/192.168.1.7/tcp/4001"
WORKER = Identity(bytes([7]) * 32)


@pytest.mark.parametrize(
    ("addrs", "key", "trusted"),
    [
        ((SERVER,), None, set()),
        ((SERVER, HOME), None, {"private"}),
        ((SERVER,), SwarmKey(bytes(SECRET_BYTES)), {"link-local", "private"}),
    ],
    ids=["a server", "a server and a worker at home", "a private swarm"],
)
def test_workers_are_dialled_in_networks_that_the_user_named_and_wherever_members_state(
    addrs: tuple[str, ...], key: SwarmKey | None, trusted: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @asynccontextmanager
    async def at_once(*_: object) -> AsyncIterator[None]:
        yield

    monkeypatch.setattr("node.app_client.in_touch", at_once)
    monkeypatch.setattr("node.app_client.stay_joined", lambda *_: trio.sleep_forever())
    invite = print_invite(make_invite(key, (InvitePeer(public_key_of(WORKER.peer), addrs),)))

    async def main() -> frozenset[str]:
        with trio.fail_after(20):
            async with observe(ClientOptions(tmp_path, (invite,))) as client:
                return client.ports.trusted

    assert trio.run(main) == trusted
