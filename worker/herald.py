"""What the worker says about itself and hears of others: adverts out, adverts in, round-trip times.

Adverts go out at the swarm's interval, and at once (at most one a second) when spans change, or when the worker stops
or starts to take work. KV that comes and goes with sessions waits for the interval, as does the load: in a large busy
swarm anything else would flood every node. Invalid adverts are neither believed nor forwarded.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import partial
from math import inf

import trio

from protocol import limits
from protocol.adverts import TOPIC, Advert, AdvertGate, HeldSpan, Rtt, advert_interval_s, peer_tag, sign_advert
from protocol.channel import Channel
from protocol.errors import RemoteProtocolError, TransportError
from protocol.ids import PeerId
from protocol.messages import CONTROL, Ping, Pong
from protocol.ports import GossipMessage
from protocol.swarm import Member, SwarmView
from worker.config import WorkerConfig, WorkerPorts
from worker.fetch import Together
from worker.house import House

log = logging.getLogger("sotto.worker")
GAP_S = 1.0 / limits.ADVERTS_PER_S  # between two adverts, whatever happens
RTT_EVERY_S = 30.0
RTT_ROUND_S = 5.0  # a new neighbour waits so long for its ping...
PING_S = 5.0  # ...and so much longer while another does not answer


@dataclass(slots=True)
class Herald:
    ports: WorkerPorts
    config: WorkerConfig
    house: House
    together: Together
    view: SwarmView = field(default_factory=SwarmView)
    _gate: AdvertGate = field(default_factory=AdvertGate)
    _changed: trio.Event = field(default_factory=trio.Event)
    _sequence: int = 0
    _rtts: dict[PeerId, tuple[float, float]] = field(default_factory=dict)  # (milliseconds, measured at)

    def changed(self) -> None:
        """Spans, or whether work is taken, changed: say so soon."""
        self._changed.set()

    def admit(self, message: GossipMessage) -> bool:
        """The topic's validator: believe a valid advert, refuse any other."""
        now_ms = self._now_ms()
        try:
            advert = self._gate.admit(message.data, message.author, now_ms)
        except RemoteProtocolError:
            self.ports.observer.advert_refused(message.author)
            return False
        self.view = self.view.at(now_ms).with_advert(message.author, advert, message.received_from, now_ms)
        return True

    async def listen(self) -> None:
        """Subscribe, and take messages from the subscription for ever; the validator has read them already."""
        subscription = await self.ports.gossip.subscribe(TOPIC, self.admit)
        while True:
            await subscription.receive()

    async def publish(self) -> None:
        """Advertise for ever."""
        while True:
            self._changed = trio.Event()
            self.view = self.view.at(self._now_ms())
            interval_s = advert_interval_s(len(self.view.members) + 1)
            await self.ports.gossip.publish(TOPIC, self._advert(interval_s))
            await trio.sleep(GAP_S)
            with trio.move_on_after(max(0.0, interval_s - GAP_S)):
                await self._changed.wait()

    async def measure(self) -> None:
        """Keep the round-trip times to connected workers fresh, for ever."""
        while True:
            now = self.ports.clock.monotonic()
            self._rtts = {peer: known for peer, known in self._rtts.items() if now - known[1] < 2 * RTT_EVERY_S}
            known = self._rtts
            due = [each for each in self._neighbours() if now - known.get(each.peer, (0, -inf))[1] >= RTT_EVERY_S]
            await self.together(*(partial(self._ping, member) for member in due))
            await trio.sleep(RTT_ROUND_S)

    def _neighbours(self) -> list[Member]:
        """As many as an advert has room for: of more, always the same ones, among whom no stranger can choose to be."""
        connected = [peer for peer in self.ports.transport.connected() if peer in self.view.members]
        chosen = self.config.identity.ranked(connected)[: limits.ADVERT_RTTS_MAX]
        return [self.view.members[peer] for peer in chosen]

    async def _ping(self, member: Member) -> None:
        ping = Ping(self.ports.entropy(8))
        with trio.move_on_after(PING_S):
            try:
                stream = await self.ports.transport.open(member.peer, (), CONTROL)  # it is connected, or was
                try:
                    started = self.ports.clock.monotonic()
                    reply = await Channel(stream, CONTROL).call(ping)
                    now = self.ports.clock.monotonic()
                    if reply != Pong(ping.nonce):
                        raise RemoteProtocolError("a ping was not answered by its pong")
                    self._rtts[member.peer] = (1000 * (now - started), now)
                finally:
                    await stream.aclose()
            except TransportError as error:
                log.debug("ping failed", extra={"peer": member.peer, "error": str(error)})
            except RemoteProtocolError:
                self.ports.observer.violation(member.peer, CONTROL)

    def _advert(self, interval_s: float) -> bytes:
        """Signed, and small enough: what does not fit is left out, round-trip times first, then the oldest spans."""
        now_ms = self._now_ms()
        self._sequence = max(self._sequence + 1, now_ms)
        life_s = limits.ADVERT_LIFE_INTERVALS * interval_s
        pinged = self.config.identity.ranked(self._rtts)[: limits.ADVERT_RTTS_MAX]
        rtts = [Rtt(peer_tag(peer), self._rtts[peer][0]) for peer in pinged]
        spans, pool = self._held(), self.house.pool
        while True:
            advert = Advert(
                sequence=self._sequence,
                issued_ms=now_ms,
                expires_ms=now_ms + round(1000 * life_s),
                addrs=self.ports.transport.addrs[: limits.ADDRS_MAX],
                memory_bytes=self.config.memory_bytes,
                memory_free_bytes=self.house.spans.available_bytes,
                kv_free_bytes=min(pool.free_bytes, self.house.spans.owner_part(pool.capacity_bytes)),
                disk_free_bytes=self.house.spans.available_disk_bytes,
                speeds=self.config.speeds,
                spans=tuple(spans),
                rtts=tuple(rtts),
                device=self.config.device,
                version=self.config.version,
                accepting=self.house.duty.accepting,
                relayed=self.ports.transport.relayed,
                load_percent=self.house.load.percent(self.ports.clock.monotonic()),
            )
            try:
                return sign_advert(advert, self.config.identity)
            except ValueError:
                if rtts:
                    rtts.pop()
                elif spans:
                    spans.pop()
                else:
                    raise

    def _held(self) -> list[HeldSpan]:
        """Loaded spans, the most recently used first."""
        leases = sorted(self.house.spans.loaded(), key=lambda lease: lease.touched, reverse=True)
        return [
            HeldSpan(
                lease.request.deployment,
                lease.request.spec.start,
                lease.request.spec.end,
                lease.loaded.block_time_us if lease.loaded else 0,
            )
            for lease in leases[: limits.ADVERT_SPANS_MAX]
        ]

    def _now_ms(self) -> int:
        return int(self.ports.clock.time() * 1000)
