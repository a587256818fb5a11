"""The client's picture of the swarm, built from gossip alone.

`SwarmWatch` is the validator of the adverts' topic: what AdvertGate refuses is neither believed nor forwarded, and what
it admits is folded into a SwarmView on the spot, so the watch needs no task of its own. What has expired is left out
whenever somebody looks. It dials nobody, and believes an advert's figures as they stand: a worker that lies about its
speed is found out when it is used.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from client.observer import ClientObserver
from protocol.adverts import TOPIC, AdvertGate, AdvertRefused
from protocol.errors import RemoteProtocolError
from protocol.ports import Clock, Gossip, GossipMessage
from protocol.swarm import SwarmView

MALFORMED = "malformed"


class SwarmWatch:
    """Follows adverts from `start` on. `refused` counts adverts that were not believed, by reason."""

    def __init__(self, gossip: Gossip, clock: Clock, observer: ClientObserver | None = None) -> None:
        self._gossip = gossip
        self._clock = clock
        self._observer = observer or ClientObserver()
        self._gate = AdvertGate()
        self._view = SwarmView()
        self._changed = trio.Event()
        self.refused: dict[str, int] = {}

    async def start(self) -> None:
        """Subscribe. Call once."""
        await self._gossip.subscribe(TOPIC, self._admit)

    @property
    def view(self) -> SwarmView:
        """The workers whose adverts hold now. Other threads may look too: it changes nothing."""
        return self._view.at(self._now_ms())

    async def wait_for(self, predicate: Callable[[SwarmView], bool]) -> SwarmView:
        """The first view for which `predicate` holds. Waits as long as it takes: callers own timeouts."""
        while True:
            changed, view = self._changed, self.view
            if predicate(view):
                return view
            with trio.move_on_after(self._until_expiry_s(view)):
                await changed.wait()

    def _admit(self, message: GossipMessage) -> bool:
        now_ms = self._now_ms()
        try:
            advert = self._gate.admit(message.data, message.author, now_ms)
        except RemoteProtocolError as error:
            reason = error.reason if isinstance(error, AdvertRefused) else MALFORMED
            self.refused[reason] = self.refused.get(reason, 0) + 1
            self._observer.advert_refused(reason)
            return False
        self._view = self._view.at(now_ms).with_advert(message.author, advert, message.received_from, now_ms)
        self._wake()
        return True

    def _until_expiry_s(self, view: SwarmView) -> float:
        ends = [member.until_ms for member in view.members.values()]
        return max(0.0, (min(ends) - self._now_ms()) / 1000) if ends else float("inf")

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def _now_ms(self) -> int:
        return int(self._clock.time() * 1000)
