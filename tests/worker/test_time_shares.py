"""Time of the engine: deployments have the same of it, however long their forwards are, and wait for no long one."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import pytest

from tests.helpers.jobs import FakeJob, run
from worker.row_times import FORWARD_S, RowTimes
from worker.scheduler import Scheduler
from worker.time_shares import COMPANY_S

SLOW, QUICK = b"slow", b"quick"


def served(scheduler: Scheduler[FakeJob], took_s: Mapping[bytes, float], forwards: int) -> list[bytes]:
    order = []
    for _ in range(forwards):
        deployment = run(scheduler)[0][0].deployment
        scheduler.charge(deployment, took_s[deployment])
        order.append(deployment)
    return order


def one_row_at_a_time(*jobs: FakeJob) -> Scheduler[FakeJob]:
    scheduler: Scheduler[FakeJob] = Scheduler(1)
    for job in jobs:
        scheduler.add(job)
    return scheduler


def test_deployments_have_the_same_time_and_not_as_many_forwards() -> None:
    scheduler = one_row_at_a_time(FakeJob(SLOW, "x", 1000), FakeJob(QUICK, "y", 1000))
    assert served(scheduler, {SLOW: 30.0, QUICK: 1.0}, 62) == [SLOW, *[QUICK] * 30] * 2


def test_deployments_alternate_where_times_are_alike() -> None:
    scheduler = one_row_at_a_time(FakeJob(SLOW, "x", 1000), FakeJob(QUICK, "y", 1000))
    assert served(scheduler, {SLOW: 1.0, QUICK: 1.0}, 20) == [SLOW, QUICK] * 10
    order = served(scheduler, {SLOW: 1.05, QUICK: 1.0}, 82)
    assert order.count(SLOW) == 40
    assert {len(set(three)) for three in zip(order, order[1:], order[2:], strict=False)} == {2}


def test_who_had_no_work_has_saved_no_time() -> None:
    scheduler = one_row_at_a_time(FakeJob(QUICK, "y", 1), FakeJob(SLOW, "x", 1000))
    took_s = {SLOW: 1.0, QUICK: 1.0}
    served(scheduler, took_s, 100)
    scheduler.add(FakeJob(QUICK, "y", 1000))
    scheduler.add(FakeJob(b"new", "z", 1000))
    assert sorted(served(scheduler, took_s | {b"new": 1.0}, 30)) == [b"new"] * 10 + [QUICK] * 10 + [SLOW] * 10


@pytest.mark.parametrize("others", [1, 7])
def test_whose_next_token_is_on_its_way_keeps_its_turn(others: int) -> None:
    """However many they are who always have work: a token waits for the forward that began before it came."""
    scheduler = one_row_at_a_time(*(FakeJob(f"{n}".encode(), f"{n}", 1000) for n in range(others)))
    took_s = {f"{n}".encode(): FORWARD_S for n in range(others)} | {QUICK: FORWARD_S / 30}
    order = served(scheduler, took_s, 3 * others)
    for _ in range(20):
        scheduler.add(FakeJob(QUICK, "y", 1))
        order += served(scheduler, took_s, 1)
        while order[-1] != QUICK:
            order += served(scheduler, took_s, 1)
        order += served(scheduler, took_s, 1)  # while its client chooses
    first = order.index(QUICK)
    assert order[first + 2 :: 2][:18] == [QUICK] * 18
    rest = [each for each in order if each != QUICK]
    assert max(map(rest.count, rest)) - min(map(rest.count, rest)) <= 1, "and nobody pays for that but by turns"


def test_a_moment_without_work_pays_no_debt() -> None:
    scheduler = one_row_at_a_time(FakeJob(SLOW, "x", 1), FakeJob(QUICK, "y", 1000))
    took_s = {SLOW: 30.0, QUICK: 1.0}
    assert served(scheduler, took_s, 2) == [SLOW, QUICK]
    scheduler.add(FakeJob(SLOW, "x", 1))
    assert served(scheduler, took_s, 30) == [QUICK] * 29 + [SLOW]


def test_clients_who_run_alone_win_their_deployment_no_time() -> None:
    jobs = [FakeJob(SLOW, client, 1000, alone=True) for client in "uvwx"]
    scheduler = one_row_at_a_time(*jobs, FakeJob(QUICK, "y", 1000))
    assert served(scheduler, {SLOW: 1.0, QUICK: 1.0}, 40).count(QUICK) == 20
    assert [job.rows_left for job in jobs] == [995] * 4


def test_who_is_forgotten_begins_anew() -> None:
    scheduler = one_row_at_a_time(FakeJob(SLOW, "x", 1), FakeJob(QUICK, "y", 1000))
    served(scheduler, {SLOW: 30.0, QUICK: 1.0}, 2)
    scheduler.forget(SLOW)
    scheduler.forget(SLOW)
    scheduler.add(FakeJob(SLOW, "x", 1))
    assert served(scheduler, {SLOW: 30.0, QUICK: 1.0}, 3).count(SLOW) == 1


@pytest.mark.parametrize("alone", [False, True])
def test_a_forward_is_short_while_another_deployment_is_in_use(alone: bool) -> None:
    scheduler: Scheduler[FakeJob] = Scheduler()
    scheduler.add(FakeJob(SLOW, "x", 100_000, rows_in_time=7, alone=alone))

    def rows(took_s: float = 0.5) -> int:
        ((job, count),) = run(scheduler)
        scheduler.charge(job.deployment, took_s)
        return count

    assert rows() == 256
    scheduler.add(FakeJob(QUICK, "y", 1))
    assert [rows(), rows()] == [1, 7], "the one with less time, then the other"
    scheduler.add(FakeJob(QUICK, "y", 1))
    assert [rows(), rows()] == [1, 7]
    assert rows() == 7, "the next token is on its way"
    assert rows(COMPANY_S) == 7
    assert rows() == 256, "nobody comes any more"


def test_short_steps_count_towards_the_time_of_a_forward() -> None:
    scheduler: Scheduler[FakeJob] = Scheduler()
    for number in range(40):
        scheduler.add(FakeJob(SLOW, f"client {number}", 1, rows_in_time=16))
    scheduler.add(FakeJob(SLOW, "long", 17, rows_in_time=16))
    scheduler.add(FakeJob(QUICK, "y", 1))
    assert [rows for _, rows in run(scheduler)] == [1] * 12 + [4]


def ran(times: RowTimes, kind: Hashable, rows: int, took_s: float) -> None:
    times.ran({kind: rows}, took_s)


def test_what_was_never_computed_is_tried_with_one_row() -> None:
    times = RowTimes()
    assert times.rows("k") == 1
    ran(times, "k", 256, 0.001)
    assert times.rows("k") > 256
    assert times.rows("gate") == 1, "however quick another is"
    times.ran({"k": 200, "gate": 56}, 0.001)
    assert times.rows("gate") == 1, "what is less of a forward is not what it is put down to"


def test_rows_that_take_long_are_few() -> None:
    times = RowTimes()
    ran(times, "gate", 256, 256 * 0.12)  # while nobody waited
    assert times.rows("gate") == 4
    ran(times, "gate", 4, 4 * 0.12)
    ran(times, "gate", 1, 0.12)
    assert times.rows("gate") == 4
    ran(times, "gate", 4, 4 * 0.24)  # slower than it was
    assert times.rows("gate") == 2
    ran(times, "gate", 2, 100.0)
    assert times.rows("gate") == 1


@pytest.mark.parametrize("first", [1, 16, 256])
def test_a_model_whose_weights_take_long_to_read_computes_more_than_a_row_at_a_time(first: int) -> None:
    times, rows, took_s = RowTimes(), first, 0.0
    for _ in range(30):
        took_s = 0.7 + 0.04 * rows
        ran(times, 10, rows, took_s)
        rows = times.rows(10)
    assert 15 <= rows <= 20
    assert took_s <= 2 * 0.74 + 0.04


def test_a_forward_lasts_half_a_second_where_a_row_takes_less() -> None:
    times, rows = RowTimes(), 1
    for _ in range(20):
        ran(times, 10, rows, 0.1 + 0.01 * rows)
        rows = times.rows(10)
    assert 0.1 + 0.01 * rows == pytest.approx(FORWARD_S, abs=0.02)


def test_a_short_forward_lowers_nothing() -> None:
    times = RowTimes()
    ran(times, 10, 100, 0.25)
    for rows in (5, 1, 2):
        ran(times, 10, rows, 0.2)
    assert times.rows(10) == 200


def test_a_forward_without_a_time_says_nothing_that_cannot_be_said() -> None:
    times = RowTimes()
    ran(times, 10, 1, 0.0)
    assert times.rows(10) > 256
