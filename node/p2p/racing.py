"""Several addresses, one peer: each gets a head start before the next is tried beside it, and the first that answers
wins (RFC 8305). Several peers: some at a time. It sets no deadline: callers do."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import trio
from multiaddr import Multiaddr

from protocol.errors import SottoError, TransportError

T = TypeVar("T")
HEAD_START_S = 0.25  # each address before the next is tried beside it (RFC 8305 recommends 250 ms)
DIALS_MAX = 8  # peers at a time: an invite names as many


async def race(
    maddrs: Sequence[Multiaddr], attempt: Callable[[Multiaddr], Awaitable[T]], discard: Callable[[T], None]
) -> T:
    """What the first successful `attempt` gives; the others are cancelled, and what they still give is discarded.

    When all have failed, raises the first one's error; without addresses a TransportError.
    """
    won: list[T] = []
    failures: list[SottoError] = []

    async def run(maddr: Multiaddr, failed: trio.Event) -> None:
        try:
            result = await attempt(maddr)
        except SottoError as error:
            failures.append(error)
            failed.set()
            return
        if won:
            discard(result)
        won.append(result)
        nursery.cancel_scope.cancel()

    try:
        async with trio.open_nursery() as nursery:
            for maddr in maddrs:
                failed = trio.Event()
                nursery.start_soon(run, maddr, failed)
                with trio.move_on_after(HEAD_START_S):
                    await failed.wait()
    except BaseException:
        if won:
            discard(won[0])
        raise
    if won:
        return won[0]
    raise failures[0] if failures else TransportError("no usable address is known")


async def side_by_side(attempts: Sequence[Callable[[], Awaitable[None]]]) -> None:
    """Run `attempts`, up to DIALS_MAX at a time, the first first. What one raises cancels the others."""
    free = trio.Semaphore(DIALS_MAX)

    async def run(attempt: Callable[[], Awaitable[None]]) -> None:
        try:
            await attempt()
        finally:
            free.release()

    async with trio.open_nursery() as nursery:
        for attempt in attempts:
            await free.acquire()
            nursery.start_soon(run, attempt)
