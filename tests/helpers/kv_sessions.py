"""Sessions over hand-made workers whose engines are toys, with keys of the pages that hops keep."""

from __future__ import annotations

from hashlib import sha256
from typing import Any

from protocol.ids import SessionId
from protocol.limits import PAGE_TOKENS
from protocol.messages import OpenSession, SessionOpened
from simnet.compute import CostModel, ToyCompute
from tests.helpers.workers import KV_TOKEN_BYTES, HandClient, HandRoute, Swarm, some_rows

TOKENS = 4 * PAGE_TOKENS
ROWS = some_rows(TOKENS)
KEYS = b"".join(bytes([number]) * 16 for number in range(1, 5))
SESSION_BYTES = TOKENS * 2 * KV_TOKEN_BYTES


def toy(_: object) -> ToyCompute:
    return ToyCompute(CostModel(step_s=0.0, block_position_s=0.0))


async def attached(swarm: Swarm, name: str, client: HandClient | None = None) -> HandRoute:
    route = HandRoute(client or swarm.client, swarm.workers, SessionId(sha256(name.encode()).digest()[:16]))
    await route.dial()
    await route.attach()
    return route


async def begun(route: HandRoute, keys: bytes = KEYS, **terms: Any) -> list[int]:
    """Opens the session; what each hop holds already."""
    boxes = route.boxes(route.tickets(kv_tokens=TOKENS, **terms))
    await route.send(OpenSession(route.session, boxes, keys))
    held = []
    for worker in route.workers:
        message, _ = await route.next(worker)
        assert isinstance(message, SessionOpened), message
        held.append(message.held_tokens)
    return held
