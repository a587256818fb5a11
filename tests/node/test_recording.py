"""Recording: what becomes of requests that end well, fail or are given up, and of a disk that does not take them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from client.metalearning.features import STATED_MAX
from client.metalearning.record import Record, from_row, to_row
from client.placement import ModelNeeds, PlaceOptions, priced
from node.clock import SystemClock
from node.history import BUSY_S, History, HistoryBusy
from node.recording import LAST_WORDS_S, SWITCH, Entry, Journal, Plan, Progress, Recorder, Subject, hardware, wanted
from protocol.adverts import HeldSpan
from protocol.errors import InputError, RouteUnavailable
from protocol.ids import ID_BYTES, DeploymentId
from protocol.limits import PAGE_TOKENS
from protocol.strategy import Strategy
from protocol.swarm import SwarmView
from tests.helpers.adverts import advert, peer, view
from tests.helpers.records import BLOCK, CONFIG, numbered

IDS = [5, 6, 7] * 20
DEPLOYMENT = DeploymentId(bytes(ID_BYTES))
HONEST = view(advert(), advert())


def plan(recorder: Recorder) -> Plan:
    return Plan(recorder.task(IDS, 8, 0.0, "latency", False), Strategy(speculation="lookup"), "user")


def held(block_time_us: int) -> HeldSpan:
    """Half of the model's blocks, as a worker says how long one takes."""
    return HeldSpan(DEPLOYMENT, 0, 2, block_time_us)


def recorder(
    journal: Journal,
    name: str = "demo",
    now: Callable[[], SwarmView] | None = None,
    swarm: SwarmView = HONEST,
) -> Recorder:
    """Of a model on two workers; each record has the next number as its uid."""
    numbers = count()
    needs = replace(ModelNeeds.of_configs(CONFIG.blocks, "float32", 100), deployment=DEPLOYMENT)
    placement = priced(swarm, needs, [(peer(0), 0, 2), (peer(1), 2, 4)], PlaceOptions())
    subject = Subject(name, "ee", CONFIG, "float32", needs, placement, swarm, {})
    return Recorder(
        journal, subject, now or (lambda: swarm), SystemClock(), lambda size: next(numbers).to_bytes(size, "big")
    )


def serve(entry: Entry, times_s: tuple[float, ...], finish: str) -> None:
    """What a request that came so far would say."""
    entry.progress = lambda: Progress(times_s, finish, 100, 200, 5, 3, 16)


def recorded(path: Path, body: Callable[[Recorder], Awaitable[None]], **options: Any) -> list[Record]:
    async def main() -> None:
        journal = Journal(path)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(journal.run)
            await body(recorder(journal, **options))
            await journal.aclose()
            nursery.cancel_scope.cancel()
        assert journal.running == 0

    trio.run(main)
    if not path.exists():
        return []
    with History(path) as history:
        return history.records()


def test_a_request_that_ends_well(tmp_path: Path) -> None:
    async def body(recorder: Recorder) -> None:
        with recorder.request(plan(recorder)) as entry:
            serve(entry, (0.5, 0.75, 1.0), "length")
            entry.kv_tokens = PAGE_TOKENS + 1

    (record,) = recorded(tmp_path / "history.db", body)
    measured, task = record.measured, record.task
    assert (measured.tokens, measured.ttft_s, measured.token_s, measured.tokens_per_s) == (3, 0.5, 0.25, 4.0)
    assert (measured.bytes_out, measured.bytes_in, measured.drafted, measured.accepted) == (100, 200, 5, 3)
    assert (measured.finish, measured.error, measured.prefix_tokens) == ("length", "", 16)
    assert measured.kv_bytes == 2 * PAGE_TOKENS * 4 * 4 * BLOCK.kv_values_per_token  # two pages, four blocks, float32
    assert (task.prompt_tokens, task.concurrency, task.max_new_tokens) == (60, 1, 8)
    assert task.repetition > 0.9
    assert (record.strategy, record.chosen_by, record.model, record.origin) == (
        Strategy(speculation="lookup"),
        "user",
        "demo",
        "request",
    )
    assert record.predicted.token_s
    assert record.route.hops == 2
    assert from_row(to_row(record)) == record


def test_requests_that_fail_are_recorded_as_far_as_they_came(tmp_path: Path) -> None:
    async def body(recorder: Recorder) -> None:
        with suppress(RouteUnavailable), recorder.request(plan(recorder)) as entry:
            serve(entry, (0.5,), "")
            raise RouteUnavailable("gone")
        with trio.CancelScope() as scope, recorder.request(plan(recorder)) as entry:
            serve(entry, (), "")
            scope.cancel()
            await trio.lowlevel.checkpoint()
        with recorder.request(plan(recorder)):
            pass  # given up before anything was opened

    records = recorded(tmp_path / "history.db", body)
    assert [(each.measured.error, each.measured.tokens, each.measured.ttft_s) for each in records] == [
        ("RouteUnavailable", 1, 0.5),
        ("cancelled", 0, None),
        ("cancelled", 0, None),
    ]


def test_requests_at_the_same_time_are_counted_and_prefixes_remembered(tmp_path: Path) -> None:
    async def body(recorder: Recorder) -> None:
        async def one() -> None:
            async with recorder.journal.under_way():
                with recorder.request(plan(recorder)) as entry:
                    serve(entry, (0.1,), "stop")
                    await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as burst:
            for _ in range(3):
                burst.start_soon(one)

    records = recorded(tmp_path / "history.db", body)
    seen = sorted((each.task.concurrency, each.task.shared_prefix) for each in records)
    assert seen == [(3, 0.0), (3, 0.8), (3, 0.8)], "the first of a burst knows of the others, too"


def test_a_hop_that_left_the_swarm_since_is_recorded_as_it_was(tmp_path: Path) -> None:
    async def body(recorder: Recorder) -> None:
        with recorder.request(plan(recorder)) as entry:
            serve(entry, (0.1,), "stop")

    (record,) = recorded(tmp_path / "history.db", body, now=SwarmView)
    assert record.route.hops == 2


def test_a_worker_that_states_the_impossible_does_not_spoil_the_history(tmp_path: Path) -> None:
    liar = view(advert(read_gb_s=1e30, spans=(held(1 << 53),)), advert(read_gb_s=1e30))

    async def body(recorder: Recorder) -> None:
        with recorder.request(plan(recorder)) as entry:
            serve(entry, (0.1,), "stop")

    (record,) = recorded(tmp_path / "history.db", body, swarm=liar)
    assert record.route.read_gb_s_min == STATED_MAX
    assert record.route.span_us[0] == STATED_MAX
    assert from_row(to_row(record)) == record


def test_a_name_that_is_no_line_is_made_one(tmp_path: Path) -> None:
    async def body(recorder: Recorder) -> None:
        with recorder.request(plan(recorder)) as entry:
            serve(entry, (0.1,), "stop")

    (record,) = recorded(tmp_path / "history.db", body, name="two\nlines" + "x" * 500)
    assert record.model == "twolines" + "x" * 192


def test_a_history_that_cannot_be_written_fails_no_request(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def body(recorder: Recorder) -> None:
        for _ in range(3):
            with recorder.request(plan(recorder)) as entry:
                serve(entry, (0.1,), "stop")
            await trio.testing.wait_all_tasks_blocked()

    place = tmp_path / "history.db"
    place.mkdir()
    with caplog.at_level(logging.WARNING), pytest.raises(InputError, match="history"):  # of the test, reading
        recorded(place, body)
    assert [message.message for message in caplog.records] == ["requests are not recorded"]


def test_a_record_that_could_not_be_read_again_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Rows are never changed: one such would make all the others unreadable."""

    async def body(recorder: Recorder) -> None:
        for temperature in (1e16, 0.5):
            task = recorder.task(IDS, 8, temperature, "latency", False)
            with recorder.request(Plan(task, Strategy(), "user")) as entry:
                serve(entry, (0.1,), "stop")

    with caplog.at_level(logging.WARNING):
        (record,) = recorded(tmp_path / "history.db", body)
    assert record.task.temperature == 0.5
    assert [message.message for message in caplog.records] == ["a request is not recorded"]


def test_a_history_that_another_writes_for_long_is_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("node.history.BUSY_S", 0.0)

    async def body(recorder: Recorder) -> None:
        async def ask() -> None:
            with recorder.request(plan(recorder)) as entry:
                serve(entry, (0.1,), "stop")
            await recorder.journal.flush()

        await ask()
        with History(tmp_path / "history.db") as other, other._writing():
            await ask()
            await ask()
        await ask()

    assert len(recorded(tmp_path / "history.db", body)) == 4
    assert not caplog.records


def test_what_is_built_again_is_the_same_record(tmp_path: Path) -> None:
    """A part of what waits may be written before the file is found busy."""
    journal = Journal(tmp_path / "history.db")
    of = recorder(journal)
    with of.request(plan(of)) as entry:
        serve(entry, (0.5, 0.6), "length")
    (build,) = journal._waiting
    assert build().uid == build().uid


def test_of_what_waits_the_oldest_is_left_out_and_the_rest_keeps_its_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("node.recording.WAITING_MAX", 3)
    builds = [partial(numbered, number) for number in range(5)]

    async def main() -> None:
        journal = Journal(tmp_path / "history.db")

        def busy(_: Path, taken: Sequence[Callable[[], Record]]) -> None:
            assert list(taken) == builds[1:4]
            trio.from_thread.run_sync(journal.add, builds[4])  # meanwhile
            raise HistoryBusy("try again")

        monkeypatch.setattr(journal, "_write", busy)
        for build in builds[:4]:
            journal.add(build)
        await journal.flush()
        assert list(journal._waiting) == builds[2:]

    trio.run(main)


def test_a_client_that_is_cancelled_writes_its_last_words_and_closes_the_file(tmp_path: Path) -> None:
    file = tmp_path / "history.db"

    async def main() -> None:
        journal = Journal(file)
        journal.add(partial(numbered, 1))
        with trio.CancelScope() as scope:
            scope.cancel()
            await journal.aclose()
        assert [each.name for each in tmp_path.glob("history.db*")] == [file.name], (
            "and not what belongs to an open one"
        )

    trio.run(main)
    with History(file) as history:
        assert history.records() == [numbered(1)]


def test_last_words_are_not_waited_for_for_ever(tmp_path: Path) -> None:
    async def main() -> None:
        journal = Journal(tmp_path / "history.db")
        journal.add(partial(numbered, 1))
        async with journal._turn:  # another write hangs
            began = trio.current_time()
            with trio.fail_after(60):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(journal.aclose)
            assert trio.current_time() - began == pytest.approx(LAST_WORDS_S)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


@pytest.mark.parametrize("when", ["at the end", "before"])
def test_a_history_that_another_holds_keeps_no_client_from_ending(
    tmp_path: Path, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, journal, begun = tmp_path / "history.db", Journal(tmp_path / "history.db"), threading.Event()
    monkeypatch.setattr("node.recording.LAST_WORDS_S", 0.1)

    def build() -> Record:
        begun.set()
        return numbered(1)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(journal.run)
            await trio.testing.wait_all_tasks_blocked()
            journal.add(build)
            if when == "before":
                await trio.to_thread.run_sync(begun.wait)
            nursery.cancel_scope.cancel()
        await journal.aclose()

    with History(file) as other, other._writing():
        began = time.monotonic()
        trio.run(main)
        assert time.monotonic() - began < BUSY_S / 2, "it did not wait for the other"
    assert begun.wait(BUSY_S)
    with journal._in_use:  # until the write has ended
        assert not list(tmp_path.glob("history.db-*")), "it closed the file"
    with History(file) as history:
        assert history.records() == [numbered(1)]


def test_no_history_no_file(tmp_path: Path) -> None:
    async def main() -> None:
        journal = Journal(None)
        journal.add(lambda: numbered(1))
        await journal.aclose()

    trio.run(main)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("value", "want"), [("0", False), ("1", True), ("", True)])
def test_the_switch(value: str, want: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, value)
    assert wanted() is want


def test_the_hardware_is_one_line() -> None:
    assert "cores" in hardware()
    assert hardware().isprintable()
