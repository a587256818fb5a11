"""The scheduler of rows: everything is taken once and in order, short steps first, clients and deployments fairly."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import limits
from tests.helpers.jobs import FakeJob, run
from worker.scheduler import SHORT_ROWS, WAIT_S, Scheduler

JOBS = st.lists(
    st.builds(
        FakeJob,
        deployment=st.sampled_from([b"a", b"b"]),
        client=st.sampled_from(["x", "y", "z"]),
        rows_left=st.integers(1, 700),
        rows_at_once=st.integers(1, 300),
        rows_in_time=st.integers(1, 300),
        beside_max=st.integers(1, 4),
        alone=st.booleans(),
        own_product=st.booleans(),
        answer_bytes=st.integers(1, 60),
    ),
    max_size=30,
)


@given(JOBS, st.integers(1, 300), st.data())
def test_every_row_is_taken_once_and_nobody_waits_for_ever(jobs: list[FakeJob], room: int, data: st.DataObject) -> None:
    scheduler: Scheduler[FakeJob] = Scheduler(room, kept_bytes_max=100)
    rows, waiting = {id(job): job.rows_left for job in jobs}, list(jobs)
    asked = dict(rows)
    for _ in range(sum(rows.values()) + len(jobs) + 1):
        for _ in range(min(len(waiting), data.draw(st.integers(0, 3)) if not scheduler.idle else 1)):
            scheduler.add(waiting.pop())
        taken = run(scheduler)
        assert sum(count for _, count in taken) <= room
        assert len({job.deployment for job, _ in taken}) <= 1
        assert len({id(job) for job, _ in taken}) == len(taken)
        assert sum(job.own_product for job, _ in taken) <= 1
        assert sum(count / job.rows_at_once for job, count in taken) <= 1 + 1e-9
        for job, count in taken:
            assert 1 <= count <= job.rows_at_once
            rows[id(job)] -= count
        for deployment in (b"a", b"b"):
            begun = [job for job in jobs if job.deployment == deployment and 0 < rows[id(job)] < asked[id(job)]]
            assert len(begun) <= 1 or sum(job.answer_bytes for job in begun) <= 100
        if scheduler.idle and not waiting:
            break
    assert scheduler.idle
    assert not waiting
    assert set(rows.values()) <= {0}


def test_decodes_go_first_and_a_prompt_takes_what_is_left() -> None:
    scheduler: Scheduler[FakeJob] = Scheduler(64)
    prompt, decode = FakeJob(b"a", "x", 500), FakeJob(b"a", "y", 1)
    scheduler.add(prompt)
    scheduler.add(decode)
    assert run(scheduler) == [(decode, 1), (prompt, 63)]
    assert run(scheduler) == [(prompt, 64)]


def test_as_many_guesses_as_a_step_may_have_wait_for_no_prompt() -> None:
    scheduler: Scheduler[FakeJob] = Scheduler(64)
    prompt, guesses = FakeJob(b"a", "x", 500), FakeJob(b"a", "y", 1 + limits.DRAFTS_MAX)
    scheduler.add(prompt)
    scheduler.add(guesses)
    assert run(scheduler) == [(guesses, 17), (prompt, 47)]


def test_steps_that_share_no_product_go_one_by_one_beside_decodes_and_clients_take_turns() -> None:
    scheduler: Scheduler[FakeJob] = Scheduler()
    for client, rows in [("x", 1)] * 20 + [("x", 100)] + [("y", 4)] * 2:
        scheduler.add(FakeJob(b"a", client, rows, own_product=True))
    order = list[str]()
    for _ in range(5):
        scheduler.add(decode := FakeJob(b"a", "z", 1))
        taken = run(scheduler)
        assert taken[0] == (decode, 1)
        order += [job.client for job, _ in taken[1:]]
    assert order == ["x", "y", "x", "y", "x"]


def test_decodes_without_end_do_not_keep_a_prompt_waiting() -> None:
    scheduler: Scheduler[FakeJob] = Scheduler(64)
    prompt = FakeJob(b"a", "x", 100)
    scheduler.add(prompt)
    for _ in range(10):
        for _ in range(64):
            scheduler.add(FakeJob(b"a", "y", 1))
        run(scheduler)
    assert prompt.rows_left == 0


def test_one_clients_guesses_do_not_keep_anothers_decodes_waiting() -> None:
    scheduler: Scheduler[FakeJob] = Scheduler()
    for _ in range(64):
        scheduler.add(FakeJob(b"a", "greedy", 16))
    served = list[int]()
    for _ in range(20):
        scheduler.add(FakeJob(b"a", "modest", 1))
        taken = run(scheduler)
        for job, _ in taken:
            if job.client == "greedy" and not job.rows_left:
                scheduler.add(FakeJob(b"a", "greedy", 16))
        served.append(sum(job.client == "modest" for job, _ in taken))
        assert sum(rows for _, rows in taken) > 240, "the rest is not wasted"
    assert served == [1] * 20


def test_many_clients_guesses_do_not_keep_anothers_decodes_waiting() -> None:
    scheduler: Scheduler[FakeJob] = Scheduler()
    for client in "abcd":
        for _ in range(16):
            scheduler.add(FakeJob(b"a", client, 16))
    for _ in range(20):
        scheduler.add(FakeJob(b"a", "modest", 1))
        taken = run(scheduler)
        clients = Counter(job.client for job, _ in taken if not job.rows_left)
        assert clients.pop("modest") == 1
        assert set(clients) == set("abcd"), "each has its part"
        assert max(clients.values()) - min(clients.values()) <= 1
        for client, count in clients.items():
            for _ in range(count):
                scheduler.add(FakeJob(b"a", client, 16))


def test_of_more_clients_than_fit_each_has_as_many_turns() -> None:
    scheduler: Scheduler[FakeJob] = Scheduler(64)
    names = [f"client {number}" for number in range(6)]
    for client in names:
        for _ in range(40):
            scheduler.add(FakeJob(b"a", client, 16))
    had = Counter(job.client for _ in range(30) for job, _ in run(scheduler))
    assert had == dict.fromkeys(names, 20)


def test_who_gets_what_prompts_leave_has_had_a_turn() -> None:
    scheduler: Scheduler[FakeJob] = Scheduler(64)
    for client in "abcd":
        for _ in range(10):
            scheduler.add(FakeJob(b"a", client, 15))
    scheduler.add(FakeJob(b"a", "prompt", 4, own_product=True))
    had = [[job.client for job, _ in run(scheduler)] for _ in range(2)]
    assert had == [["a", "b", "c", "prompt", "d"], ["a", "b", "c", "d", "a"]]


def test_clients_take_turns_at_going_first() -> None:
    scheduler: Scheduler[FakeJob] = Scheduler(100)
    greedy, modest = [FakeJob(b"a", "x", 300) for _ in range(3)], FakeJob(b"a", "y", 150)
    for job in (*greedy, modest):
        scheduler.add(job)
    order = [run(scheduler)[0][0].client for _ in range(4)]
    assert order == ["x", "y", "x", "y"]


def test_who_was_served_for_long_does_not_wait_for_who_came_late() -> None:
    scheduler: Scheduler[FakeJob] = Scheduler(100)
    scheduler.add(FakeJob(b"a", "old", 100_000))
    for _ in range(900):
        run(scheduler)
    new = [FakeJob(b"a", "new", 10_000) for _ in range(2)]
    for job in new:
        scheduler.add(job)
    order = [run(scheduler)[0][0].client for _ in range(20)]
    assert order == ["new", "old"] * 10


def test_who_is_given_what_another_leaves_has_had_no_turn() -> None:
    scheduler: Scheduler[FakeJob] = Scheduler(100)
    scheduler.add(FakeJob(b"a", "y", 90))
    scheduler.add(prompt := FakeJob(b"a", "x", 10_000))
    for _ in range(20):
        run(scheduler)
        scheduler.add(FakeJob(b"a", "y", 90))
    assert 10_000 - prompt.rows_left >= 900


def test_turns_in_one_deployment_are_none_in_another() -> None:
    """Else those who have prompts in two of them could always be first in one, and always second in the other."""
    scheduler: Scheduler[FakeJob] = Scheduler(100)
    jobs = [FakeJob(deployment, client, 10_000) for deployment in (b"a", b"b") for client in ("x", "y")]
    for job in jobs:
        scheduler.add(job)
    for _ in range(40):
        run(scheduler)
    assert [job.rows_left for job in jobs] == [9000] * 4


def test_deployments_take_turns() -> None:
    scheduler: Scheduler[FakeJob] = Scheduler(100)
    for deployment in (b"a", b"b"):
        scheduler.add(FakeJob(deployment, "x", 250))
    assert [run(scheduler)[0][0].deployment for _ in range(4)] == [b"a", b"b", b"a", b"b"]


def test_a_removed_job_is_not_taken() -> None:
    scheduler: Scheduler[FakeJob] = Scheduler(100)
    job = FakeJob(b"a", "x", SHORT_ROWS)
    scheduler.add(job)
    scheduler.remove(job)
    scheduler.remove(job)
    assert scheduler.idle
    assert scheduler.take() == []


def test_each_client_who_runs_alone_costs_the_others_one_forward_in_a_round() -> None:
    scheduler: Scheduler[FakeJob] = Scheduler()
    shared = [FakeJob(b"a", f"shared {number}", 1) for number in range(8)]
    alone = [FakeJob(b"a", client, 600, rows_at_once=1, alone=True) for client in ("x", "x", "x", "y")]
    for job in [*shared, *alone]:
        scheduler.add(job)
    served = list[list[str]]()
    for _ in range(12):
        taken = run(scheduler)
        served.append([job.client for job, _ in taken])
        for job, _ in taken:
            if not job.alone:  # the next token
                scheduler.add(FakeJob(b"a", job.client, 1))
    assert [len(clients) for clients in served] == [8, 1, 1] * 4
    assert [clients[0] for clients in served if len(clients) == 1] == ["x", "y"] * 4, "however many sessions one has"


@pytest.mark.parametrize("alone", [1, 4])
def test_who_runs_alone_has_the_time_of_one_client(alone: int) -> None:
    """Of eight who share forwards and two who run alone, each has a tenth, whatever a forward of theirs takes."""
    scheduler: Scheduler[FakeJob] = Scheduler()
    for number in range(8):
        scheduler.add(FakeJob(b"a", f"shared {number}", 1))
    for client in ("x", "y"):
        scheduler.add(FakeJob(b"a", client, 100_000, rows_at_once=1, alone=True))
    spent = Counter[str]()
    for _ in range(2000):
        taken = run(scheduler)
        who = taken[0][0].client if taken[0][0].alone else "shared"
        took = 1 if who == "shared" else alone
        spent[who] += took
        scheduler.charge(b"a", 0.01 * took)
        for job, _ in taken:
            if not job.alone:  # the next token
                scheduler.add(FakeJob(b"a", job.client, 1))
    assert spent["shared"] == pytest.approx(8 * spent["x"], rel=0.1)
    assert spent["x"] == pytest.approx(spent["y"], rel=0.1)


def test_whoever_runs_alone_waits_no_longer_than_clients_are_patient() -> None:
    """Sixteen who always have prompts, and one who runs alone in forwards as long as theirs."""
    scheduler: Scheduler[FakeJob] = Scheduler()
    for number in range(16):
        scheduler.add(FakeJob(b"a", f"shared {number}", 100_000))
    scheduler.add(FakeJob(b"a", "x", 100_000, alone=True))
    waited, longest_s = 0.0, 0.0
    for _ in range(100):
        if run(scheduler)[0][0].alone:
            longest_s, waited = max(longest_s, waited), 0.0
        else:
            waited += 2.0
        scheduler.charge(b"a", 2.0)
    assert 0 < longest_s <= WAIT_S + 2.0


def test_who_is_served_for_having_waited_costs_the_others_no_turn() -> None:
    """A client who decodes, one who runs alone in long forwards, and one who does in short ones without end."""
    scheduler: Scheduler[FakeJob] = Scheduler()
    scheduler.add(FakeJob(b"a", "long", 100_000, alone=True))
    scheduler.add(FakeJob(b"a", "short", 100_000, rows_at_once=1, alone=True))
    spent, took_s = Counter[str](), {"long": 2.0, "short": 0.1, "decode": 0.1}
    for _ in range(1500):
        scheduler.add(FakeJob(b"a", "decode", 1))
        while True:
            job, _ = run(scheduler)[0]
            spent[job.client] += round(10 * took_s[job.client])
            scheduler.charge(b"a", took_s[job.client])
            if job.client == "decode":
                break
        job, _ = run(scheduler)[0]  # while its client chooses
        spent[job.client] += round(10 * took_s[job.client])
        scheduler.charge(b"a", took_s[job.client])
    assert spent["decode"] > 0.6 * spent["short"]


def test_clients_that_came_and_went_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.scheduler.TURNS_REMEMBERED", 8)
    scheduler: Scheduler[FakeJob] = Scheduler()
    scheduler.add(FakeJob(b"a", "stays", 100_000))
    for number in range(100):
        scheduler.add(FakeJob(b"a", f"client {number}", 1, alone=True))
        while not any(job.alone for job, _ in run(scheduler)):
            scheduler.charge(b"a", 1.0)
        scheduler.charge(b"a", 0.5)
    assert len(scheduler._within[b"a"]) <= 9
    assert len(scheduler._waits_since) <= 2


def test_the_parts_of_a_forward_that_jobs_fill_come_to_one() -> None:
    scheduler: Scheduler[FakeJob] = Scheduler()
    for number in range(6):
        scheduler.add(FakeJob(b"a", f"client {number}", 50, rows_at_once=50))
    assert [[rows for _, rows in run(scheduler)] for _ in range(7)] == [[50]] * 6 + [[]]
    for full in (16, 64, 32):
        scheduler.add(FakeJob(b"a", "y", 8, rows_at_once=full))
    scheduler.add(FakeJob(b"a", "x", 500, rows_at_once=256))
    assert [rows for _, rows in run(scheduler)] == [8, 8, 96], "a quarter is for prompts"
    assert [rows for _, rows in run(scheduler)] == [8, 192]


def test_decodes_that_leave_no_memory_alternate_with_a_prompt() -> None:
    scheduler: Scheduler[FakeJob] = Scheduler()
    prompt = FakeJob(b"a", "x", 100, rows_at_once=1)
    scheduler.add(prompt)
    for _ in range(20):
        scheduler.add(FakeJob(b"a", "y", 1, rows_at_once=100))
        run(scheduler)
    assert prompt.rows_left == 90


def test_of_a_clients_long_jobs_that_run_alone_one_is_under_way() -> None:
    scheduler: Scheduler[FakeJob] = Scheduler(100)
    first, second = (FakeJob(b"a", "x", 250, alone=True) for _ in range(2))
    for job in (first, second, *(FakeJob(b"a", "x", 1, alone=True) for _ in range(3))):
        scheduler.add(job)
    assert [rows for ((_, rows),) in (run(scheduler) for _ in range(6))] == [100, 1, 1, 1, 100, 50]
    scheduler.add(FakeJob(b"a", "x", 1, alone=True))
    assert run(scheduler) == [(second, 100)], "it has waited for longer"


def test_few_long_jobs_of_a_deployment_are_under_way() -> None:
    scheduler: Scheduler[FakeJob] = Scheduler(100, kept_bytes_max=100)
    jobs = [FakeJob(b"a", f"client {n}", 150, alone=n % 2 == 0, answer_bytes=40, rows_in_time=1) for n in range(7)]
    decode = FakeJob(b"a", "decode", 1)
    for job in (*jobs, FakeJob(b"b", "z", 30)):
        scheduler.add(job)
    for forward in range(20):
        scheduler.charge(run(scheduler)[0][0].deployment, 1.0)
        assert sum(0 < job.rows_left < 150 for job in jobs) <= 2
        if forward == 10:
            scheduler.add(decode)
    assert not decode.rows_left, "others go on"
    while not scheduler.idle:
        scheduler.charge(run(scheduler)[0][0].deployment, 1.0)
        assert sum(0 < job.rows_left < 150 for job in jobs) <= 2


def test_who_found_no_room_begins_before_others() -> None:
    scheduler: Scheduler[FakeJob] = Scheduler(100, kept_bytes_max=100)
    small = [FakeJob(b"a", f"client {number}", 150, alone=True, answer_bytes=30) for number in range(6)]
    large = FakeJob(b"a", "large", 150, answer_bytes=90)
    for job in (*small, large):
        scheduler.add(job)
    for forward in range(40):
        for job, _ in run(scheduler):
            if job.alone and not job.rows_left:
                scheduler.add(FakeJob(b"a", job.client, 150, alone=True, answer_bytes=30))
        scheduler.add(FakeJob(b"a", f"decode {forward}", 1))
    assert not large.rows_left


def test_who_waits_for_room_and_is_removed_keeps_nobody_waiting() -> None:
    scheduler: Scheduler[FakeJob] = Scheduler(100, kept_bytes_max=100)
    begun, large, small = (FakeJob(b"a", f"client {size}", 350, alone=True, answer_bytes=size) for size in (50, 90, 30))
    for job in (begun, large, small):
        scheduler.add(job)
    assert [run(scheduler)[0][0] for _ in range(2)] == [begun, begun]
    scheduler.remove(large)
    assert run(scheduler) == [(small, 100)]
    scheduler.remove(begun)
    scheduler.add(other := FakeJob(b"a", "other", 350, answer_bytes=70))
    assert run(scheduler) == [(small, 100)]
    assert run(scheduler) == [(other, 100)], "there is room again"
