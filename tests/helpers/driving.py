"""A running driver over fake hops, in virtual time."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import numpy as np
import trio

from client.driver import Driver
from client.session import RouteSession, SessionTerms
from protocol.tensors import Payload
from simnet.runtime import run
from tests.helpers.fake_hop import FakeSwarm, activations, fake_swarm

TERMS = SessionTerms(kv_tokens=64)
LARGE = 512 * 1024  # floats; a frame that fills every buffer on the way


@asynccontextmanager
async def driving(swarm: FakeSwarm) -> AsyncIterator[Driver]:
    """A running driver. Errors of the body come out as they are, not in a group."""
    driver, failure = Driver(swarm.ports), None
    async with trio.open_nursery() as nursery:
        await nursery.start(driver.run)
        try:
            yield driver
        except Exception as error:
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


def with_swarm(count: int, body: Callable[[FakeSwarm, Driver], Awaitable[None]]) -> None:
    async def main() -> bool:
        async with fake_swarm(count) as swarm, driving(swarm) as driver:
            await body(swarm, driver)
            return True
        return False

    assert run(main, seed=1), "the body was cancelled"


def numbers(payload: Payload) -> list[float]:
    return list(np.frombuffer(payload.data, "<f4"))


async def fill_the_way(session: RouteSession) -> None:
    """Submit until the first hop, which reads nothing, has stopped everything up."""
    await session.submit(activations(1, width=LARGE), position=0)
    for position in range(1, 8):
        await session.submit(activations(1, width=LARGE), position=position)
