"""`auto` beside fixed strategies: what is compared, when it ends, and what is said of it; without a swarm."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from client.metalearning.candidates import CANDIDATES
from node.recording import Journal
from protocol.errors import InputError, SottoError
from protocol.strategy import lossy, parse
from simnet.bench.collect import cell, grid
from simnet.bench.paired import Rounds
from simnet.bench.scheduler import live
from simnet.bench.scheduler.live import AUTO, Live, Races, strategies, summary

FAST, SLOW = "speculation=lookup", "default"


def races(auto: list[float], fast: list[float], slow: list[float]) -> Races:
    return Races(Rounds({AUTO: auto, FAST: fast, SLOW: slow}), Counter({FAST: 3}))


def test_no_swarm_is_in_the_records() -> None:
    assert not set(live.MODELS) & set(grid.MODELS)
    assert not set(live.ROUTES) & set(grid.ROUTES)
    assert not set(live.MODELS.values()) & set(grid.MODELS.values())
    known = {(route.hops, route.rtt_ms, route.mbit_s) for route in grid.ROUTES.values()}
    unlimited = {(route.hops, route.rtt_ms, route.mbit_s) for route in live.ROUTES.values()} & known
    assert unlimited <= {(1, 0, 0)}, "one worker on this machine is what it is"
    assert len(live.WORKLOADS) == 5
    assert {route for _, route, _ in live.WORKLOADS.values()} == set(live.ROUTES)


def test_what_loses_precision_takes_no_part_in_exact_workloads() -> None:
    for _, _, task in live.WORKLOADS.values():
        names = strategies(task)
        assert names[0] == AUTO
        assert set(names[1:]) == {name for name in CANDIDATES if not task.exact or not lossy(parse(name))}


def test_the_best_fixed_is_chosen_on_rounds_that_do_not_count() -> None:
    """Fast is fast in the rounds of the first half alone: it is the best by these, and judged by the others."""
    found = races([10.0] * 8, [12.0, 8.0] * 4, [9.0, 9.0] * 4)
    report = found.report()
    assert report["best_fixed"] == FAST
    assert report["auto_vs_best_fixed"]["ratio"] == pytest.approx(10 / 8)
    assert report["ratios"][SLOW]["ratio"] == pytest.approx(10 / 9, abs=1e-3)
    assert (report["rounds"], report["auto_took"]) == (8, {FAST: 3})


def test_it_ends_when_the_ratio_is_known() -> None:
    assert not races([], [], []).known()
    assert not races([10.0] * 7, [10.0] * 7, [9.0] * 7).known(), "three rounds of the half that counts"
    assert races([10.0] * 8, [10.0] * 8, [5.0, 20.0] * 4).known(), "others may be as unsteady as they like"
    assert not races([10.0, 9.0, 11.0, 10.5] * 2, [10.0] * 8, [9.0] * 8).known()


def test_goals_of_live_swarms() -> None:
    good = races([10.0] * 8, [10.0] * 8, [9.0] * 8)
    bad = races([9.0] * 8, [10.0] * 8, [9.0] * 8)
    found = summary({"chat": good, "batch": bad})
    assert found["geometric_mean_of_ratios"][FAST]["ratio"] == pytest.approx(0.9**0.5, abs=1e-3)
    assert found["geometric_mean_of_ratios"][SLOW]["workloads"] == 2
    assert found["goals"]["failed"] == [
        f"auto's geometric mean at least that of {FAST}",
        "batch: not worse than the best fixed by 5 %",
    ]
    assert summary({"chat": races([], [], [])})["goals"] == {"passed": [], "failed": []}


def test_requests_that_take_too_long_are_an_error_of_the_tree(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def never(*_: Any) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(cell, "measure", never)
    config, recorder = SimpleNamespace(vocab_size=8_000, max_position=2048), SimpleNamespace(journal=Journal(None))
    model: Any = SimpleNamespace(config=config, recorder=recorder, draft=SimpleNamespace(ready=None))
    given = Live(tmp_path, tmp_path)
    with pytest.raises(SottoError, match="wire=int8 took more than 240 s"):
        trio.run(
            live._turn, model, given, given.design.cells[1], (0, "wire=int8"), clock=MockClock(autojump_threshold=0)
        )


def test_workloads_have_names(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="use chat, agents"):
        Live(tmp_path, tmp_path, only=("chats",))
