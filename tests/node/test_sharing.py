"""What was heard outlives the process: merged with what others of this user kept, read as if a stranger wrote it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from client.metalearning.comparing import compared
from node.files import write_atomic
from node.passing import pass_on_reports
from node.private import PrivateGossip
from node.sharing import FILE_BYTES_MAX, Kept, Sharing, Sources, heeded, joined, read_kept, unjoined
from protocol import limits
from protocol.ids import PeerId
from protocol.membership import SwarmKey
from protocol.ports import GossipMessage, Subscription, Validator
from protocol.reports import TOPIC, Report, sign_report
from protocol.signed import Identity
from simnet.endpoint import VirtualEndpoint
from simnet.network import open_network
from simnet.runtime import SeededEntropy, VirtualClock, run
from tests.helpers.protocol_samples import CLIENT, NEXT, NOW_MS, OTHER, REPORT, WORKER
from tests.helpers.sharing import World

PEN = Identity(b"\x51" * 32)


@dataclass(frozen=True)
class Said:
    data: bytes
    author: PeerId = WORKER.peer
    received_from: PeerId = WORKER.peer


@dataclass
class Ear:
    """A Gossip that hears what the test says, and sends nothing."""

    validator: Validator = lambda _: False

    async def publish(self, topic: str, data: bytes) -> None:
        raise AssertionError("nobody asked to tell anything")

    async def subscribe(self, topic: str, validator: Validator) -> Subscription:
        assert topic == TOPIC
        self.validator = validator
        return None  # type: ignore[return-value]  # what is admitted was heard by then

    def say(self, data: bytes) -> bool:
        message: GossipMessage = Said(data)
        return self.validator(message)


@dataclass(frozen=True)
class Still:
    """A clock that stands."""

    now_ms: int = NOW_MS

    def time(self) -> float:
        return self.now_ms / 1000

    def monotonic(self) -> float:
        return 0.0


async def _process(file: Path, heard: Sequence[bytes], meanwhile: Sequence[bytes] = ()) -> frozenset[PeerId]:
    ear = Ear()
    sharing = Sharing(ear, Still(), Sources(PEN, list, file))
    await sharing.start()
    for data in heard:
        assert ear.say(data)
    if meanwhile:
        await _process(file, meanwhile)
    await sharing.aclose()
    return frozenset(each.peer for each in (CLIENT, OTHER, NEXT, PEN, WORKER) if each.peer in sharing.hearsay)


def process(file: Path, heard: Sequence[bytes], meanwhile: Sequence[bytes] = ()) -> frozenset[PeerId]:
    """One process that hears these, while another one hears and ends, and then ends, too: whom it knows by then."""
    return trio.run(_process, file, heard, meanwhile)


def at(seconds: float) -> Report:
    return replace(REPORT, issued_ms=NOW_MS + int(1000 * seconds))


def test_what_one_process_heard_the_next_one_knows(tmp_path: Path) -> None:
    file = tmp_path / "client" / "reports"
    assert process(file, [sign_report(REPORT, CLIENT)]) == {CLIENT.peer}
    assert process(file, [sign_report(REPORT, OTHER)]) == {CLIENT.peer, OTHER.peer}
    assert file.stat().st_mode & 0o777 == 0o600
    assert len(heeded(file, [], NOW_MS)) == 2


def test_processes_side_by_side_lose_nothing_of_each_other(tmp_path: Path) -> None:
    file = tmp_path / "reports"
    process(file, [sign_report(REPORT, CLIENT)], meanwhile=[sign_report(REPORT, OTHER)])
    assert {signer for signer, *_ in read_kept(file, NOW_MS)} == {CLIENT.peer, OTHER.peer}


def test_own_reports_are_no_news(tmp_path: Path) -> None:
    file = tmp_path / "reports"
    assert process(file, [sign_report(REPORT, PEN)]) == frozenset(), "another process of this user told it"
    assert not file.exists()


def test_a_damaged_file_costs_what_cannot_be_read(tmp_path: Path) -> None:
    file = tmp_path / "reports"
    good, forged = sign_report(REPORT, CLIENT), sign_report(at(1), OTHER)
    file.write_bytes(joined([good, forged[:-1] + b"\0", sign_report(at(3600), NEXT)]) + b"\xff\xff torn")
    assert read_kept(file, NOW_MS) == [(CLIENT.peer, REPORT, good)]
    file.write_bytes(b"\0" * (FILE_BYTES_MAX + 1))
    assert unjoined(file.read_bytes()) == []
    assert process(file, [sign_report(REPORT, OTHER)]) == {OTHER.peer}
    folder = tmp_path / "folder"
    folder.mkdir()
    assert process(folder, [sign_report(REPORT, OTHER)]) == {OTHER.peer}, "a disk that fails costs a line in the log"


def _kept_on(file: Path, ear: Ear, heard: bytes, until: int) -> set[PeerId]:
    """Whose reports are in `file` after `keep` saved what is `heard`, and `until` seconds."""

    async def main() -> None:
        sharing = Sharing(ear, Still(), Sources(PEN, list, file))
        await sharing.start()
        with trio.move_on_after(until):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(sharing.keep)
                await trio.testing.wait_all_tasks_blocked()
                assert ear.say(heard)

    async def inline(function: Callable[..., Any], *args: object, **_: object) -> Any:
        await trio.lowlevel.checkpoint()
        return function(*args)

    with pytest.MonkeyPatch.context() as patch:  # in virtual time threads take for ever
        patch.setattr("trio.to_thread.run_sync", inline)
        trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    return {signer for signer, *_ in read_kept(file, NOW_MS)}


def test_what_is_heard_during_a_save_is_saved_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ear, writes = Ear(), list[bytes]()

    def slow(file: Path, data: bytes, mode: int) -> None:
        if not writes:
            assert ear.say(sign_report(REPORT, OTHER))
        writes.append(data)
        write_atomic(file, data, mode)

    monkeypatch.setattr("node.sharing.write_atomic", slow)
    assert _kept_on(tmp_path / "reports", ear, sign_report(REPORT, CLIENT), 60) == {CLIENT.peer, OTHER.peer}
    assert len(writes) == 2


def test_a_save_that_failed_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = list[Path]()

    def failing(file: Path, data: bytes, mode: int) -> None:
        tries.append(file)
        if len(tries) == 1:
            raise OSError("no space left")
        write_atomic(file, data, mode)

    monkeypatch.setattr("node.sharing.write_atomic", failing)
    assert _kept_on(tmp_path / "reports", Ear(), sign_report(REPORT, CLIENT), 300) == {CLIENT.peer}
    assert len(tries) == 2


def test_a_save_that_is_cancelled_is_made_up_for_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, ear, scope = tmp_path / "reports", Ear(), trio.move_on_after(10)

    def cancelled(path: Path, now_ms: int) -> list[Kept]:
        trio.from_thread.run_sync(scope.cancel)
        return read_kept(path, now_ms)

    async def main() -> None:
        sharing = Sharing(ear, Still(), Sources(PEN, list, file))
        await sharing.start()
        monkeypatch.setattr("node.sharing.read_kept", cancelled)
        with scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(sharing.keep)
                await trio.testing.wait_all_tasks_blocked()
                ear.say(sign_report(REPORT, CLIENT))
        monkeypatch.undo()
        assert not file.exists()
        await sharing.aclose()

    monkeypatch.setattr("node.sharing.SAVE_S", 0)
    trio.run(main)
    assert [signer for signer, *_ in read_kept(file, NOW_MS)] == [CLIENT.peer]


def test_what_the_gate_refuses_is_not_passed_on_either() -> None:
    async def main() -> None:
        for follow in (_pass_on, _share):
            ear = Ear()
            await follow(ear)
            assert ear.say(sign_report(REPORT, CLIENT))
            assert not ear.say(sign_report(REPORT, CLIENT)), "a replay"
            assert not ear.say(sign_report(at(limits.CLOCK_SKEW_MAX_S + 1), OTHER))
            assert not ear.say(b"")

    trio.run(main)


async def _pass_on(ear: Ear) -> None:
    await pass_on_reports(ear, Still())


async def _share(ear: Ear) -> None:
    await Sharing(ear, Still(), Sources(PEN, list)).start()


@pytest.mark.parametrize("same", [True, False])
def test_in_a_private_swarm_members_alone_hear(same: bool) -> None:
    keys = SwarmKey(b"\1" * 32), SwarmKey((b"\1" if same else b"\2") * 32)

    async def two(body: Callable[[Sharing, Sharing], Awaitable[None]]) -> None:
        async with open_network(4) as network, AsyncExitStack() as stack:
            ends: list[VirtualEndpoint] = [
                await stack.enter_async_context(network.join(identity.seed)) for identity in (CLIENT, OTHER)
            ]
            await ends[0].connect(f"{ends[1].addrs[0]}/p2p/{ends[1].peer}")
            sharing = [
                Sharing(
                    PrivateGossip(end, key, end.peer, SeededEntropy(number)), VirtualClock(), Sources(identity, list)
                )
                for number, (end, key, identity) in enumerate(zip(ends, keys, (CLIENT, OTHER), strict=True))
            ]
            for each in sharing:
                await each.start()
            await body(*sharing)

    async def body(tells: Sharing, hears: Sharing) -> None:
        tells.judge(compared(World(1).experience("member")))
        assert await tells.tell()
        await trio.sleep(1)
        assert (CLIENT.peer in hears.hearsay) == same

    run(lambda: two(body), seed=4)
