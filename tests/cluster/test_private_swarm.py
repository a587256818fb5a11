"""A private swarm of real daemons: joined by invite and over the local network, closed to whoever has no key."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio
from typer.testing import Result

from node.app_client import observe
from node.client import ClientOptions
from node.groups import ungrouped
from node.p2p import upnp
from node.p2p.dht import KAD, Kademlia
from node.p2p.mesh import Mesh, MeshConfig, open_mesh
from node.private import PrivateTransport
from protocol.adverts import TOPIC
from protocol.channel import Channel
from protocol.codec import decode
from protocol.errors import RemoteProtocolError, TransportError
from protocol.ids import PeerId
from protocol.invites import parse_invite
from protocol.membership import Side, SwarmKey
from protocol.messages import CONTROL, LINK, SESSION, SHARD, Ping
from protocol.ports import GossipMessage
from protocol.signed import Identity, Signed
from simnet.checks.daemons import Daemon
from tests.helpers.commands import sotto
from tests.helpers.daemons import HEARD, LISTEN, daemon
from tests.helpers.multicast import needs_multicast
from tests.helpers.tiny_models import make_checkpoint

STRANGER = Identity(b"\x21" * 32)


@dataclass(frozen=True)
class Net:
    folder: Path
    first: Daemon
    second: Daemon
    invite: str


def peers_seen(done: Result) -> set[str]:
    assert done.exit_code == 0, done.stdout + done.stderr
    return {row["peer"] for row in json.loads(done.stdout)["peers"]}


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Net]:
    """Two workers: one that made the swarm, one that joined it by the invite that the command printed."""
    folder = tmp_path_factory.mktemp("private")
    with daemon(folder / "a", "worker", "--private", "--no-lan") as first:
        printed = sotto(folder, "invite", "--data-dir", str(first.folder))
        assert printed.exit_code == 0, printed.stderr
        invite = printed.stdout.strip()
        assert "can invite others" in printed.stderr
        with daemon(folder / "b", "join", invite) as second:
            yield Net(folder, first, second, invite)


def test_members_meet_and_run_a_prompt(net: Net, tmp_path: Path) -> None:
    both = {net.first.peer, net.second.peer}
    assert peers_seen(sotto(tmp_path, "peers", "-b", net.invite, "--json")) == both
    assert peers_seen(sotto(tmp_path, "peers", "--json", SOTTO_SWARM=net.invite)) == both
    model = str(make_checkpoint(tmp_path / "m", seed=41))
    words = ["run", "-m", model, "--workers", "2", "-n", "5", "--json", "the quiet brook"]
    done = sotto(tmp_path, *words, SOTTO_SWARM=net.invite)
    assert done.exit_code == 0, done.stdout + done.stderr
    assert len(json.loads(done.stdout)["ids"]) <= 5


def test_who_joined_can_invite_others(net: Net, tmp_path: Path) -> None:
    printed = sotto(tmp_path, "invite", "--data-dir", str(net.second.folder), "--json")
    made = json.loads(printed.stdout)
    assert made["private"] is True
    assert made["addrs"] == [net.second.address]
    assert parse_invite(made["invite"]).secret == parse_invite(net.invite).secret
    assert net.second.peer in peers_seen(sotto(tmp_path, "peers", "-b", made["invite"], "--json"))


def test_the_key_lies_closed_and_is_not_told(net: Net) -> None:
    secret = parse_invite(net.invite).secret
    for worker in (net.first, net.second):
        assert (worker.folder / "swarm.key").stat().st_mode & 0o777 == 0o600
        for file in ("worker.json", "worker.log"):
            content = (worker.folder / file).read_text()
            assert secret.hex() not in content
            assert net.invite not in content


def test_the_doctor_looks_at_it_as_a_member(net: Net, tmp_path: Path) -> None:
    done = sotto(tmp_path, "doctor", "-b", net.invite, "--listen", "none", "--memory", "1MiB", "--json")
    levels = {each["check"]: each["level"] for each in json.loads(done.stdout)["checks"]}
    assert (levels["swarm"], levels["clock"]) == ("ok", "ok"), "no advert was read"


def test_a_stranger_sees_no_workers(net: Net, tmp_path: Path) -> None:
    async def main() -> tuple[set[str], dict[str, int]]:
        async with observe(ClientOptions(tmp_path, (net.first.address,), discover_s=4)) as client:
            await trio.sleep(4)
            return set(client.watch.view.members), client.watch.refused

    with ungrouped():
        assert trio.run(main) == (set(), {})


def test_a_stranger_who_learns_the_topic_hears_sealed_words_only(net: Net) -> None:
    """Neighbours tell each other their topics, so the name is no secret from who connects."""
    key = SwarmKey(parse_invite(net.invite).secret)

    async def main() -> GossipMessage:
        async with open_mesh(MeshConfig(STRANGER.seed, ())) as mesh:
            await mesh.connect(net.first.address)
            heard = await mesh.subscribe(key.topic(TOPIC), lambda _: True)
            with trio.fail_after(20):
                return await heard.receive()

    message = trio.run(main)
    with pytest.raises(RemoteProtocolError):
        decode(Signed, message.data)
    assert decode(Signed, key.unseal(message.data, TOPIC, message.author)).signer == message.author


@pytest.mark.parametrize("protocol", [CONTROL, SHARD, SESSION, LINK, KAD])
@pytest.mark.parametrize("shown", ["a frame", "another's proof", "its own proof, sent back"])
def test_a_stranger_is_refused_on_every_protocol(protocol: str, shown: str, net: Net) -> None:
    key, worker = SwarmKey(parse_invite(net.invite).secret), net.first
    words = {
        "a frame": bytes(64),
        "another's proof": key.proof(net.second.peer, worker.peer, protocol, Side.DIAL),  # type: ignore[arg-type]
        "its own proof, sent back": key.proof(worker.peer, STRANGER.peer, protocol, Side.DIAL),  # type: ignore[arg-type]
    }[shown]
    before = _refused(worker, protocol)

    async def attempt(mesh: Mesh) -> bytes:
        stream = await mesh.open(worker.peer, worker.addrs, protocol)  # type: ignore[arg-type]
        await stream.send(words)
        return await stream.receive(1)

    async def main() -> None:
        async with open_mesh(MeshConfig(STRANGER.seed, ())) as mesh:
            with trio.fail_after(20), pytest.raises(TransportError):
                await attempt(mesh)

    trio.run(main)
    assert _refused(worker, protocol) == before + 1


def test_the_directory_leads_members_to_other_workers_and_a_stranger_to_none(net: Net) -> None:
    key = SwarmKey(parse_invite(net.invite).secret)

    async def led(swarm: SwarmKey | None) -> set[PeerId]:
        """Whom a node that knows one worker is connected to after a lookup."""
        async with open_mesh(MeshConfig(STRANGER.seed, ())) as mesh:
            await mesh.connect(net.first.address)
            transport = mesh if swarm is None else PrivateTransport(mesh, swarm)
            await Kademlia(transport, mesh.known_addrs).providers(bytes(32))
            return set(mesh.connected())

    async def main() -> None:
        with trio.fail_after(20):
            while await led(key) != {net.first.peer, net.second.peer}:
                await trio.sleep(0.2)
            assert await led(None) == {net.first.peer}

    trio.run(main)


def test_a_client_without_the_key_cannot_ping(net: Net, tmp_path: Path) -> None:
    worker = net.first

    async def main() -> None:
        async with observe(ClientOptions(tmp_path, (worker.address,))) as client:
            stream = await client.ports.transport.open(worker.peer, worker.addrs, CONTROL)
            with trio.fail_after(20), pytest.raises(TransportError):
                await Channel(stream, CONTROL).call(Ping(bytes(8)))

    with ungrouped():
        trio.run(main)


def test_a_member_that_dials_a_public_worker_is_told(net: Net, tmp_path: Path) -> None:
    """And a key that does not fit its folder, before anything is served."""
    made = sotto(tmp_path, "invite", "-b", net.first.address, "--json")
    assert json.loads(made.stdout)["private"] is False
    public = json.loads(made.stdout)["invite"]
    assert sotto(tmp_path, "peers", "-b", public, "-b", net.invite).stderr.count("different swarms") == 1
    folder = tmp_path / "w"
    folder.mkdir()
    (folder / "swarm.key").write_bytes(bytes(32))
    (folder / "swarm.key").chmod(0o600)
    joined = sotto(tmp_path, "join", net.invite, "--data-dir", str(folder), *HEARD)
    assert joined.exit_code == 1
    assert "another private swarm" in joined.stderr


def test_the_doctor_looks_as_a_member_with_an_invite_or_the_key_of_its_folder(
    net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def none() -> None:
        return None

    def checks(*words: str) -> dict[str, str]:
        done = sotto(tmp_path, "doctor", *LISTEN, "--memory", "1MiB", "--json", *words)
        return {each["check"]: f"{each['level']} {each['text']}" for each in json.loads(done.stdout)["checks"]}

    monkeypatch.setattr(upnp, "find_gateway", none)
    swarm = parse_invite(net.invite).swarm.hex()
    words = {
        "the invite": ("-b", net.invite),
        "the folder's key": ("-b", net.first.address, "--data-dir", str(net.second.folder)),
    }
    for way, given in words.items():
        seen = checks(*given)
        assert seen["member"] == f"ok of the private swarm {swarm}", way
        assert seen["clock"].startswith("ok"), f"adverts were opened: {way}"
    stranger = checks("-b", net.first.address)
    assert stranger["member"].startswith("fail 1 of 1 peers do not talk to this machine")
    assert "clock" not in stranger
    assert not (tmp_path / "data" / "sotto" / "worker").exists(), "the key was written nowhere"


@needs_multicast
def test_a_worker_with_the_key_and_no_address_is_found_on_the_local_network(net: Net, tmp_path: Path) -> None:
    """Two daemons on loopback multicast: neither is given an address."""
    key = net.first.folder / "swarm.key"
    for name in ("c", "d"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "swarm.key").write_bytes(key.read_bytes())
        (tmp_path / name / "swarm.key").chmod(0o600)
    with daemon(tmp_path / "c", "worker", "--lan") as c, daemon(tmp_path / "d", "worker", "--lan") as d:
        printed = sotto(tmp_path, "invite", "--data-dir", str(c.folder)).stdout.strip()
        seen: set[str] = set()
        deadline = time.monotonic() + 30
        while not {c.peer, d.peer} <= seen:
            assert time.monotonic() < deadline, (c.folder / "worker.log").read_text()
            seen = peers_seen(sotto(tmp_path, "peers", "-b", printed, "--json"))


def _refused(worker: Daemon, protocol: str) -> float:
    import urllib.request

    with urllib.request.urlopen(worker.metrics, timeout=5) as reply:
        lines = reply.read().decode().splitlines()
    name = f'sotto_strangers_refused_total{{protocol="{protocol}"}}'
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))
