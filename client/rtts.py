"""How far the workers are from here: round trips measured by Ping, a few workers at a time, all within one deadline.

What was not measured in time has no figure, whatever the reason; placement estimates it. Who is silent for TURN_S holds
up nobody: the next one's turn begins. Nobody is dialled but for a placement, and at most PEERS_MAX workers, so that a
large swarm is not woken by every client.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from math import inf

import trio

from client.dialling import open_stream
from client.driver import run_all
from client.ports import ClientPorts
from client.session import CLOSE_S
from protocol.channel import Channel
from protocol.errors import RemoteProtocolError, TransportError
from protocol.ids import PeerId
from protocol.messages import CONTROL, Ping, Pong
from protocol.swarm import Member

PEERS_MAX = 48
AT_ONCE = 16  # dials that begin together: each costs both sides a handshake
TURN_S = 1.0  # after which another may be dialled, though this one may still answer: most need less
DEADLINE_S = 3.0  # the farthest pair of PlanetLab takes 3 s for one round trip; who needs longer is not placed on
PINGS = 4  # the shortest counts: whatever else runs on either machine only ever makes one longer


def worth_asking(members: Sequence[Member]) -> list[Member]:
    """At most PEERS_MAX: half those with most room, half taken evenly from all, as landmarks for the estimates."""
    if len(members) <= PEERS_MAX:
        return list(members)
    roomy = sorted(members, key=lambda member: (-member.advert.memory_free_bytes, member.peer))
    rest = roomy[PEERS_MAX // 2 :]
    step = len(rest) / (PEERS_MAX // 2)
    rest.sort(key=lambda member: member.peer)
    return roomy[: PEERS_MAX // 2] + [rest[int(index * step)] for index in range(PEERS_MAX // 2)]


async def measure_rtts_ms(ports: ClientPorts, members: Sequence[Member]) -> dict[PeerId, float | None]:
    """Milliseconds to each of `members` that had its turn; None to who did not answer in time."""
    found: dict[PeerId, float | None] = {}
    turns = trio.Semaphore(AT_ONCE)

    async def measure(member: Member) -> None:
        await turns.acquire()
        found[member.peer] = None
        over = trio.Event()

        async def asked() -> None:
            await _measure(ports, member, found)
            over.set()

        async def turn() -> None:
            with trio.move_on_after(TURN_S):
                await over.wait()
            turns.release()

        await run_all(asked, turn)

    calls: list[Callable[[], Awaitable[None]]] = [partial(measure, member) for member in members]
    with trio.move_on_after(DEADLINE_S):
        await run_all(*calls)
    return found


async def _measure(ports: ClientPorts, member: Member, found: dict[PeerId, float | None]) -> None:
    """Note the shortest of PINGS round trips, as soon as there is one."""
    shortest = inf
    try:
        stream = await open_stream(ports, member.peer, member.advert.addrs, CONTROL)
        channel = Channel(stream, CONTROL)
        try:
            for _ in range(PINGS):
                found[member.peer] = shortest = min(await _ping_ms(ports, channel), shortest)
        finally:
            with trio.CancelScope(deadline=trio.current_time() + CLOSE_S, shield=True):
                await channel.aclose()
    except TransportError:
        return
    except RemoteProtocolError:
        ports.observer.violation(member.peer)


async def _ping_ms(ports: ClientPorts, channel: Channel) -> float:
    ping = Ping(ports.entropy(8))
    started = ports.clock.monotonic()
    reply = await channel.call(ping)
    if reply != Pong(ping.nonce):
        raise RemoteProtocolError("a ping was not answered by its pong")
    return 1000 * (ports.clock.monotonic() - started)
