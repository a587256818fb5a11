"""Requests that wait for logits together share a product, and nothing else: neither errors nor cancellation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import TypeVar

import pytest
import torch
import trio
import trio.testing
from torch import Tensor

from client.head_batches import ROWS_MAX, HeadBatches
from protocol.errors import RemoteProtocolError
from simnet.runtime import run

T = TypeVar("T")
VOCABULARY, WIDTH = 64, 8


class Ends:
    """Notes the rows of each product."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.head = torch.randn(VOCABULARY, WIDTH, generator=generator)
        self.products: list[int] = []
        self.fails = 0

    def embed(self, ids: Sequence[int]) -> Tensor:
        return self.head[torch.tensor(ids)]

    def logits(self, hidden: Tensor) -> Tensor:
        self.products.append(len(hidden))
        if self.fails:
            self.fails -= 1
            raise MemoryError
        return hidden @ self.head.T


class Thread:
    """RunSync that takes a second."""

    async def __call__(self, function: Callable[[], T], /) -> T:
        result = function()
        await trio.sleep(1)
        return result


def row(token: int) -> Tensor:
    """Logits of it are largest at `token`, since a vector's product with itself is among those of equal length."""
    ends = Ends()
    return torch.nn.functional.normalize(ends.head[token][None] * 9, dim=1)


def best(logits: Iterable[Tensor]) -> list[int]:
    return [int(each.argmax()) for each in logits]


def virtual(main: Callable[[], object]) -> None:
    run(main, seed=0)  # type: ignore[arg-type]


async def together(batches: HeadBatches, count: int) -> list[Tensor | None]:
    """`count` requests, each in a batch, at once."""
    got: list[Tensor | None] = [None] * count

    async def request(index: int) -> None:
        got[index] = await batches.join(row(index), best)
        batches.end()

    for _ in range(count):
        batches.begin()
    async with trio.open_nursery() as nursery:
        for index in range(count):
            nursery.start_soon(request, index)
    return got


async def alone(batches: HeadBatches, index: int) -> Tensor | None:
    return await batches.join(row(index), best)


def test_those_that_come_together_share_one_product_and_get_their_own_rows() -> None:
    async def main() -> None:
        ends = Ends()
        got = await together(HeadBatches(ends), 6)
        assert ends.products == [6]
        for index, embedded in enumerate(got):
            expected = await alone(HeadBatches(Ends()), index)
            assert embedded is not None
            assert expected is not None
            torch.testing.assert_close(embedded, expected)

    virtual(main)


@pytest.mark.parametrize("seed", range(8))
def test_those_that_shared_a_product_go_on_in_one_turn_of_the_loop(seed: int) -> None:
    async def main() -> None:
        batches = HeadBatches(Ends(), Thread())
        done, heard = trio.open_memory_channel[int](0)
        written: list[int] = []

        async def write() -> None:  # as the driver's writer does
            async for _ in heard:
                written.append(1)
                with suppress(trio.WouldBlock):
                    while True:
                        heard.receive_nowait()
                        written[-1] += 1

        async def request(index: int) -> None:
            await batches.join(row(index), best)
            await done.send(index)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            await trio.testing.wait_all_tasks_blocked()
            async with trio.open_nursery() as requests:
                for index in range(6):
                    batches.begin()
                    requests.start_soon(request, index)
            nursery.cancel_scope.cancel()
        assert written == [6]

    run(main, seed)


def test_those_that_come_during_a_product_share_the_next() -> None:
    async def main() -> None:
        ends = Ends()
        batches = HeadBatches(ends, Thread())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(alone, batches, 0)
            await trio.testing.wait_all_tasks_blocked()
            for index in range(1, 5):
                nursery.start_soon(alone, batches, index)
        assert ends.products == [1, 4]
        assert trio.current_time() == pytest.approx(2.0, abs=0.01)

    virtual(main)


def test_few_rows_are_computed_on_the_loop_and_many_in_a_thread() -> None:
    async def main() -> None:
        batches, started = HeadBatches(Ends(), Thread(), rows_inline=2), trio.current_time()
        await alone(batches, 0)
        await together(batches, 2)
        assert trio.current_time() == started
        await together(batches, 3)
        assert trio.current_time() == started + 1

    virtual(main)


def test_a_batch_is_bounded() -> None:
    async def main() -> None:
        ends = Ends()
        batches = HeadBatches(ends, Thread())
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(batches.join, torch.zeros(ROWS_MAX // 2, WIDTH), lambda _: ())
        assert max(ends.products) <= ROWS_MAX
        assert sum(ends.products) == 2 * ROWS_MAX

    virtual(main)


def test_what_one_request_raises_is_its_own() -> None:
    async def main() -> None:
        ends = Ends()
        batches, outcomes = HeadBatches(ends), list[str]()

        def lies(_: Tensor) -> list[int]:
            raise RemoteProtocolError("a worker lies")

        async def request(choose: Callable[[Tensor], list[int]]) -> None:
            try:
                outcomes.append(f"{await batches.join(row(1), choose) is None}")
            except RemoteProtocolError as error:
                outcomes.append(str(error))

        for _ in range(4):
            batches.begin()
        async with trio.open_nursery() as nursery:
            for choose in (best, lies, best, lambda _: list[int]()):
                nursery.start_soon(request, choose)
        assert ends.products == [4]
        assert sorted(outcomes) == ["False", "False", "True", "a worker lies"]

    virtual(main)


def test_a_product_that_fails_costs_one_request_and_the_others_try_again() -> None:
    async def main() -> None:
        ends = Ends()
        ends.fails = 1
        batches, failed = HeadBatches(ends), list[int]()

        async def request(index: int) -> None:
            try:
                assert await batches.join(row(index), best) is not None
            except MemoryError:
                failed.append(index)

        for _ in range(3):
            batches.begin()
        async with trio.open_nursery() as nursery:
            for index in range(3):
                nursery.start_soon(request, index)
        assert len(failed) == 1
        assert ends.products == [3, 2]

    virtual(main)


@pytest.mark.parametrize("apart", [False, True])
def test_an_embedding_that_fails_costs_one_request_and_the_others_are_not_chosen_again(apart: bool) -> None:
    class Forgetful(Ends):
        """Has no memory for its first embedding."""

        def embed(self, ids: Sequence[int]) -> Tensor:
            if not self.fails:
                self.fails = 1
                raise MemoryError
            return super().embed(ids)

        def logits(self, hidden: Tensor) -> Tensor:
            return hidden @ self.head.T

    async def main() -> None:
        batches, chosen, failed = HeadBatches(Forgetful(), apart=apart), list[int](), list[int]()

        async def request(index: int) -> None:
            def choose(logits: Iterable[Tensor]) -> list[int]:
                chosen.append(index)
                return best(logits)

            try:
                embedded = await batches.join(row(index), choose)
            except MemoryError:
                failed.append(index)
            else:
                torch.testing.assert_close(embedded, Ends().embed([index]))

        for _ in range(3):
            batches.begin()
        async with trio.open_nursery() as nursery:
            for index in range(3):
                nursery.start_soon(request, index)
        assert len(failed) == 1
        assert sorted(chosen) == [0, 1, 2]

    virtual(main)


@pytest.mark.parametrize("who", [0, 1, 2])
def test_whoever_is_cancelled_leaves_the_others_theirs(who: int) -> None:
    """0 computes, 1 and 2 wait for the next product; each is chosen once."""

    async def main() -> None:
        ends = Ends()
        batches, scopes, chosen = HeadBatches(ends, Thread()), [trio.CancelScope() for _ in range(3)], list[int]()

        async def request(index: int) -> None:
            def choose(logits: Tensor) -> list[int]:
                chosen.append(index)
                return best(logits)

            batches.begin()
            with scopes[index]:
                await batches.join(row(index), choose)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(request, 0)
            await trio.sleep(0.1)
            for index in (1, 2):
                nursery.start_soon(request, index)
            await trio.sleep(0.1)
            scopes[who].cancel()
        assert {0, 1, 2} - {who} <= set(chosen)
        assert len(chosen) == len(set(chosen))
        assert not batches._waiting

    virtual(main)
