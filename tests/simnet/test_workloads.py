"""Workloads: the same seed, the same requests; the shapes that they promise, from files and without."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from protocol.errors import InputError
from simnet.bench import workloads
from simnet.bench.workloads import CHAT_TRACE, EDIT_PROMPTS, ChatShape, Source, Workload

SOURCE = Source(7, 1000)


def all_of(source: Source) -> list[Workload]:
    return [
        workloads.chat(source, 20),
        workloads.agents(source, 6, 64, 8),
        workloads.long_prompts(source, 3, 200),
        workloads.single(source, 30, 5),
        workloads.editing(source, 4, 100),
    ]


def test_the_same_seed_gives_the_same_requests() -> None:
    assert all_of(SOURCE) == all_of(Source(7, 1000))
    for one, other in zip(all_of(SOURCE), all_of(Source(8, 1000)), strict=True):
        assert one.requests != other.requests, one.name


def test_every_request_can_be_served() -> None:
    for work in all_of(SOURCE):
        times = [request.arrival_s for request in work.requests]
        assert times == sorted(times)
        assert times[0] == 0.0
        for request in work.requests:
            assert request.new_tokens >= 1
            assert request.prompt
            assert all(0 <= token < SOURCE.vocabulary for token in (*request.prompt, *request.output))


def test_chats_are_as_long_as_those_of_the_trace() -> None:
    """Quantiles of the published trace: half of the prompts below 1,020 tokens, of the answers below 129."""
    work = workloads.chat(SOURCE, 4000, ChatShape(tokens_max=100_000))
    prompts = sorted(len(request.prompt) for request in work.requests)
    answers = sorted(request.new_tokens for request in work.requests)
    assert prompts[2000] == pytest.approx(1020, rel=0.05)
    assert prompts[3600] == pytest.approx(2734, rel=0.1)
    assert answers[2000] == pytest.approx(129, rel=0.1)
    gaps = [b.arrival_s - a.arrival_s for a, b in zip(work.requests, work.requests[1:], strict=False)]
    assert statistics.stdev(gaps) / statistics.fmean(gaps) == pytest.approx(1.0, rel=0.15)


def test_lengths_are_scaled_and_bounded() -> None:
    work = workloads.chat(SOURCE, 200, ChatShape(scale=0.125, tokens_max=64))
    assert max(len(request.prompt) + request.new_tokens for request in work.requests) == 64
    assert max(request.new_tokens for request in work.requests) <= 32


def test_a_rate_keeps_the_bursts() -> None:
    work = workloads.chat(SOURCE, 50)
    paced = work.at_rate(5.0)
    last, before = paced.requests[-1].arrival_s, work.requests[-1].arrival_s
    assert last == pytest.approx(49 / 5.0)
    assert paced.requests[10].arrival_s / last == pytest.approx(work.requests[10].arrival_s / before)
    even = workloads.long_prompts(SOURCE, 4, 10).at_rate(2.0)
    assert [request.arrival_s for request in even.requests] == [0.0, 0.5, 1.0, 1.5]
    assert {request.arrival_s for request in paced.at_once().requests} == {0.0}
    assert workloads.single(SOURCE, 4, 4).at_rate(3.0).requests[0].arrival_s == 0.0


def test_unseen_requests_have_nothing_in_common_with_those_seen() -> None:
    work = workloads.agents(SOURCE, 6, 64, 8)
    unseen = work.unseen(Source(9, 1000))
    assert [len(request.prompt) for request in unseen.requests] == [72] * 6
    assert [request.arrival_s for request in unseen.requests] == [request.arrival_s for request in work.requests]
    starts = {request.prompt[:8] for request in (*work.requests, *unseen.requests)}
    assert len(starts) == 4, "two prefixes in common before, two others after"
    edited = workloads.editing(SOURCE, 1, 200).requests[0]
    renamed = Workload("editing", "built-in", (edited,)).unseen(Source(9, 1000)).requests[0]
    kept = [a == b for a, b in zip(edited.prompt, edited.output, strict=True)]
    assert kept == [a == b for a, b in zip(renamed.prompt, renamed.output, strict=True)]


def test_agents_share_long_prefixes() -> None:
    work = workloads.agents(SOURCE, 6, prefix_tokens=64, own_tokens=8, prefixes=2)
    assert len({request.prompt[:64] for request in work.requests}) == 2
    assert len({request.prompt for request in work.requests}) == 6


def test_an_edited_text_is_nearly_the_text() -> None:
    for request in workloads.editing(SOURCE, 4, 500).requests:
        kept = sum(a == b for a, b in zip(request.prompt, request.output, strict=True))
        assert 0.9 * 500 < kept < 500
        assert request.new_tokens == len(request.output)


def test_a_trace_is_used_where_there_is_one(tmp_path: Path) -> None:
    rows = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    rows += [f"2023-11-16 18:15:{second:02}.6805900,{100 + second},{10 + second}" for second in range(0, 50, 10)]
    (tmp_path / CHAT_TRACE).write_text("\n".join(rows) + "\n")
    work = workloads.chat(Source(1, 1000, tmp_path), 8)
    assert work.origin == CHAT_TRACE
    assert {len(request.prompt) for request in work.requests} == {100, 110, 120, 130, 140}
    assert all(request.new_tokens == len(request.prompt) - 90 for request in work.requests)
    times = [request.arrival_s for request in work.requests]
    assert times == sorted(set(times)), "the trace begins again where it is shorter"


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "TIMESTAMP,ContextTokens,GeneratedTokens\nx,1,2\n"])
def test_a_file_that_is_no_trace_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / CHAT_TRACE).write_text(text)
    with pytest.raises(InputError, match=CHAT_TRACE):
        workloads.chat(Source(1, 1000, tmp_path), 8)


def test_texts_are_used_where_there_are_some(tmp_path: Path) -> None:
    lines = [json.dumps({"turns": ["x" * length]}) for length in (10, 40, 60)]
    (tmp_path / EDIT_PROMPTS).write_text("\n".join(lines))
    source = Source(1, 1000, tmp_path, lambda text: list(range(3, 3 + len(text))))
    work = workloads.editing(source, 3, 40)
    assert work.origin == EDIT_PROMPTS
    assert {request.prompt for request in work.requests} == {tuple(range(3, 43))}, "too short a text is left out"
    assert workloads.editing(Source(1, 1000, tmp_path), 3, 40).origin == "built-in", "nobody can encode"
    (tmp_path / EDIT_PROMPTS).write_text('{"turns": []}')
    with pytest.raises(InputError, match=EDIT_PROMPTS):
        workloads.editing(source, 3, 40)
