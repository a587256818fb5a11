"""Requests that lose a worker move together, and once."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
import trio

from client.routing import Hop, Route
from node.moves import Moves
from protocol.errors import RouteUnavailable
from protocol.ids import PeerId
from simnet.runtime import run
from tests.helpers.protocol_samples import DEPLOYMENT

A, B, C = (PeerId("12D3KooW" + letter * 44) for letter in "abc")


@dataclass(frozen=True)
class OnPeer:
    peer: PeerId

    @property
    def route(self) -> Route:
        return Route(DEPLOYMENT, (Hop(self.peer, (), 0, 1),))


class Finder:
    """Finds C, then B, then C..., a second each; the first `failures` times nothing."""

    def __init__(self, failures: int = 0) -> None:
        self.calls, self.failures = list[OnPeer](), failures

    async def __call__(self, left: OnPeer) -> OnPeer:
        self.calls.append(left)
        await trio.sleep(1)
        if len(self.calls) <= self.failures:
            raise RouteUnavailable("nobody has room")
        return OnPeer(B if left.peer == C else C)


def test_requests_that_lose_a_worker_together_move_once() -> None:
    async def main() -> None:
        moves, find, left, went = Moves[OnPeer](Counter()), Finder(), OnPeer(A), list[OnPeer]()

        async def move() -> None:
            went.append(await moves.instead_of(left, frozenset({A}), find))

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(move)
        assert [each.peer for each in went] == [C] * 5
        assert find.calls == [left]
        assert moves.newest is went[0]

    run(main, seed=0)


def test_who_has_lost_the_new_route_too_moves_again() -> None:
    async def main() -> None:
        moves, find = Moves[OnPeer](Counter()), Finder()
        first = await moves.instead_of(OnPeer(A), frozenset({A}), find)
        assert (await moves.instead_of(first, frozenset(), find)).peer == B, "that it failed is enough"
        third = await moves.instead_of(OnPeer(A), frozenset({A, B}), find)
        assert third.peer == C, "one that others moved to, and that this one knows to be lost"

    run(main, seed=0)


def test_requests_that_lose_a_worker_together_hear_together_that_there_is_no_other() -> None:
    async def main() -> None:
        moves, find, left = Moves[OnPeer](Counter()), Finder(failures=1), OnPeer(A)

        async def move() -> None:
            with pytest.raises(RouteUnavailable, match="nobody has room"):
                await moves.instead_of(left, frozenset({A}), find)

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(move)
        assert (trio.current_time(), len(find.calls)) == (1, 1), "one search for all"
        assert moves.newest is None
        assert (await moves.instead_of(left, frozenset({A}), find)).peer == C, "who tries again searches again"

    run(main, seed=0)


def test_who_waited_goes_where_the_others_went_though_the_lost_worker_is_there_again() -> None:
    async def back(left: OnPeer) -> OnPeer:
        await trio.sleep(1)
        return OnPeer(left.peer)

    async def main() -> None:
        moves, left = Moves[OnPeer](Counter()), OnPeer(A)

        async def move() -> None:
            assert (await moves.instead_of(left, frozenset({A}), back)) is moves.newest

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(move)
        assert trio.current_time() == 1

    run(main, seed=0)


def test_who_is_cancelled_while_it_moves_leaves_that_to_the_next() -> None:
    async def main() -> None:
        moves, find, left = Moves[OnPeer](Counter()), Finder(), OnPeer(A)
        with trio.move_on_after(0.5):
            await moves.instead_of(left, frozenset({A}), find)
        assert (await moves.instead_of(left, frozenset({A}), find)) is moves.newest

    run(main, seed=0)


def test_a_route_is_left_once_for_each_violation() -> None:
    moves, violations = Moves[OnPeer](Counter()), Counter({A: 1, B: 2})
    assert moves.broken(OnPeer(A).route, violations)
    assert not moves.broken(OnPeer(C).route, violations)
    moves.passed(violations.copy())
    assert not moves.broken(OnPeer(A).route, violations), "there was no other: it is not looked for again and again"
    violations[A] += 1
    assert moves.broken(OnPeer(A).route, violations)
    assert not moves.broken(OnPeer(B).route, violations)


def test_a_violation_before_the_first_route_was_found_moves_nobody() -> None:
    violations = Counter({A: 1})
    moves = Moves[OnPeer](violations)
    assert not moves.broken(OnPeer(A).route, violations)
    violations[A] += 1
    assert moves.broken(OnPeer(A).route, violations)
