"""A hand-written hop: small enough to see that it is right, and willing to misbehave.

It follows the session tables and tickets with no regard for memory, order or repetition: those are the real worker's
business. Each block adds one to every number, so L blocks answer x + L. A `Conduct` says what it does wrong.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import trio

from client.ports import ClientPorts
from client.routing import Hop, Route
from protocol.channel import Channel
from protocol.errors import TransportError
from protocol.ids import SessionId, deployment_id
from protocol.messages import (
    LINK,
    SESSION,
    Attach,
    Attached,
    CloseSession,
    Message,
    OpenSession,
    RefusalReason,
    SessionFailed,
    SessionOpened,
    Step,
    StepOutput,
    StepTimes,
)
from protocol.ports import Stream
from protocol.signed import Identity
from protocol.tensors import Payload, TensorHeader
from protocol.tickets import TIMES, Ticket, TicketGate
from simnet.endpoint import VirtualEndpoint
from simnet.network import VirtualNetwork, open_network
from simnet.runtime import SeededEntropy, VirtualClock

CLIENT, SALT = Identity(bytes([255]) * 32), b"fake deployment!"
DEPLOYMENT = deployment_id(CLIENT.peer, SALT)
Reply = tuple[Message, bytes]


@dataclass(slots=True)
class Conduct:
    """`outputs` replaces the replies to a step; `refuse` answers OpenSession; `mute` types of message are ignored."""

    outputs: Callable[[Step, Payload, list[Reply]], list[Reply]] = lambda _step, _payload, replies: replies
    refuse: RefusalReason | None = None
    mute: tuple[type[Message], ...] = ()
    step_s: float = 0.01
    leave: bool = False  # end the stream, in good order, at the next step


@dataclass(slots=True)
class FakeHop:
    endpoint: VirtualEndpoint
    identity: Identity
    conduct: Conduct = field(default_factory=Conduct)
    tickets: dict[SessionId, Ticket] = field(default_factory=dict)
    attached: dict[SessionId, Channel] = field(default_factory=dict)
    received: list[Message] = field(default_factory=list)
    links: dict[str, Channel] = field(default_factory=dict)
    streams: int = 0

    @property
    def open_sessions(self) -> int:
        return len(self.attached)

    def serve(self) -> None:
        self.endpoint.handle(SESSION, lambda stream: self._serve(Channel(stream, SESSION), stream))
        self.endpoint.handle(LINK, lambda stream: self._serve(Channel(stream, LINK), stream))

    async def _serve(self, channel: Channel, stream: Stream) -> None:
        self.streams += 1
        try:
            while (frame := await channel.receive()) is not None:
                message, body = frame
                self.received.append(message)
                if self.conduct.leave and isinstance(message, Step):
                    return
                if not isinstance(message, self.conduct.mute):
                    await self._on(channel, message, body)
        finally:
            for session in [session for session, own in self.attached.items() if own is channel]:
                del self.attached[session]

    async def _on(self, channel: Channel, message: Message, body: bytes) -> None:
        match message:
            case Attach():
                self.attached[message.session] = channel
                await channel.send(Attached(message.session))
            case OpenSession():
                await self._open(channel, message)
            case Step():
                await self._step(message, body)
            case CloseSession():
                ticket = self.tickets.pop(message.session, None)
                self.attached.pop(message.session, None)
                if ticket is not None and ticket.successor:
                    with suppress(TransportError):
                        await (await self._link(ticket)).send(message)
            case _:
                raise AssertionError(f"a hop got {message}")

    async def _open(self, channel: Channel, message: OpenSession) -> None:
        session, client = message.session, self.attached.get(message.session)
        if client is None:
            return  # closed meanwhile
        if self.conduct.refuse is not None:
            await client.send(SessionFailed(session, self.conduct.refuse, "no, thank you"))
            return
        now_ms = int(VirtualClock().time() * 1000)
        ticket = TicketGate(self.identity).admit(message.tickets[0], channel.remote, now_ms)
        self.tickets[session] = ticket
        if ticket.successor:
            await (await self._link(ticket)).send(OpenSession(session, message.tickets[1:]))
        await client.send(SessionOpened(session, ticket.epoch, ticket.kv_tokens))

    async def _step(self, step: Step, body: bytes) -> None:
        await trio.sleep(self.conduct.step_s)
        if step.session not in self.attached or step.session not in self.tickets:
            return
        ticket, client = self.tickets[step.session], self.attached[step.session]
        whole = self.compute(Payload(step.tensor, body), ticket)
        if ticket.successor:
            await (await self._link(ticket)).send(step, whole.data)
            replies: list[Reply] = [] if ticket.returns == "none" else [output(step, whole)]
            if ticket.returns == TIMES:
                replies = [(StepTimes(step.session, step.epoch, step.step, 1000, 200, 1500), b"")]
        else:
            width = step.tensor.shape[1]
            tail = Payload(TensorHeader("float32", (step.tail, width)), whole.data[-step.tail * width * 4 :])
            replies = [output(step, tail)]
        for message, data in self.conduct.outputs(step, whole, replies):
            await client.send(message, data)

    def compute(self, payload: Payload, ticket: Ticket) -> Payload:
        numbers = np.frombuffer(payload.data, "<f4") + np.float32(ticket.end - ticket.start)
        return Payload(payload.header, numbers.astype("<f4").tobytes())

    async def _link(self, ticket: Ticket) -> Channel:
        if ticket.successor not in self.links:
            stream = await self.endpoint.open(ticket.successor, ticket.successor_addrs, LINK)
            self.links[ticket.successor] = Channel(stream, LINK)
        return self.links[ticket.successor]


def output(step: Step, payload: Payload, number: int | None = None) -> Reply:
    """The output of `step`; `number` lies about which step it is."""
    which = step.step if number is None else number
    return StepOutput(step.session, step.epoch, which, 1000, 200, 1500, payload.header), payload.data


def activations(rows: int, width: int = 4, start: float = 0.0) -> Payload:
    numbers = np.arange(rows * width, dtype="<f4") + np.float32(start)
    return Payload(TensorHeader("float32", (rows, width)), numbers.tobytes())


@dataclass(slots=True)
class FakeSwarm:
    """A client's ports and fake hops, two blocks each, on one virtual network."""

    network: VirtualNetwork
    ports: ClientPorts
    hops: list[FakeHop]

    @property
    def route(self) -> Route:
        hops = [
            Hop(hop.identity.peer, hop.endpoint.addrs, 2 * index, 2 * index + 2) for index, hop in enumerate(self.hops)
        ]
        return Route(DEPLOYMENT, tuple(hops))


@asynccontextmanager
async def fake_swarm(count: int, seed: int = 1) -> AsyncIterator[FakeSwarm]:
    async with open_network(seed) as network, trio.open_nursery() as nursery:
        workers = [Identity(bytes([index + 1]) * 32) for index in range(count)]
        endpoints = [await nursery.start(_live, network, identity) for identity in [CLIENT, *workers]]
        hops = [FakeHop(*pair) for pair in zip(endpoints[1:], workers, strict=True)]
        for hop in hops:
            hop.serve()
        ports = ClientPorts(CLIENT, endpoints[0], endpoints[0], VirtualClock(), SeededEntropy(seed, "client"))
        yield FakeSwarm(network, ports, hops)
        nursery.cancel_scope.cancel()


async def _live(network: VirtualNetwork, identity: Identity, task_status: Any) -> None:
    """A peer in a task of its own: a crash of it cancels nothing else, the test's body least of all."""
    async with network.join(identity.seed) as endpoint:
        task_status.started(endpoint)
        await trio.sleep_forever()
