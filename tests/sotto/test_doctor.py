"""`sotto doctor` against real workers: what it says, as text and as JSON, and its exit status."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import trio
from typer.testing import CliRunner

from node.app_doctor import DoctorOptions, examine
from node.entry import invite_by, read_entry
from node.lifetime import only_user_of
from node.p2p import upnp
from protocol.invites import print_invite
from simnet.cluster import Cluster
from sotto.__main__ import app


@pytest.fixture(autouse=True)
def _no_router(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def none() -> None:
        return None

    monkeypatch.setattr(upnp, "find_gateway", none)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def doctor(folder: Path, *words: str) -> tuple[int, dict[str, str], dict[str, str]]:
    """(exit status, level per check, text and remedy per check)"""
    result = CliRunner().invoke(app, ["doctor", "--json", "--data-dir", str(folder), *words])
    checks = json.loads(result.stdout)["checks"]
    levels = {each["check"]: each["level"] for each in checks}
    return result.exit_code, levels, {each["check"]: each["text"] + " | " + each["remedy"] for each in checks}


def test_a_machine_that_others_can_dial(swarm: Cluster, tmp_path: Path) -> None:
    words = ("-b", swarm.bootstrap, "--listen", "/ip4/127.0.0.1/tcp/0", "--memory", "1MiB")
    status, levels, texts = doctor(tmp_path / "data", *words)
    assert status == 0
    expected = {"data folder", "memory", "port", "swarm", "reachable", "relay", "clock", "version"}
    assert {check for check, level in levels.items() if level == "ok"} >= expected, texts
    assert "/ip4/127.0.0.1/tcp/" in texts["reachable"]
    assert not (tmp_path / "data").exists()


def test_an_invite_leads_to_the_swarm_as_an_address_does(swarm: Cluster, tmp_path: Path) -> None:
    invite = print_invite(invite_by(read_entry([swarm.bootstrap])))
    _, levels, texts = doctor(tmp_path, "-b", invite, "--listen", "none", "--memory", "1MiB")
    assert (levels["swarm"], levels["clock"]) == ("ok", "ok"), texts


def test_a_machine_where_a_worker_runs(swarm: Cluster) -> None:
    status, levels, texts = doctor(Path(swarm.workers[1].folder), "-b", swarm.bootstrap, "--memory", "1MiB")
    assert (status, levels["port"]) == (0, "ok")
    assert "runs here" in texts["port"]
    assert "runs here" in texts["reachable"]


def test_the_port_is_the_one_that_the_worker_listens_on(tmp_path: Path) -> None:
    """Whatever its announced addresses look like: the router forwards to this one."""
    state = {"reach": "relayed", "addrs": ["/dns4/worker.example/tcp/80"], "listening": ["/ip4/192.0.2.7/tcp/4517"]}
    with only_user_of(tmp_path, "worker"):
        (tmp_path / "worker.json").write_text(json.dumps(state))
        facts = trio.run(examine, DoctorOptions(tmp_path, (), (), 1 << 20))
    assert (facts.port, facts.running) == (4517, "relayed")


def test_a_machine_that_is_no_use_to_a_swarm(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        nobody = f"/ip4/127.0.0.1/tcp/{port}/p2p/12D3KooWGS5i6SmwMNSRXtsrvLzBZwHDmPgJEtQVbL3JzNPkWLPz"
        status, levels, texts = doctor(tmp_path, "-b", nobody, "--listen", f"/ip4/127.0.0.1/tcp/{port}")
    assert status == 1
    assert (levels["port"], levels["swarm"], levels["reachable"]) == ("fail", "fail", "fail")
    assert str(port) in texts["port"]


def test_people_read_a_line_per_check_and_an_arrow_per_remedy(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["doctor", "--listen", "/ip4/127.0.0.1/tcp/0", "--data-dir", str(tmp_path)])
    lines = result.stdout.splitlines()
    assert any(line.startswith("warn  swarm") for line in lines)
    assert any(line.strip() == "-> give --bootstrap ADDRESS or INVITE" for line in lines)
