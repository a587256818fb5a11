"""Cleanup that survives cancellation, within a deadline."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

STOP_S = 2.0  # a worker that stops waits this long for a running step


async def finish(action: Callable[[], Awaitable[None]]) -> None:
    """Await the idempotent `action` to its end, however long a running step makes it wait. Cancelled meanwhile, it is
    tried once more, shielded, for STOP_S seconds."""
    try:
        await action()
    except trio.Cancelled:
        with shielded():
            await action()
        raise


def shielded() -> trio.CancelScope:
    """A scope that outer cancellation cannot enter, for STOP_S seconds at most."""
    return trio.CancelScope(deadline=trio.current_time() + STOP_S, shield=True)
