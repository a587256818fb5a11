"""The way into a swarm: what people give, and the key in a worker's folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from node.entry import KEY_FILE, Entry, invite_by, invite_of_worker, key_of_worker, read_entry
from node.lifetime import only_user_of
from protocol.errors import InputError
from protocol.ids import public_key_of
from protocol.invites import InvitePeer, make_invite, print_invite
from protocol.membership import PUBLIC_SWARM, SwarmKey
from tests.helpers.adverts import peer

KEY, OTHER = SwarmKey(b"\1" * 32), SwarmKey(b"\2" * 32)
ADDR = f"/ip4/192.0.2.7/tcp/4517/p2p/{peer(1)}"
PEERS = (InvitePeer(public_key_of(peer(1)), ("/ip4/192.0.2.7/tcp/4517",)),)
PUBLIC, PRIVATE, FOREIGN = (print_invite(make_invite(key, PEERS)) for key in (None, KEY, OTHER))
NO_ENTRY = Entry()


def entropy(size: int) -> bytes:
    return b"\3" * size


def test_addresses_and_invites_are_read_alike() -> None:
    assert read_entry([]) == NO_ENTRY
    assert read_entry([f" {ADDR}\n"]) == Entry((ADDR,), None, False)
    assert read_entry([PUBLIC, ADDR]) == Entry((ADDR,), None, True)
    other = f"/dns4/worker.example/tcp/1/p2p/{peer(2)}"
    private = read_entry([other, PRIVATE, PRIVATE])
    assert private.addrs == (other, ADDR)
    assert private.key is not None
    assert private.key.secret == KEY.secret


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([PRIVATE, FOREIGN], "different swarms"),
        ([PRIVATE, PUBLIC], "different swarms"),
        (["/ip4/192.0.2.7/tcp/4517"], "/p2p/"),
        ([PRIVATE[:-3]], "copy it again"),
        ([print_invite(make_invite(None, (InvitePeer(PEERS[0].public_key, ("rubbish",)),)))], "rubbish"),
    ],
)
def test_what_leads_nowhere_is_said(given: list[str], says: str) -> None:
    with pytest.raises(InputError, match=says):
        read_entry(given)


def test_a_private_swarms_key_is_made_once_and_for_its_owner_only(tmp_path: Path) -> None:
    key = key_of_worker(tmp_path, NO_ENTRY, True, entropy)
    assert key is not None
    assert key.secret == entropy(32)
    assert (tmp_path / KEY_FILE).stat().st_mode & 0o777 == 0o600
    for private in (True, None):
        again = key_of_worker(tmp_path, NO_ENTRY, private, os.urandom)
        assert again is not None
        assert again.swarm == key.swarm
    (tmp_path / KEY_FILE).chmod(0o644)
    with pytest.raises(InputError, match="read by others"):
        key_of_worker(tmp_path, NO_ENTRY, None, entropy)


def test_a_worker_is_public_unless_told(tmp_path: Path) -> None:
    assert key_of_worker(tmp_path, NO_ENTRY, None, entropy) is None
    assert key_of_worker(tmp_path, read_entry([PUBLIC]), None, entropy) is None
    assert key_of_worker(tmp_path, read_entry([ADDR]), None, entropy) is None
    assert not (tmp_path / KEY_FILE).exists()


def test_a_folder_with_a_key_serves_the_public_swarm_only_when_told(tmp_path: Path) -> None:
    key_of_worker(tmp_path, read_entry([PRIVATE]), None, entropy)
    assert (tmp_path / KEY_FILE).read_bytes() == KEY.secret
    assert key_of_worker(tmp_path, read_entry([ADDR]), None, entropy) is not None
    with pytest.raises(InputError, match="--public"):
        key_of_worker(tmp_path, read_entry([PUBLIC]), None, entropy)
    assert key_of_worker(tmp_path, read_entry([PUBLIC]), False, entropy) is None
    assert (tmp_path / KEY_FILE).read_bytes() == KEY.secret


def test_a_key_is_never_overwritten(tmp_path: Path) -> None:
    key_of_worker(tmp_path, read_entry([PRIVATE]), None, entropy)
    with pytest.raises(InputError, match="another private swarm"):
        key_of_worker(tmp_path, read_entry([FOREIGN]), None, entropy)
    assert (tmp_path / KEY_FILE).read_bytes() == KEY.secret


@pytest.mark.parametrize(("token", "private"), [(PRIVATE, False), (PUBLIC, True)])
def test_an_invite_and_a_flag_that_contradict(token: str, private: bool, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        key_of_worker(tmp_path, read_entry([token]), private, entropy)


@pytest.fixture
def running(tmp_path: Path) -> Iterator[None]:
    """A worker runs on the folder."""
    with only_user_of(tmp_path, "worker"):
        yield


def state(folder: Path, swarm: bytes, addrs: list[str]) -> None:
    record = {"pid": os.getpid(), "peer": peer(1), "addrs": addrs, "swarm": swarm.hex(), "metrics": ""}
    (folder / "worker.json").write_text(json.dumps(record))


@pytest.mark.usefixtures("running")
def test_an_invite_of_the_running_worker(tmp_path: Path) -> None:
    state(tmp_path, PUBLIC_SWARM, ["/ip4/127.0.0.1/tcp/1", "/ip4/192.0.2.7/tcp/4517", "/ip6/::1/tcp/1"])
    assert invite_of_worker(tmp_path) == make_invite(None, PEERS)
    state(tmp_path, PUBLIC_SWARM, ["/ip4/127.0.0.1/tcp/1", "/ip6/::1/tcp/1"])
    assert invite_of_worker(tmp_path).peers[0].addrs == ("/ip4/127.0.0.1/tcp/1", "/ip6/::1/tcp/1")
    key_of_worker(tmp_path, read_entry([PRIVATE]), None, entropy)
    assert invite_of_worker(tmp_path).key is None  # it serves the public swarm: --public
    state(tmp_path, KEY.swarm, ["/ip4/192.0.2.7/tcp/4517"])
    assert print_invite(invite_of_worker(tmp_path)) == PRIVATE


def test_no_invite_of_a_worker_that_is_gone_though_its_number_may_live_on(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no worker runs"):
        invite_of_worker(tmp_path)
    state(tmp_path, PUBLIC_SWARM, ["/ip4/192.0.2.7/tcp/4517"])
    with pytest.raises(InputError, match="no worker runs"):
        invite_of_worker(tmp_path)


@pytest.mark.usefixtures("running")
def test_an_invite_of_a_relayed_worker_is_read_again(tmp_path: Path) -> None:
    circuit = f"/ip4/192.0.2.9/tcp/4517/p2p/{peer(2)}/p2p-circuit"
    state(tmp_path, PUBLIC_SWARM, ["/ip4/127.0.0.1/tcp/1", circuit])
    invite = print_invite(invite_of_worker(tmp_path))
    entry = read_entry([invite])
    assert entry.addrs == (f"{circuit}/p2p/{peer(1)}",)
    assert print_invite(invite_by(entry)) == invite


CIRCUIT = f"/ip4/192.0.2.9/tcp/1/p2p/{peer(2)}/p2p-circuit"


@pytest.mark.parametrize(
    ("addr", "says"),
    [
        (f"/p2p-circuit/p2p/{peer(1)}", "whom to expect"),
        (f"/ip4/192.0.2.9/tcp/1/p2p-circuit/p2p/{peer(1)}", "whom to expect"),
        (f"{CIRCUIT}/p2p/{peer(3)}/p2p-circuit/p2p/{peer(1)}", "at most 128"),
        (f"/dns4/{'x' * 80}/tcp/1/p2p/{peer(2)}/p2p-circuit/p2p/{peer(1)}", "at most 128"),
        (f"/ip4/192.0.2.9/tcp/1/p2p/{peer(2)} /p2p-circuit/p2p/rubbish", "peer id"),
        (f"{CIRCUIT}/p2p/rubbish", "peer id"),
        (f"{CIRCUIT}", "peer id"),
    ],
)
def test_a_circuit_that_leads_nowhere_is_said(addr: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        read_entry([addr])


@pytest.mark.usefixtures("running")
def test_no_invite_without_an_address_or_the_right_key(tmp_path: Path) -> None:
    state(tmp_path, PUBLIC_SWARM, [])
    with pytest.raises(InputError, match="--listen"):
        invite_of_worker(tmp_path)
    state(tmp_path, OTHER.swarm, ["/ip4/192.0.2.7/tcp/4517"])
    with pytest.raises(InputError, match="not the key"):
        invite_of_worker(tmp_path)
    (tmp_path / "worker.json").write_text('{"pid": 1}')
    with pytest.raises(InputError, match="start the worker again"):
        invite_of_worker(tmp_path)


def test_an_invite_made_from_addresses_and_passed_on() -> None:
    assert print_invite(invite_by(read_entry([ADDR]))) == PUBLIC
    assert print_invite(invite_by(read_entry([PRIVATE]))) == PRIVATE
    with pytest.raises(InputError, match="fewer"):
        invite_by(read_entry([f"/ip4/192.0.2.7/tcp/1/p2p/{peer(i)}" for i in range(1, 9)]))
