"""Collections without workers: what a run is made of, the file of rows, the table that is made of them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from client.metalearning.table import Columns, Scale
from client.metalearning.table import read as read_table
from client.speculation import DRAFT, Agreement, Guess
from node.history import History, parse_condition
from node.model import Ask
from node.paths import history_file
from node.recording import Journal
from protocol.errors import InputError, RouteUnavailable
from simnet.bench.collect import cell, store, table
from simnet.bench.collect.estimate import hours_left, per_minute
from simnet.bench.collect.grid import Cell, Context
from simnet.bench.collect.run import Options
from simnet.bench.collect.store import Origin
from simnet.bench.collect.table import FEATURES
from simnet.bench.collect.tasks import Drawn, Room, draw, known_before
from tests.helpers.collecting import ALONE, STRATEGIES, TASK, design
from tests.helpers.records import RECORD, numbered

ROOM = Room(vocabulary=4000, context_tokens=2048)
ORIGIN = Origin(grid="tiny", hardware="a machine")


def drawn(strategy: str = "default", block: int = 0, **changes: Any) -> Drawn:
    return draw(Cell(block, Context(7, "small", "here", replace(TASK, **changes)), strategy), ROOM)


def test_a_part_of_a_design_is_whole_contexts_and_whole_blocks() -> None:
    cells = [replace(each, block=block) for block in range(3) for each in design().cells]

    def part(**only: Any) -> set[tuple[int, int]]:
        options = Options(Path(), Path(), design(), **only)
        return {(each.block, each.context.number) for each in cells if options.has(each)}

    assert part() == {(block, number) for block in range(3) for number in range(4)}
    assert part(contexts=3, blocks=2) == {(block, number) for block in range(2) for number in range(3)}
    assert part(route="there", blocks=1) == {(0, 2), (0, 3)}


def test_lengths_are_the_contexts_on_average() -> None:
    work = drawn(requests=32, prompt_tokens=200).work
    lengths = [len(request.prompt) for request in work.requests]
    assert sum(lengths) / 32 == pytest.approx(200, abs=1)
    assert min(lengths) < 195 < 205 < max(lengths)
    assert {len(request.output) for request in work.requests} == {32}


def test_a_prompt_that_would_not_fit_is_cut() -> None:
    short = draw(design().cells[0], Room(4000, 64, new_tokens=6))
    assert short.longest_tokens <= 96 + 16
    assert all(len(request.prompt) <= 58 for request in short.work.requests)


class Counting:
    """A draft model that says the number after the last token's."""

    def begin(self, prompt: Sequence[int]) -> None:
        self.last = prompt[-1]

    def extend(self, ids: Sequence[int]) -> None:
        self.last = ids[-1]

    def guess(self, count: int) -> Guess:
        return Guess(tuple(self.last + 1 + at for at in range(count)), DRAFT)


@pytest.mark.parametrize(("agreement", "repetition"), [(0.0, 0.5), (0.6, 0.0), (0.6, 0.5), (0.9, 0.9)])
def test_what_an_answer_does_not_copy_is_what_the_draft_model_says_so_often(
    agreement: float, repetition: float
) -> None:
    task = replace(TASK, requests=200, agreement=agreement, repetition=repetition, agreement_known=True)
    context = Context(7, "small", "here", task)
    one, other = (draw(Cell(0, context, strategy), ROOM, Counting()) for strategy in STRATEGIES)
    said = [
        [after == before + 1 for before, after in pairwise((request.prompt[-1], *request.output))]
        for run in (one, other)
        for request in run.work.requests
    ]
    new = round(16 * (1 - repetition))
    at_new = [held for each in said for at, held in enumerate(each) if at % 16 < new]
    assert sum(at_new) / len(at_new) == pytest.approx(agreement, abs=0.05)
    both = [
        mine == theirs for pair in zip(said[:200], said[200:], strict=True) for mine, theirs in zip(*pair, strict=True)
    ]
    assert sum(both) > 0.995 * len(both), "strategies have it in the same places, but for what is new and looks so"
    wrong = min(2, 16 - new)  # where a copy begins
    assert one.agreement == other.agreement == pytest.approx(agreement * new / (new + wrong), abs=0.2)


def test_a_client_that_has_seen_no_guesses_knows_nothing_of_them() -> None:
    assert drawn(agreement=0.6).agreement is None
    assert known_before(drawn(agreement=0.6, agreement_known=True), TASK).agreement is not None


def test_all_requests_of_a_run_share_its_prefix_and_nothing_more() -> None:
    run = drawn(repetition=0.0)
    prompts = [run.leader.prompt, *(request.prompt for request in run.work.requests)]
    assert {prompt[:72] for prompt in prompts} == {prompts[0][:72]}
    assert len({prompt[72] for prompt in prompts}) == len(prompts)


def test_another_run_has_the_same_shape_and_other_tokens() -> None:
    one, other = drawn("default"), drawn("wire=int8")
    assert drawn("default") == one
    for mine, theirs in zip(one.work.requests, other.work.requests, strict=True):
        assert [mine.prompt.index(token) for token in mine.prompt] == [
            theirs.prompt.index(token) for token in theirs.prompt
        ]
        assert mine.prompt[:8] != theirs.prompt[:8]
    assert [len(r.prompt) for r in drawn(block=1).work.requests] != [len(r.prompt) for r in one.work.requests]


@pytest.mark.parametrize("copied", [0.0, 0.5, 0.875])
def test_an_answer_copies_its_prompt_in_order(copied: float) -> None:
    for request in drawn(repetition=copied).work.requests:
        place = {pair: at for at, pair in enumerate(zip(request.prompt, request.prompt[1:], strict=False))}
        pairs = zip(request.output, request.output[1:], strict=False)
        turns = 2 if copied > 0 else 0
        expected = max(0, round(32 * copied) - turns)
        assert sum(pair in place for pair in pairs) == pytest.approx(expected, abs=2)


def test_a_client_sees_the_likeness_of_prompts_and_not_of_answers() -> None:
    seen = known_before(drawn(requests=8), TASK)
    assert seen.shared_prefix == pytest.approx(0.75, abs=0.15), "whole pages of 16, the leader has them all"
    assert 0.1 < seen.repetition < 0.5
    plain = known_before(drawn(repetition=0.0, shared_share=0.0), ALONE)
    assert (plain.repetition, plain.shared_prefix, plain.exact, plain.concurrency) == (0.0, 0.0, True, 2)


def row(number: int = 0, strategy: str = "default", block: int = 0, **found: Any) -> dict[str, Any]:
    """As run.py makes them."""
    context = design().cells[2 * number].context
    known = known_before(draw(design().cells[2 * number], ROOM), context.task)
    features = {"model": {"family": "llama"}, "route": {"hops": 1, "span_us": [1.0, 2.0]}, "task": asdict(known)}
    found = found or {"measured": {"latency_per_token_s": 0.5, "tokens_per_s": 4.0}}
    times = {"at_ms": 1, "seconds": 30.0, "setup_s": 0.0}
    where = {"model": context.model, "route": context.route}
    return {"block": block, "context": number, "strategy": strategy, "features": features, **where, **times, **found}


def test_rows_come_back_and_a_torn_last_one_is_dropped(tmp_path: Path) -> None:
    with store.opened(tmp_path, ORIGIN) as rows:
        rows.add(row(0))
        rows.add(row(1, error="Refused: no"))
        assert len(rows.done) == 2
    file = tmp_path / store.FILE
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"block": 0, "cont')
    assert store.read(tmp_path) == (ORIGIN, [row(0), row(1, error="Refused: no")])
    with store.opened(tmp_path, ORIGIN) as rows:
        assert file.read_bytes() == whole
        assert rows.done == {(0, 0, "default")}, "a run that failed is tried again"
        rows.add(row(1))
    assert len(store.read(tmp_path)[1]) == 3


def test_records_of_something_else_are_not_mixed(tmp_path: Path) -> None:
    with store.opened(tmp_path, ORIGIN) as rows:
        rows.add(row())
    kept = (tmp_path / store.FILE).read_bytes()
    for other in ({"grid": "another"}, {"method": 99}, {"version": "0.0"}, {"hardware": "another"}):
        with pytest.raises(InputError, match="must not mix"), store.opened(
            tmp_path, replace(ORIGIN, **other)
        ):  # fmt: skip
            pass
    assert (tmp_path / store.FILE).read_bytes() == kept


def test_one_collection_at_a_time_and_no_other_files(tmp_path: Path) -> None:
    busy = pytest.raises(InputError, match="another sotto collection")
    with store.opened(tmp_path, ORIGIN), busy, store.opened(tmp_path, ORIGIN):
        pass
    with pytest.raises(InputError, match="no records"):
        store.read(tmp_path / "elsewhere")
    file = tmp_path / store.FILE
    file.write_bytes(b"hello\n")
    with pytest.raises(InputError, match="no file of records"):
        store.read(tmp_path)
    file.write_bytes(json.dumps(asdict(ORIGIN)).encode() + b"\n{}\n")
    with pytest.raises(InputError, match="damaged"):
        store.read(tmp_path)


def test_requests_of_a_run_say_how_many_are_under_way_and_know_the_leaders_prefix() -> None:
    asked = list[tuple[int, float]]()

    @dataclass(frozen=True)
    class Recording:
        journal: Journal

    @dataclass(frozen=True)
    class Model:
        recorder: Recording

        @asynccontextmanager
        async def ask(self, prompt: list[int], ask: Ask) -> AsyncIterator[Any]:
            asked.append((ask.concurrency, self.recorder.journal.prefixes.share(prompt)))

            async def pieces() -> AsyncIterator[str]:
                await trio.sleep(1)
                yield ""

            yield SimpleNamespace(pieces=pieces(), result=SimpleNamespace(token_times_s=(0.5, 1.0)))

    async def main() -> None:
        drawn = draw(design().cells[0], ROOM)
        model: Any = Model(Recording(Journal(None)))
        await cell.measure(model, Ask(), TASK, drawn, cell.Kept(model.recorder.journal))

    trio.run(main, clock=MockClock(autojump_threshold=0))
    leader, *others = asked
    assert leader == (1, 0.0)
    assert {concurrency for concurrency, _ in others} == {TASK.concurrency}
    assert others[0][1] > 0.5, "the first has the leader's prefix, as all have"


def test_requests_of_a_run_are_in_the_history_before_the_next_run(tmp_path: Path) -> None:
    made = [numbered(number, origin="bench") for number in range(1, 5)]

    async def main() -> None:
        for later in (Journal(history_file(tmp_path)), Journal(None)):  # the second is switched off
            kept = cell.Kept(later)
            for record in made:
                kept.add(partial(replace, record))
            await kept.remember()

    trio.run(main)
    with History(history_file(tmp_path)) as history:
        assert history.records([parse_condition("origin=bench")]) == made


def test_a_run_that_failed_is_in_the_history_and_has_no_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two requests end, one well; then the run is given up."""
    lost = replace(RECORD.measured, error="RouteUnavailable")
    ended = [numbered(1, origin="bench"), numbered(2, origin="bench", measured=lost)]

    agreement = Agreement()

    async def fails(*given: Any) -> None:
        assert agreement.rate == 0.75
        kept = next(each for each in given if isinstance(each, cell.Kept))
        for record in ended:
            kept.add(partial(replace, record))
        raise RouteUnavailable("a worker is gone")

    monkeypatch.setattr(cell, "measure", fails)
    monkeypatch.setattr(cell, "features", lambda *_: {})
    recorder = SimpleNamespace(journal=Journal(history_file(tmp_path)))
    draft = SimpleNamespace(agreement=agreement)
    model: Any = SimpleNamespace(recorder=recorder, decide=lambda *_: None, draft=draft)
    requests = replace(draw(design().cells[0], ROOM), agreement=0.75)
    found = trio.run(cell.run, model, design().cells[0], requests)
    assert found == {"features": {}, "error": "RouteUnavailable: a worker is gone"}
    with History(history_file(tmp_path)) as history:
        assert history.records() == ended


def test_the_table_has_what_a_choice_may_be_learnt_from() -> None:
    later = row(0, "default", block=1)
    later["features"]["route"]["hops"] = 99
    exact = row(1, "default", measured={"latency_per_token_s": 0.5, "tokens_per_s": 4.0})
    rows = [row(0), later, row(0, STRATEGIES[1], error="Refused: no"), exact, row(1, STRATEGIES[1])]
    made = list(table.table(ORIGIN, rows, design()))
    assert [(each["context"], each["block"], each["strategy"]) for each in made] == [
        (0, 0, "default"),
        (0, 1, "default"),
        (1, 0, "default"),
    ], "no run that failed, and none that loses precision where an exact answer was asked for"
    assert [each["performance"] for each in made] == [2.0, 2.0, 4.0], "latency of a request; throughput of all"
    assert {each["route_hops"] for each in made} == {1}, "what was known before the context's first run"
    assert made[0]["route_span_us"] == "1.0;2.0"
    assert (made[0]["workload"], made[2]["workload"]) == ("shared-copied-few", "plain-few")
    assert (made[0]["links"], made[0]["simulated"], made[0]["hardware"]) == ("loopback", 0, "a machine")
    assert list(made[0])[:7] == ["context", "block", "model", "route", "workload", "strategy", "performance"]
    assert [each["cost_s"] for each in made] == [0.5, 0.5, 0.25]
    assert len(list(table.table(ORIGIN, rows, design(), lossy=True))) == 4


def test_what_is_left_takes_as_long_as_it_took() -> None:
    cells = list(design().cells)
    assert hours_left([], cells) is None
    first = row(0) | {"setup_s": 60.0}
    assert hours_left([first], cells[1:2]) == pytest.approx((30 + 60) / 3600)
    assert hours_left([first], cells[1:]) == pytest.approx((7 * 30 + 4 * 60) / 3600), "four deployments"
    assert per_minute([first, row(1)]) == {"here": 1.0}


def test_a_run_waits_for_a_calm_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others use all of two processors for three looks, and then a quarter of them."""
    monkeypatch.setattr(cell, "cores", lambda: 2)
    monkeypatch.setattr(cell, "cpu_seconds", lambda _: 0.0)

    def busy() -> tuple[float, float]:
        now = trio.current_time()
        return 2.0 * min(now, 3.0) + 0.5 * max(0.0, now - 3.0), now

    monkeypatch.setattr(cell, "_busy", busy)

    async def main() -> float:
        await cell.calm(0.3)
        return trio.current_time()

    assert trio.run(main, clock=MockClock(autojump_threshold=0)) == pytest.approx(4 * cell.CALM_LOOK_S)


def test_features_are_columns_of_the_history() -> None:
    from client.metalearning.record import COLUMNS

    assert set(FEATURES) <= set(COLUMNS)
    assert not [name for name in FEATURES if name.startswith(("measured", "design"))]


def test_the_selectors_read_it(tmp_path: Path) -> None:
    with store.opened(tmp_path, ORIGIN) as rows:
        for number in range(3):
            rows.add(row(number))
    report = table.export(tmp_path, design(), tmp_path / "runs.csv")
    assert (report["rows"], report["contexts"], report["left_out"]) == (3, 3, 0)
    columns = Columns(
        tasks=("task_prompt_tokens", "model"), strategy="strategy", performance="performance", hold_out="model"
    )
    with (tmp_path / "runs.csv").open(newline="", encoding="utf-8") as lines:
        assert len(read_table(lines, columns, Scale()).tasks) >= 2
    with pytest.raises(InputError, match="another grid"):
        table.export(tmp_path, design("another"), tmp_path / "runs.csv")


def test_a_collection_goes_on_from_its_export(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    measured = {"latency_per_token_s": 0.5, "tokens_per_s": 4.0, "makespan_s": 2.25, "tokens": 64}
    with store.opened(here, ORIGIN) as rows:
        for number in range(3):
            rows.add(row(number, measured=measured))
        rows.add(row(3, error="Refused: no"))
    table.export(here, design(), tmp_path / "runs.csv")
    assert table.adopt(there, ORIGIN, tmp_path / "runs.csv") == {"adopted": 3}
    with store.opened(there, ORIGIN) as rows:
        assert rows.done == {(0, number, "default") for number in range(3)}, "what failed is run again"
        assert [each["measured"] for each in rows.rows] == [measured] * 3
    table.export(there, design(), tmp_path / "again.csv")
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "runs.csv").read_bytes()
    with pytest.raises(InputError, match=r"hardware a machine, now another.*must not mix"):
        table.adopt(tmp_path / "elsewhere", replace(ORIGIN, hardware="another"), tmp_path / "runs.csv")
    with pytest.raises(InputError, match="has runs of its own"):
        table.adopt(there, ORIGIN, tmp_path / "runs.csv")
    for wrong in ("", "name,age\n1,2\n", "grid,version\n\x00,\n"):
        (tmp_path / "wrong.csv").write_text(wrong)
        with pytest.raises(InputError, match="no export"):
            table.adopt(tmp_path / "elsewhere", ORIGIN, tmp_path / "wrong.csv")
    with pytest.raises(InputError, match="cannot read"):
        table.adopt(tmp_path / "elsewhere", ORIGIN, tmp_path / "missing.csv")


def test_what_lies_beside_a_table_for_a_prior_has_a_name_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("client.metalearning.prior.calibrate", lambda records: records[:7])
    with store.opened(tmp_path, ORIGIN) as rows:
        rows.add(row())
    report = table.export(tmp_path, design(), tmp_path / "runs.json", lossy=True)
    beside = tmp_path / "runs.calibration.json"
    assert report["calibration"] == str(beside)
    assert beside.read_text() == "context"
    assert (tmp_path / "runs.json").read_text().startswith("context,")
