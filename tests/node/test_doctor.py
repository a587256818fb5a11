"""What the doctor concludes, case by case: the level, and that the remedy names what to change."""

from __future__ import annotations

from dataclasses import replace

import pytest

from node.app_doctor import kernels_are_used
from node.doctor import Facts, Level, diagnose

WELL = Facts(
    port=4517,
    port_error="",
    running="",
    local_ip="192.168.1.5",
    bootstrap=(("/ip4/11.0.0.9/tcp/1/p2p/x", ""),),
    swarm="",
    greeted=(True,),
    neighbour=False,
    verdicts=("/ip4/11.0.0.1/tcp/4517",),
    seen_at="11.0.0.1",
    gateway=None,
    relays=1,
    multicast=True,
    skews_s=(0.1,),
    memory_given_bytes=1 << 30,
    memory_free_bytes=2 << 30,
    folder="/data",
    folder_error="",
    disk_free_bytes=100 << 30,
    version="1.0",
    versions=("1.0",),
    software="Python 3",
    kernels=True,
)
FORWARD = "forward TCP port 4517 of your router (11.0.0.1 from outside) to 192.168.1.5 port 4517"


def finding(check, **facts):
    (found,) = [each for each in diagnose(replace(WELL, **facts)) if each.check == check]
    return found.level, found.text + " | " + found.remedy


def test_a_machine_that_is_well_has_nothing_to_mend():
    findings = diagnose(WELL)
    assert {each.level for each in findings} == {Level.OK}
    assert {each.remedy for each in findings} == {""}


@pytest.mark.parametrize(
    ("check", "facts", "level", "says"),
    [
        ("reachable", {"verdicts": (None,)}, Level.WARN, FORWARD),
        ("reachable", {"verdicts": (None,), "relays": 0}, Level.FAIL, FORWARD),
        (
            "reachable",
            {"verdicts": (None,), "seen_at": "192.168.1.5"},
            Level.WARN,
            "to port 4517 in this machine",
        ),
        ("reachable", {"verdicts": (None, "/ip4/11.0.0.1/tcp/4517")}, Level.WARN, "1 of 2 peers cannot"),
        ("reachable", {"verdicts": ("/ip4/9.9.9.9/tcp/1", *WELL.verdicts * 2)}, Level.OK, "reach /ip4/11.0.0.1/"),
        ("reachable", {"verdicts": ()}, Level.WARN, "not known"),
        ("reachable", {"port": None, "verdicts": ()}, Level.WARN, "--listen"),
        ("reachable", {"port": None, "verdicts": (), "relays": 0}, Level.FAIL, "no relay"),
        ("reachable", {"running": "public", "verdicts": ()}, Level.OK, "runs here"),
        ("reachable", {"running": "relayed", "verdicts": ()}, Level.WARN, FORWARD),
        ("reachable", {"running": "unreachable", "port": None, "verdicts": ()}, Level.FAIL, "--listen"),
        ("reachable", {"running": "unknown", "verdicts": ()}, Level.WARN, "no verdict yet"),
        ("port", {"port_error": "port 4517 on 0.0.0.0 is in use"}, Level.FAIL, "--listen"),
        ("router", {"verdicts": (None,)}, Level.WARN, "UPnP"),
        ("router", {"verdicts": (None,), "gateway": "11.0.0.1"}, Level.OK, "11.0.0.1"),
        ("swarm", {"bootstrap": ()}, Level.WARN, "--bootstrap"),
        ("swarm", {"bootstrap": (), "neighbour": True}, Level.OK, "local network"),
        ("swarm", {"bootstrap": (("a", "refused"),)}, Level.FAIL, "refused"),
        ("swarm", {"bootstrap": (("a", "refused"), ("b", ""))}, Level.WARN, "leave it out"),
        ("member", {"greeted": (False, True)}, Level.WARN, "sotto invite"),
        ("member", {"greeted": (False, False)}, Level.FAIL, "2 of 2"),
        ("member", {"greeted": (False,), "swarm": "ab12"}, Level.FAIL, "key of the private swarm ab12"),
        ("member", {"swarm": "ab12"}, Level.OK, "ab12"),
        ("relay", {"relays": 0}, Level.WARN, "no peer"),
        ("relay", {"relays": 0, "bootstrap": (), "neighbour": True}, Level.WARN, "no peer"),
        ("clock", {"skews_s": (-40.0, -39.0, 3.0)}, Level.FAIL, "behind"),
        ("clock", {"skews_s": (5.0,)}, Level.WARN, "ahead"),
        ("memory", {"memory_given_bytes": 3 << 30}, Level.WARN, "--memory"),
        ("multicast", {"multicast": False}, Level.WARN, "--bootstrap"),
        ("data folder", {"folder_error": "Permission denied"}, Level.FAIL, "--data-dir"),
        ("data folder", {"disk_free_bytes": 5 << 20}, Level.WARN, "5.0 MiB"),
        ("version", {"versions": ("1.0", "0.9")}, Level.WARN, "0.9"),
        ("kernels", {"kernels": False}, Level.WARN, "install a C compiler"),
    ],
)
def test_each_ailment_is_named_with_its_remedy(check, facts, level, says):
    found, text = finding(check, **facts)
    assert (found, says in text) == (level, True), text


@pytest.mark.parametrize(
    ("check", "facts"),
    [
        ("version", {"versions": ("1.0", "0.9\x1b]0;x\x07\n")}),
        ("router", {"gateway": "\x1b[2J\x9b1m\r"}),
        ("swarm", {"bootstrap": (("a", "\x1b[2J"),)}),
        ("reachable", {"verdicts": (None,), "seen_at": "\x1b[2J"}),
    ],
)
def test_nobody_writes_to_the_terminal(check, facts):
    _, text = finding(check, **facts)
    assert text.isprintable()
    assert "?" in text


def test_what_nobody_knows_is_not_stated():
    checks = {each.check for each in diagnose(replace(WELL, skews_s=(), bootstrap=(), relays=0))}
    assert not checks & {"clock", "relay", "member"}


@pytest.mark.parametrize(
    ("flags", "supported", "well"),
    [("avx512f avx512bw", "", False), ("avx512f avx512bw", "float32", True), ("avx2", "", True), ("", "", True)],
    ids=["do not load", "load", "an older processor", "nobody says"],
)
def test_kernels_are_missed_where_they_could_run(
    flags: str, supported: str, well: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert kernels_are_used(f"flags : fpu {flags}\n", frozenset(supported.split())) is well
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert kernels_are_used(f"flags : fpu {flags}\n", frozenset())
