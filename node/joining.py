"""Staying in the swarm: connect to bootstrap addresses, and again whenever no neighbour is left."""

from __future__ import annotations

import logging

import trio

from protocol.errors import TransportError
from protocol.ports import Transport

log = logging.getLogger("sotto.node")

RETRY_FIRST_S, RETRY_MAX_S = 0.5, 30.0
CHECK_S = 5.0


async def join(transport: Transport, addrs: tuple[str, ...]) -> None:
    """Connect through one of `addrs`, all tried. Raises InputError (malformed), TransportError (none answers)."""
    failures: list[TransportError] = []
    for addr in addrs:
        try:
            await transport.connect(addr)
        except TransportError as error:
            failures.append(error)
    if failures and len(failures) == len(addrs):
        raise TransportError(f"no bootstrap address answers ({failures[0]})")


async def stay_joined(transport: Transport, addrs: tuple[str, ...]) -> None:
    """Join, and join again whenever no neighbour is left, backing off while nobody answers. Runs until cancelled.

    A worker may be started before the node it joins through, so silence is no error here; a malformed address is.
    """
    delay_s = RETRY_FIRST_S
    while addrs:
        if transport.connected():
            delay_s = RETRY_FIRST_S
            await trio.sleep(CHECK_S)
            continue
        try:
            await join(transport, addrs)
        except TransportError as error:
            log.warning("bootstrap unreachable", extra={"retry_s": delay_s, "reason": str(error)})
            await trio.sleep(delay_s)
            delay_s = min(2 * delay_s, RETRY_MAX_S)
