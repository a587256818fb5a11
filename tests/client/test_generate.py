"""Generation over a session that answers by hand: positions, chunks, endings, times."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import TypeVar

import pytest
import torch
import trio
from torch import Tensor

from client.generate import LOOKED_UP_INLINE_MAX, Generation, GenerationHost, GenerationParams, inline, kv_tokens_for
from client.speculation import PromptLookup, Speculation
from client.tensors import to_payload, to_tensor
from client.text import TextStream
from models.sampling import SamplingParams, sample
from protocol import limits
from protocol.errors import InputError, RemoteProtocolError, RouteUnavailable
from protocol.tensors import Payload
from simnet.runtime import VirtualClock, run

T = TypeVar("T")
VOCABULARY = 50


class CountingEnds:
    """Embeds an id as itself; the logits favour the id that follows it."""

    def embed(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor([[float(token), 0.0] for token in ids])

    def logits(self, hidden: Tensor) -> Tensor:
        logits = torch.zeros(len(hidden), VOCABULARY)
        for row, token in enumerate(hidden[:, 0].tolist()):
            logits[row, (int(token) + 1) % VOCABULARY] = 5.0
            logits[row, (int(token) + 2) % VOCABULARY] = 4.5
        return logits


@dataclass
class EchoSession:
    """Answers a step with its own last rows after `step_s`; remembers what was submitted."""

    step_s: float = 0.1
    fail_at: int | None = None
    submitted: list[tuple[list[int], int, int]] = field(default_factory=list)
    fetched: list[int] = field(default_factory=list)
    ready_at: float = 0.0
    answers: dict[int, Payload] = field(default_factory=dict)

    async def submit(self, payload: Payload, position: int, tail: int = 1) -> int:
        rows = to_tensor(payload)
        step = len(self.submitted)
        self.submitted.append(([int(token) for token in rows[:, 0].tolist()], position, tail))
        self.answers[step] = to_payload(rows[-tail:], torch.float32)
        self.ready_at = max(self.ready_at, trio.current_time()) + self.step_s
        return step

    async def result(self, step: int) -> Payload:
        self.fetched.append(step)
        if step == self.fail_at:
            raise RouteUnavailable("a hop was lost")
        await trio.sleep_until(self.ready_at)
        return self.answers.pop(step)


def host() -> GenerationHost:
    return GenerationHost(VirtualClock(), inline)


def virtual(main: Callable[[], Awaitable[T]]) -> T:
    return run(main, seed=1)


def generate(
    session: EchoSession, ends: CountingEnds, prompt: Sequence[int], params: GenerationParams, host: GenerationHost
) -> AsyncGenerator[int, None]:
    return Generation(session, ends, prompt, params, host).tokens()


async def collect(session: EchoSession, prompt: Sequence[int], params: GenerationParams) -> list[int]:
    return [token async for token in generate(session, CountingEnds(), prompt, params, host())]


def test_what_the_hops_hold_of_a_prompt_is_not_sent() -> None:
    session = EchoSession()

    async def main() -> Generation:
        generation = Generation(
            session, CountingEnds(), list(range(7)), GenerationParams(2, prefill_chunk=3), host(), 5
        )
        assert [token async for token in generation.tokens()] == [7, 8]
        return generation

    generation = virtual(main)
    assert session.submitted == [([5, 6], 5, 1), ([7], 7, 1)]
    assert generation.result().held_tokens == 5
    assert generation.held_tokens == 8


def test_the_prompt_goes_out_in_chunks_and_every_position_is_exact() -> None:
    session = EchoSession()
    ids = virtual(lambda: collect(session, list(range(7)), GenerationParams(4, prefill_chunk=3)))
    assert ids == [7, 8, 9, 10]
    assert session.submitted == [
        ([0, 1, 2], 0, 1),
        ([3, 4, 5], 3, 1),
        ([6], 6, 1),
        ([7], 7, 1),
        ([8], 8, 1),
        ([9], 9, 1),
    ]
    assert session.fetched == [0, 1, 2, 3, 4, 5]


def test_chunks_of_the_prompt_are_in_flight_together() -> None:
    session = EchoSession()

    async def main() -> float:
        async for _ in generate(session, CountingEnds(), list(range(9)), GenerationParams(1, prefill_chunk=3), host()):
            pass
        return trio.current_time()

    # Answers come 0.1 s apart, and all three steps were under way before the first was awaited.
    assert virtual(main) == pytest.approx(0.3)
    assert len(session.submitted) == 3


def test_chunking_does_not_change_the_tokens() -> None:
    sampling = SamplingParams(temperature=1.0, seed=7)
    runs = [
        virtual(
            lambda chunk=chunk: collect(
                EchoSession(), [3, 4, 5, 6], GenerationParams(12, sampling, prefill_chunk=chunk)
            )
        )
        for chunk in (1, 2, 3, 100)
    ]
    assert runs[0] == runs[1] == runs[2] == runs[3]
    assert runs[0] != [7 + n for n in range(12)]


def test_a_token_is_sampled_for_the_position_that_it_takes() -> None:
    sampling = SamplingParams(temperature=1.0, seed=3)
    ids = virtual(lambda: collect(EchoSession(), [10, 11], GenerationParams(5, sampling)))
    before = [11, *ids]
    logits = CountingEnds().logits(CountingEnds().embed(before))
    assert ids == [sample(logits[n], sampling, 2 + n) for n in range(5)]


def test_a_stop_id_is_given_out_and_ends_the_generation() -> None:
    async def main() -> tuple[list[int], str]:
        generation = Generation(
            EchoSession(), CountingEnds(), [1], GenerationParams(9, stop_ids=frozenset([4])), host()
        )
        ids = [token async for token in generation.tokens()]
        return ids, generation.result().finish_reason

    assert virtual(main) == ([2, 3, 4], "stop")


def test_the_result_has_times() -> None:
    async def main() -> None:
        generation = Generation(EchoSession(), CountingEnds(), [1, 2], GenerationParams(3), host())
        with pytest.raises(ValueError, match="has not ended"):
            generation.result()
        async for _ in generation.tokens():
            pass
        result = generation.result("text")
        assert (result.ids, result.finish_reason, result.prompt_tokens) == ((3, 4, 5), "length", 2)
        assert result.token_times_s == pytest.approx((0.1, 0.2, 0.3))
        assert result.time_to_first_token_s == pytest.approx(0.1)
        assert result.tokens_per_second == pytest.approx(10.0)

    virtual(main)


def test_times_count_from_the_start_of_the_request() -> None:
    async def main() -> None:
        begun = replace(host(), started_at=trio.current_time())
        await trio.sleep(2)  # while its session is opened
        generation = Generation(EchoSession(), CountingEnds(), [1, 2], GenerationParams(2), begun)
        async for _ in generation.tokens():
            pass
        assert generation.result().token_times_s == pytest.approx((2.1, 2.2))

    virtual(main)


def test_a_chunk_too_large_for_a_frame_is_cut() -> None:
    class WideEnds(CountingEnds):
        def embed(self, ids: Sequence[int]) -> Tensor:
            wide = torch.zeros(len(ids), limits.STEP_NUMBERS_MAX // 3)
            wide[:, 0] = torch.tensor(ids)
            return wide

    async def main() -> None:
        session = EchoSession()
        async for _ in generate(session, WideEnds(), list(range(8)), GenerationParams(1), host()):
            pass
        assert [(len(ids), position) for ids, position, _ in session.submitted] == [(3, 0), (3, 3), (2, 6)]

    virtual(main)


def test_heavy_work_goes_through_run_sync() -> None:
    calls = []

    async def counting(function: Callable[[], T], /) -> T:
        calls.append(function)
        return function()

    async def main() -> None:
        async for _ in generate(
            EchoSession(),
            CountingEnds(),
            [1, 2, 3],
            GenerationParams(4, prefill_chunk=2),
            GenerationHost(VirtualClock(), counting),
        ):
            pass

    virtual(main)
    assert len(calls) == 2 + 4  # two chunks embedded, four tokens chosen


@pytest.mark.parametrize(("prompt", "off"), [(LOOKED_UP_INLINE_MAX, False), (LOOKED_UP_INLINE_MAX + 1, True)])
def test_a_long_prompt_is_looked_through_off_the_event_loop(prompt: int, off: bool) -> None:
    inside, begun = [False], list[bool]()

    async def noted(function: Callable[[], T], /) -> T:
        inside.append(True)
        try:
            return function()
        finally:
            inside.pop()

    class Noting(PromptLookup):
        def begin(self, prompt: Sequence[int]) -> None:
            begun.append(inside[-1])
            super().begin(prompt)

    async def main() -> None:
        host = GenerationHost(VirtualClock(), noted, speculation=Speculation(Noting()))
        async for _ in generate(EchoSession(), CountingEnds(), [1] * prompt, GenerationParams(1), host):
            pass

    virtual(main)
    assert begun == [off]


@pytest.mark.parametrize(
    "values", [{"max_new_tokens": 0}, {"prefill_chunk": 0}, {"prefill_chunk": 1 << 20}, {"wire_dtype": "int4"}]
)
def test_parameters_that_cannot_be_meant_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(InputError):
        GenerationParams(**({"max_new_tokens": 1} | values))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prompt", "new", "says"),
    [
        (200, 1, "200 tokens .* 128"),
        (128, 1, "128 tokens .* 128"),
        (100, 40, "100 tokens.*40 more.*128.*at most 28"),
        (0, 5, "no tokens"),
    ],
)
def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers(prompt: int, new: int, says: str) -> None:
    with pytest.raises(InputError, match=says):
        kv_tokens_for(prompt, new, 128)


def test_a_session_has_room_for_prompt_and_answer() -> None:
    assert kv_tokens_for(100, 28, 128) == 128


def test_an_empty_prompt_is_refused_before_anything_is_sent() -> None:
    session = EchoSession()
    with pytest.raises(InputError, match="no tokens"):
        generate(session, CountingEnds(), [], GenerationParams(1), host())
    assert session.submitted == []


class Letters:
    """Token n is a letter; nothing is held back."""

    def push(self, token: int) -> str:
        return chr(ord("a") + token % 26)

    def finish(self) -> str:
        return ""


def test_a_stop_string_ends_the_request_and_is_not_given_out() -> None:
    async def main() -> None:
        generation = Generation(EchoSession(), CountingEnds(), [1], GenerationParams(20), host())
        stream = TextStream(generation, Letters(), ["fgh"])
        pieces = [piece async for piece in stream.pieces()]
        result = stream.result()
        assert pieces == ["c", "d", "e"]  # f and g were held back, and then were part of the stop string
        assert (result.text, result.finish_reason, result.ids) == ("cde", "stop", (2, 3, 4, 5, 6, 7))

    virtual(main)


def test_what_looked_like_a_stop_string_comes_out_in_the_end() -> None:
    async def main() -> None:
        generation = Generation(EchoSession(), CountingEnds(), [1], GenerationParams(5), host())
        stream = TextStream(generation, Letters(), ["fgzz"])
        assert [piece async for piece in stream.pieces()] == ["c", "d", "e", "fg"]
        assert stream.result().text == "cdefg"

    virtual(main)


@dataclass
class HugeSession(EchoSession):
    """Answers with the largest finite numbers."""

    async def result(self, step: int) -> Payload:
        return to_payload(torch.full((1, 2), torch.finfo(torch.float32).max), torch.float32)


class SummingEnds(CountingEnds):
    def logits(self, hidden: Tensor) -> Tensor:
        return hidden @ torch.tensor([[1.0, 1.0], [1.0, -1.0]])


def test_an_answer_too_large_for_any_token_is_a_violation() -> None:
    async def body() -> None:
        params = GenerationParams(4, sampling=SamplingParams(temperature=1.0))
        generation = Generation(HugeSession(), SummingEnds(), [1, 2], params, GenerationHost(VirtualClock()))
        async with aclosing(generation.tokens()) as tokens:
            with pytest.raises(RemoteProtocolError, match="a worker lies"):
                await anext(tokens)

    run(body, 1)
