"""Well-formed messages in an order that nobody means, streams that end anywhere, from two clients at once: nothing
raises into the service, and when all streams are gone nothing is held."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import trio

from protocol.channel import Channel
from protocol.errors import SottoError
from protocol.framing import encode_frame
from protocol.ids import SessionId
from protocol.messages import (
    FRAME_BYTES_MAX,
    LINK,
    SESSION,
    Attach,
    CloseSession,
    Message,
    OpenSession,
    Ping,
    Pong,
    Step,
)
from simnet.compute import toy_answer
from tests.helpers.protocol_samples import SAMPLES, body_of
from tests.helpers.workers import DEPLOYMENT, HandClient, HandRoute, Swarm, Worker, in_swarm, make_manifest, some_rows
from tests.tools.protocol_tables import ON, TO_WORKER, WAYS

SESSIONS = [SessionId(bytes([number]) * 16) for number in range(4)]
SEEDS, MOVES = range(8), 300
QUIET_S = 300.0  # longer than anything that an abandoned stream may hold


@dataclass
class Chaos:
    swarm: Swarm
    clients: list[HandClient]
    source: random.Random
    streams: list[tuple[HandClient, Any, str]] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)

    async def move(self) -> None:
        choice = self.source.random()
        if not self.streams or choice < 0.1:
            await self.dial()
        elif choice < 0.2:
            await self.story()
        elif choice < 0.25:
            await self.leave()
        elif choice < 0.35:
            await self.listen()
        elif choice < 0.4:
            await trio.sleep(self.source.choice((0.001, 0.1, 3.0)))
        else:
            await self.speak()

    async def dial(self) -> None:
        client, worker = self.source.choice(self.clients), self.source.choice(self.swarm.workers)
        protocol = self.source.choice([*FRAME_BYTES_MAX, SESSION, SESSION])
        stream = await client.endpoint.open(worker.peer, worker.endpoint.addrs, protocol)
        self.streams.append((client, stream, protocol))

    async def story(self) -> None:
        """What an honest client says in a session, with gaps, and not waiting for an answer."""
        client, session = self.source.choice(self.clients[:1] * 3 + self.clients), self.source.choice(SESSIONS)
        route = HandRoute(client, self.swarm.workers[: self.source.choice((1, 2))], session)
        streams = [await client.endpoint.open(w.peer, w.endpoint.addrs, SESSION) for w in route.workers]
        self.streams += [(client, stream, SESSION) for stream in streams]
        said: list[tuple[Any, Message, bytes]] = [(stream, Attach(session), b"") for stream in streams]
        said.append((streams[0], OpenSession(session, route.boxes(route.tickets())), b""))
        said += [(streams[0], *route.step(number, number, some_rows(1))) for number in range(3)]
        said += [(stream, CloseSession(session), b"") for stream in streams if self.source.random() < 0.3]
        for stream, message, body in said:
            if self.source.random() < 0.95:
                with trio.move_on_after(1):
                    await stream.send(encode_frame(message, body))
                await trio.sleep(self.source.choice((0.0, 0.2)))

    async def leave(self) -> None:
        _, stream, _ = self.streams.pop(self.source.randrange(len(self.streams)))
        await self.source.choice([stream.aclose, stream.reset, stream.finish])()

    async def listen(self) -> None:
        _, stream, protocol = self.source.choice(self.streams)
        with trio.move_on_after(self.source.choice((0.1, 1.0))):
            channel = Channel(stream, protocol)
            while True:
                received = await channel.receive()
                self.seen[type(received[0]).__name__ if received else "end"] += 1
                if received is None:
                    return

    async def speak(self) -> None:
        client, stream, protocol = self.source.choice(self.streams)
        message, body = self.words(client, protocol)
        frame = encode_frame(message, body)
        if self.source.random() < 0.03:
            frame = frame[: self.source.randrange(len(frame))]
        with trio.move_on_after(1):
            await stream.send(frame)

    def words(self, client: HandClient, protocol: str) -> tuple[Message, bytes]:
        session = self.source.choice(SESSIONS)
        route = HandRoute(client, self.swarm.workers[: self.source.choice((1, 2))], session)
        choice = self.source.random()
        if protocol == SESSION and choice < 0.2:
            return Attach(session), b""
        if protocol in (SESSION, LINK) and choice < 0.3:
            epoch = self.source.choice((0, 0, 0, 1, 2))
            return OpenSession(session, route.boxes(route.tickets(epoch=epoch))), b""
        if protocol in (SESSION, LINK) and choice < 0.6:
            number, rows = self.source.randrange(6), some_rows(self.source.randrange(1, 5))
            return route.step(number, self.source.randrange(8), rows, acked=self.source.randrange(number + 1))
        ours = [sample for sample in SAMPLES if {(protocol, TO_WORKER), (protocol, ON)} & {*WAYS[type(sample)]}]
        sample = self.source.choice(SAMPLES if choice > 0.97 or not ours else ours)
        return self.alive(sample, session), body_of(sample)

    def alive(self, sample: Message, session: SessionId) -> Message:
        """The sample with names that mean something here."""
        manifest, plan, _ = make_manifest(self.clients[0].identity, 4)
        real = {"session": session, "deployment": DEPLOYMENT, "manifest": manifest, "digest": plan.blocks[0].digest}
        names = {each.name for each in dataclasses.fields(sample)}  # type: ignore[arg-type]
        if isinstance(sample, Step) or self.source.random() < 0.2:
            return sample
        return replace(sample, **{name: value for name, value in real.items() if name in names})


def disorder(seed: int) -> Counter[str]:
    """One run; what was seen in it."""

    async def test(swarm: Swarm) -> Counter[str]:
        await swarm.client.deploy_route(swarm.workers)
        chaos = Chaos(swarm, [swarm.client, await swarm.another("mallory")], random.Random(seed))
        for _ in range(MOVES):
            try:
                await chaos.move()
            except SottoError as error:  # a stream that the worker closed, with reason
                chaos.seen[type(error).__name__] += 1
        for _, stream, _ in chaos.streams:
            await stream.reset()
        await trio.sleep(QUIET_S)
        for worker in swarm.workers:
            worker.assert_idle()
            chaos.seen["computed"] += worker.counts.computed
            chaos.seen["violations"] += len(worker.counts.violations)
            assert await swarm.client.ask(worker, Ping(bytes(8))) == Pong(bytes(8))
        await _serves(swarm, swarm.workers[0])
        return chaos.seen

    return in_swarm(2, test, seed=seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_disorder_costs_nothing_that_lasts(seed: int) -> None:
    disorder(seed)


async def _serves(swarm: Swarm, worker: Worker) -> None:
    """An honest client gets its answer."""
    fresh = await swarm.client.deploy(worker, 2, 0, 2, b"after the storms")
    route = HandRoute(swarm.client, [worker], SessionId(b"s" * 16))
    await route.dial()
    await route.attach()
    await route.open(deployment=fresh)
    await route.next()
    rows = some_rows(3)
    np.testing.assert_array_equal(await route.do(0, 0, rows), toy_answer(range(2), rows)[-1:])
    await route.aclose()


def test_disorder_went_deep() -> None:
    """Sessions that opened, steps that were computed, refusals and violations: else the runs above test little."""
    seen = sum((disorder(seed) for seed in range(100, 108)), Counter())
    for what in (
        "Attached",
        "SessionOpened",
        "SessionFailed",
        "StepOutput",
        "Refusal",
        "end",
        "computed",
        "violations",
    ):
        assert seen[what] > 3, (what, seen)
