"""The owner's socket, yielding, quotas as written, grants and credentials."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import trio
import trio.testing

from node import worker_socket
from node.files import parse_life
from node.grants import Grants, OwnCredentials, grant_to, read_token
from node.identity import load_identity
from node.owner import Owner
from node.pressure import BEGIN_S, END_S, SAMPLE_S, Pressure, Probe, Sample
from node.quotas import parse_quotas
from node.sealing import SealInfo
from node.worker_socket import LINE_BYTES_MAX, Controls, ask_worker, serve_controls
from protocol.capabilities import CapabilityGate, Claim, Right
from protocol.errors import InputError
from protocol.ids import deployment_id
from protocol.signed import Identity
from worker.duty import Cause

HOLDER = Identity(b"h" * 32)
SALT = bytes(16)


def with_socket(folder: Path, work: Callable[[Path, list[Any]], None]) -> None:
    """Run `work` in a thread beside a served socket; `done` lists what the socket was told to do."""
    done: list[Any] = []
    controls = Controls(done.append, lambda: done.append("resume"), lambda: {"state": "serving", "did": len(done)})

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(serve_controls, folder, controls)
            await trio.to_thread.run_sync(work, folder, done)
            nursery.cancel_scope.cancel()

    trio.run(main)
    assert not (folder / "worker.sock").exists()


def test_the_owner_pauses_and_resumes(tmp_path: Path) -> None:
    def work(folder: Path, done: list[Any]) -> None:
        assert stat.S_IMODE(os.stat(folder / "worker.sock").st_mode) == 0o600
        assert ask_worker(folder, {"do": "status"}) == {"state": "serving", "did": 0}
        ask_worker(folder, {"do": "pause", "for_s": 60})
        ask_worker(folder, {"do": "pause"})
        ask_worker(folder, {"do": "resume"})
        assert done == [60, None, "resume"]

    (tmp_path / "worker.sock").write_text("left by a worker that was killed")
    with_socket(tmp_path, work)
    with pytest.raises(InputError, match="no worker runs"):
        ask_worker(tmp_path, {"do": "status"})


@pytest.mark.parametrize(
    "line",
    [
        b"rubbish", b"[]", b"{}", b'"pause"', b'{"do": "stop"}', b'{"do": ["pause"]}', b"\xff\xfe", b"[" * 4000,
        b'{"do": "pause", "for_s": 0}', b'{"do": "pause", "for_s": "1"}', b'{"do": "pause", "for_s": null}',
        b'{"do": "pause", "for_s": NaN}', b'{"do": "pause", "for_s": 1e99}', b'{"do": "pause", "for_s": Infinity}',
    ],
)  # fmt: skip
def test_what_is_no_request_does_nothing(line: bytes, tmp_path: Path) -> None:
    def work(folder: Path, done: list[Any]) -> None:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(10)
            connection.connect(str(folder / "worker.sock"))
            connection.sendall(line + b"\n")
            assert "error" in json.loads(connection.recv(1 << 16))
        assert done == []

    with_socket(tmp_path, work)


def test_a_line_without_end_costs_its_connection(tmp_path: Path) -> None:
    def work(folder: Path, done: list[Any]) -> None:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(10)
            connection.connect(str(folder / "worker.sock"))
            connection.sendall(b"x" * (LINE_BYTES_MAX + 1))
            with contextlib.suppress(ConnectionResetError):  # closed with bytes unread
                assert connection.recv(1) == b""
        assert ask_worker(folder, {"do": "status"})["state"] == "serving"

    with_socket(tmp_path, work)


def test_a_folder_with_a_long_name_costs_the_socket_only(tmp_path: Path) -> None:
    folder = tmp_path / ("n" * 120)
    folder.mkdir()
    trio.run(serve_controls, folder, Controls(lambda _: None, lambda: None, dict))


class NoRoom:
    """Accepts nobody at first: the process has no file descriptor left."""

    def __init__(self, path: Path) -> None:
        self.listener = ORIGINAL(path)
        self.times = 2

    async def accept(self) -> Any:
        if self.times:
            self.times -= 1
            raise OSError(errno.EMFILE, "Too many open files")
        assert self.listener is not None
        return await self.listener.accept()

    def close(self) -> None:
        assert self.listener is not None
        self.listener.close()


ORIGINAL = worker_socket._listener


def test_a_moment_without_file_descriptors_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_socket, "_listener", NoRoom)
    with_socket(tmp_path, lambda folder, _: ask_worker(folder, {"do": "status"}) and None)


def test_a_machine_that_cannot_be_measured_for_a_moment_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    service: Any = FakeService()
    samples = iter([OSError(errno.EMFILE, "Too many open files"), EASY])

    def sample(_: Probe) -> Sample:
        match next(samples):
            case Sample() as measured:
                return measured
            case error:
                raise error

    async def main() -> None:
        probe = Probe()
        monkeypatch.setattr("node.owner.Probe", lambda: probe)
        monkeypatch.setattr(Probe, "sample", sample)
        with trio.move_on_after(2.5 * SAMPLE_S):
            await Owner(service).yield_to_others()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert service.stood_up == [Cause.YIELDING]


class FakeService:
    def __init__(self) -> None:
        self.stood_up: list[Cause] = []

    def stand_up(self, cause: Cause) -> None:
        self.stood_up.append(cause)


BUSY, EASY, BETWEEN, FULL = Sample(0.9, 0.5), Sample(0.1, 0.5), Sample(0.5, 0.5), Sample(0.1, 0.05)


@pytest.mark.parametrize(
    ("story", "yielding"),
    [
        ([(BUSY, BEGIN_S)], True),
        ([(FULL, BEGIN_S)], True),
        ([(BUSY, BEGIN_S - 1), (EASY, 1), (BUSY, BEGIN_S - 1)], False),
        ([(BETWEEN, 1000)], False),
        ([(BUSY, BEGIN_S), (BETWEEN, 1000)], True),
        ([(BUSY, BEGIN_S), (EASY, END_S - 1)], True),
        ([(BUSY, BEGIN_S), (EASY, END_S - 1), (BUSY, 1), (EASY, END_S - 1)], True),
        ([(BUSY, BEGIN_S), (EASY, END_S + 1)], False),
    ],
)
def test_a_machine_is_yielded_after_a_while_and_taken_back_after_a_longer_one(
    story: list[tuple[Sample, float]], yielding: bool
) -> None:
    pressure, now = Pressure(), 0.0
    for sample, seconds in story:
        for _ in range(round(seconds) + 1):
            pressure.feed(sample, now)
            now += 1
        now -= 1
    assert pressure.yielding is yielding


def test_the_probe_measures_something() -> None:
    sample = Probe().sample()
    assert 0 <= sample.others_busy <= 1
    assert 0 < sample.memory_free <= 1


@pytest.mark.parametrize(
    ("taken", "free"),
    [
        (SimpleNamespace(rss=90, shared=30), 5 / 40),
        (SimpleNamespace(rss=90), 5 / 10),
        (SimpleNamespace(rss=20, shared=30), 5 / 100),
        (SimpleNamespace(rss=120), 1.0),
    ],
    ids=["Linux", "elsewhere", "hardly any", "more than there is"],
)
def test_memory_is_measured_beside_what_a_worker_has_taken_itself(
    taken: SimpleNamespace, free: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = Probe()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=5, total=100))
    monkeypatch.setattr(psutil.Process, "memory_info", lambda _: taken)
    assert probe.sample().memory_free == free


@pytest.mark.parametrize(
    ("total", "own", "others", "yielding"),
    [(32, 28, 2, False), (16, 7, 9, True), (16, 5, 10.5, True), (16, 7, 2, False), (16, 0, 15, True)],
    ids=["a model fills the machine", "others need the rest", "and it swaps", "room for all", "nothing is loaded"],
)
def test_a_worker_stands_down_for_the_memory_of_others_and_not_for_its_own(
    total: float, own: float, others: float, yielding: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe, pressure = Probe(), Pressure()
    memory = SimpleNamespace(available=total - own - others, total=total)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(psutil.Process, "memory_info", lambda _: SimpleNamespace(rss=own))
    monkeypatch.setattr(psutil, "cpu_percent", lambda: 0.0)
    for now in (0.0, BEGIN_S):
        pressure.feed(probe.sample(), now)
    assert pressure.yielding is yielding


def test_quotas_as_written() -> None:
    quotas = parse_quotas(["bandwidth=20MB", "peer-requests=5.5", "sessions=3"])
    assert (quotas.bandwidth, quotas.peer_requests, quotas.sessions) == (20e6, 5.5, 3)
    for wrong in ("bandwidth", "colour=blue", "sessions=many", "sessions=0", "owner-memory-share=1.5", "requests=nan"):
        with pytest.raises(InputError):
            parse_quotas([wrong])


@pytest.mark.parametrize("name", ["requests", "sessions", "owner-memory-share"])
def test_the_example_beside_a_wrong_quota_is_a_right_one(name: str) -> None:
    with pytest.raises(InputError, match=f"{name}: write for example {name}=") as failure:
        parse_quotas([f"{name}=x"])
    parse_quotas([str(failure.value).rpartition(" ")[2]])


@pytest.mark.parametrize(("text", "seconds"), [("30m", 1800), ("12h", 43_200), ("7d", 604_800)])
def test_lengths_of_time(text: str, seconds: int) -> None:
    assert parse_life(text) == seconds


@pytest.mark.parametrize("text", ["", "0d", "7", "d", "1w", "-1d", "1.5h", "9999999d"])
def test_what_is_no_length_of_time(text: str) -> None:
    with pytest.raises(InputError, match="7d"):
        parse_life(text)


def sealed_by(owner: Identity) -> SealInfo:
    return SealInfo(2, deployment_id(owner.peer, SALT).hex(), SALT.hex(), "m", "s", "float32", 2, "ab" * 16, "f")


def test_a_grant_is_handed_on_found_again_and_revoked(tmp_path: Path) -> None:
    owner = load_identity(tmp_path)
    token = grant_to(HOLDER.peer, tmp_path, sealed_by(owner), "f00d", "use, fetch", "7d")
    assert read_token(f" {token.text}\n") == token
    assert token.capability.rights == ("fetch", "use")
    grants = Grants(tmp_path / "grants")
    grants.keep(token)
    assert grants.find(token.serial) == grants.find(token.text) == token
    with pytest.raises(InputError, match="another identity"):
        grants.revoke(token, HOLDER.peer)
    assert grants.revoked(token.capability.deployment, 0) == ()
    grants.revoke(token, owner.peer)
    assert grants.find(token.serial) == token
    assert grants.revoked(token.capability.deployment, 0) == (token.capability.serial,)
    assert grants.revoked(deployment_id(HOLDER.peer, SALT), 0) == ()
    assert grants.revoked(token.capability.deployment, token.capability.expires_ms) == ()
    with pytest.raises(InputError, match="no capability of serial"):
        grants.find(token.serial)


@pytest.mark.parametrize("damaged", [b"", b"sotto-use-eyJj", b"\xff\xfe"])
def test_a_damaged_grant_is_named_and_written_anew(tmp_path: Path, damaged: bytes) -> None:
    owner, grants = load_identity(tmp_path), Grants(tmp_path / "grants")
    token = grant_to(HOLDER.peer, tmp_path, sealed_by(owner), "f00d", "use", "7d")
    deployment = token.capability.deployment
    grants.keep(token)
    (tmp_path / "grants" / f"{token.serial}.token").write_bytes(damaged)
    with pytest.raises(InputError, match=rf"{token.serial}\.token .*damaged.*whole token"):
        grants.find(token.serial)
    grants.revoke(token, owner.peer)
    (tmp_path / "grants" / f"{token.serial}.revoked").write_bytes(damaged)
    with pytest.raises(InputError, match=rf"{token.serial}\.revoked .*damaged.*whole token"):
        grants.revoked(deployment, 0)
    grants.revoke(grants.find(token.text), owner.peer)
    assert grants.revoked(deployment, 0) == (token.capability.serial,)


def test_what_is_no_grant_is_said(tmp_path: Path) -> None:
    owner = load_identity(tmp_path)
    for peer, rights, life in (
        (HOLDER.peer, "all", "7d"),
        (HOLDER.peer, "use,own", "7d"),
        ("bob", "use", "7d"),
        (HOLDER.peer, "use", "30d"),
    ):
        with pytest.raises(InputError):
            grant_to(peer, tmp_path, sealed_by(owner), "f00d", rights, life)
    with pytest.raises(InputError, match="another identity"):
        grant_to(HOLDER.peer, tmp_path, sealed_by(HOLDER), "f00d", "use", "7d")
    token = grant_to(HOLDER.peer, tmp_path, sealed_by(owner), "f00d", "use", "7d").text
    for wrong in (
        "",
        "rubbish",
        token[:-3],
        token[:40] + ("B" if token[40] == "A" else "A") + token[41:],
        "sotto-use-e30",
    ):
        with pytest.raises(InputError, match="copy the whole token"):
            read_token(wrong)


def test_a_process_renews_what_its_owner_issued_to_it() -> None:
    owner, now_ms = Identity(b"o" * 32), [1_760_000_000_000]
    deployment = deployment_id(owner.peer, SALT)
    credentials = OwnCredentials(owner, HOLDER.peer, lambda: now_ms[0])
    first = credentials(deployment)
    for right in Right:
        CapabilityGate().admit(Claim(HOLDER.peer, right, deployment, owner.peer), first, now_ms[0])
    assert credentials(deployment) == first
    now_ms[0] += 13 * 3_600_000
    assert credentials(deployment) != first
