"""A hostile peer against a real node, and an honest one that measures what that costs it.

`measure` probes a worker first alone, then while an attacker in a process of its own keeps silent connections, sends
malformed frames over real libp2p streams, and asks without ever reading. Turned away, it comes again, at will as
somebody else. The honest requests are a user's own, and below these the smallest that there are: messages of a
millisecond, in which each delay shows. The attacker takes only processor time that nobody else wants, since it runs on
this machine and its own work is not the worker's burden. It shows only what it tries; it is no proof.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import trio

from client.tracing import at_percent
from node.garbage import spare_imports
from node.groups import ungrouped
from node.p2p.addresses import parse_bootstrap, tcp_endpoint
from node.p2p.host import UPGRADE_S
from node.p2p.mesh import Mesh, MeshConfig, open_mesh
from protocol.channel import Channel
from protocol.errors import SottoError, TransportError
from protocol.framing import encode_frame
from protocol.ids import PeerId
from protocol.messages import CONTROL, FRAME_BYTES_MAX, Attach, CloseSession, Message, Ping, ShardPiece

REQUEST_S = 10.0  # an honest request that takes longer has failed
PACE_S = 0.01  # between two honest requests
SMALL_PER_REQUEST = 3  # a 99th percentile is the second worst of a hundred
AGAIN_S = 0.5
ERRORS_SHOWN, ERROR_CHARS = 4, 200
_VALID: tuple[tuple[Message, bytes], ...] = (
    (Ping(bytes(8)), b""),
    (Attach(bytes(16)), b""),  # type: ignore[arg-type]  # NewTypes are bytes
    (CloseSession(bytes(16)), b""),  # type: ignore[arg-type]
    (ShardPiece(bytes(32), 0), b"piece"),  # type: ignore[arg-type]
)


@dataclass(frozen=True, slots=True)
class Plan:
    """What the attacker does, for `seconds`: as much as it can, and as often as it is let."""

    silent: int = 400  # connections that say nothing
    malformed: int = 16  # streams at a time that end by a malformed frame, over all protocols
    deaf: int = 16  # streams on which it asks and never reads
    seconds: float = 20.0
    renamed: bool = True  # who is turned away comes again as somebody else
    seed: int = 1


class _Victim(NamedTuple):
    peer: PeerId
    addrs: tuple[str, ...]
    endpoint: tuple[str, int]

    @classmethod
    def at(cls, addr: str) -> _Victim:
        peer, maddr = parse_bootstrap(addr)
        return cls(peer, (str(maddr),), tcp_endpoint(maddr))


@dataclass(slots=True)
class Latencies:
    """Of one kind of honest request, milliseconds. `errors`: what those that failed ended with."""

    taken_ms: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        ordered = sorted(self.taken_ms) or [float("nan")]
        at = {f"p{percent}": at_percent(ordered, percent) for percent in (50, 99)}
        failed = {"failed": len(self.errors), "errors": dict(Counter(self.errors).most_common(ERRORS_SHOWN))}
        return {"count": len(self.taken_ms), **failed, **at, "max": ordered[-1]}


Request = Callable[[], Awaitable[object]]


async def measure(addr: str, plan: Plan, whole: Request) -> dict[str, Any]:
    """Honest requests to the worker at `addr` (with /p2p/...) before, during and after the attack: `whole` as a user
    makes it; `ping` over one stream, `fresh` each over a stream of its own, `newcomer` each by a peer that nobody knew.
    Raises TransportError when the worker does not answer before."""
    spare_imports()  # else collections here are counted as the worker's time
    before = await probe(addr, plan.seconds, whole)
    command = [sys.executable, "-m", "simnet.checks.hostile", addr, json.dumps(asdict(plan))]
    process = await trio.lowlevel.open_process(command, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        await process.stdout.receive_some(1)  # it has begun
        during = await probe(addr, plan.seconds, whole)
        said = b"".join([part async for part in process.stdout])
        await process.wait()
    finally:
        with trio.CancelScope(shield=True):
            process.kill()
            await process.wait()
    after = await probe(addr, plan.seconds / 4, whole)
    counts = json.loads(said) if said else {}
    return {"before": before, "during": during, "after": after, "attack": counts}


async def probe(addr: str, seconds: float, whole: Request) -> dict[str, dict[str, Any]]:
    """Honest requests for some seconds. Raises TransportError when the first of them is not answered."""
    kinds = {kind: Latencies() for kind in ("request", "ping", "fresh", "newcomer")}
    victim = _Victim.at(addr)

    async def ping(channel: Channel) -> None:
        if await channel.call(Ping(b"honest!!")) is None:
            raise TransportError("no answer")

    async def fresh(mesh: Mesh) -> None:
        stream = await mesh.open(victim.peer, victim.addrs, CONTROL)
        try:
            await ping(Channel(stream, CONTROL))
        finally:
            await stream.aclose()

    async def newcomer() -> None:
        async with open_mesh(MeshConfig(os.urandom(32), listen=())) as stranger:
            await fresh(stranger)

    async with open_mesh(MeshConfig(os.urandom(32), listen=())) as mesh:
        channel = Channel(await mesh.open(victim.peer, victim.addrs, CONTROL), CONTROL)
        await ping(channel)
        deadline = trio.current_time() + seconds
        while trio.current_time() < deadline:
            for _ in range(10):
                await _timed(kinds["request"], whole)
                for _ in range(SMALL_PER_REQUEST):
                    await _timed(kinds["ping"], lambda: ping(channel))
                    await _timed(kinds["fresh"], lambda: fresh(mesh))
                    await trio.sleep(PACE_S)
            await _timed(kinds["newcomer"], newcomer)
    return {name: latencies.summary() for name, latencies in kinds.items()}


async def _timed(latencies: Latencies, request: Request) -> None:
    started = time.perf_counter()
    try:
        with ungrouped(), trio.fail_after(REQUEST_S):
            await request()
    except (SottoError, trio.TooSlowError) as error:
        latencies.errors.append(f"{type(error).__name__}: {error}"[:ERROR_CHARS])
    else:
        latencies.taken_ms.append(1000 * (time.perf_counter() - started))


async def attack(addr: str, plan: Plan, begun: Callable[[], None]) -> dict[str, int]:
    """Do what `plan` says; what was done, and how often the worker did not have it."""
    victim = _Victim.at(addr)
    counts: Counter[str] = Counter()
    async with AsyncExitStack() as held, open_mesh(MeshConfig(os.urandom(32), listen=())) as mesh:
        stop_at = trio.current_time() + plan.seconds
        await _silent(held, victim, plan.silent, counts)
        begun()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_silent_again, held, victim, plan, stop_at, counts)
            for _ in range(plan.deaf):
                nursery.start_soon(_deaf, mesh, victim, stop_at, counts)
            if plan.malformed:
                nursery.start_soon(_malformed, victim, plan, stop_at, counts)
    return dict(counts)


async def _malformed(victim: _Victim, plan: Plan, stop_at: float, counts: Counter[str]) -> None:
    source, protocols = random.Random(plan.seed), itertools.cycle(FRAME_BYTES_MAX)
    while trio.current_time() < stop_at:
        async with open_mesh(MeshConfig(os.urandom(32), listen=())) as mesh:
            counts["identities"] += 1
            taken = -1
            while trio.current_time() < stop_at and (taken != counts["malformed"] or not plan.renamed):
                taken = counts["malformed"]
                async with trio.open_nursery() as batch:
                    for protocol in itertools.islice(protocols, plan.malformed):
                        batch.start_soon(_one, mesh, victim, protocol, malformed(source), counts)


async def _silent(held: AsyncExitStack, victim: _Victim, count: int, counts: Counter[str]) -> None:
    for _ in range(count):
        try:
            with trio.fail_after(1.0):
                held.push_async_callback(trio.aclose_forcefully, await trio.open_tcp_stream(*victim.endpoint))
            counts["silent"] += 1
        except (OSError, trio.TooSlowError):
            counts["silent refused"] += 1


async def _silent_again(
    held: AsyncExitStack, victim: _Victim, plan: Plan, stop_at: float, counts: Counter[str]
) -> None:
    """The worker ends them after a few seconds; so many come again that about as many are there at any time."""
    while trio.current_time() < stop_at:
        await trio.sleep(AGAIN_S)
        await _silent(held, victim, round(plan.silent * AGAIN_S / UPGRADE_S), counts)


async def _one(mesh: Mesh, victim: _Victim, protocol: str, frame: bytes, counts: Counter[str]) -> None:
    """A stream of its own, since a frame that is refused ends its stream. Counted once the worker had the stream."""
    had = f"refused {protocol}"
    try:
        with trio.fail_after(REQUEST_S):
            stream = await mesh.open(victim.peer, victim.addrs, protocol)
            try:
                await stream.send(frame)
                await stream.finish()
                had = f"malformed {protocol}"
                counts["malformed"] += 1
                while await stream.receive(1 << 14):
                    pass
            finally:
                await stream.aclose()
    except TransportError:
        pass
    except trio.TooSlowError:
        counts["silence"] += 1
    counts[had] += 1


async def _deaf(mesh: Mesh, victim: _Victim, stop_at: float, counts: Counter[str]) -> None:
    frame = encode_frame(Ping(bytes(8))) * 100
    while trio.current_time() < stop_at:
        try:
            stream = await mesh.open(victim.peer, victim.addrs, CONTROL)
            with trio.move_on_at(stop_at):
                while True:
                    await stream.send(frame)
                    counts["unread pings"] += 100
            await stream.aclose()
        except TransportError:
            counts["deaf refused"] += 1
            await trio.sleep(0.1)


def malformed(source: random.Random) -> bytes:
    """Bytes that are no good frame of any protocol; often close to one."""
    message, body = source.choice(_VALID)
    frame = bytearray(encode_frame(message, body))
    match source.randrange(5):
        case 0:
            return source.randbytes(source.randrange(8, 200))
        case 1:  # a frame that is said to be as large as a frame can be said to be
            return struct.pack(">II", source.choice((1 << 24, (1 << 32) - 1)), 16) + source.randbytes(64)
        case 2:  # a header longer than its frame
            return struct.pack(">II", 16, source.randrange(13, 1 << 32)) + bytes(frame[8:])
        case 3:  # an array that announces more than there is
            return struct.pack(">II", 9, 5) + b"\xdd" + source.randbytes(4)
        case _:
            frame[8] ^= 1 << source.randrange(7)  # the array's head: another length, or no array
            return bytes(frame)


def _step_aside() -> None:
    """Give way to every other process at once: a merely nice one keeps its core for milliseconds when others wake."""
    if sys.platform == "linux":
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    else:
        os.nice(19)


def main() -> None:
    """`python -m simnet.checks.hostile ADDR PLAN`: the attacker's process. One byte when it begins, then its counts."""
    _step_aside()

    def begun() -> None:
        sys.stdout.write(" ")
        sys.stdout.flush()

    with ungrouped():
        counts = trio.run(attack, sys.argv[1], Plan(**json.loads(sys.argv[2])), begun)
    sys.stdout.write(json.dumps(counts))


if __name__ == "__main__":
    main()
