"""The order of one Kademlia lookup: whom to ask next, and when to stop. It asks nobody itself.

Invariant: it ends. At most CONTACTS_MAX peers are ever considered, each is handed out once, and only while it is among
the nearest that may still answer.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import trio

from node.p2p.kad_table import Contact, nearest
from protocol.ids import PeerId

CONTACTS_MAX = 256  # beyond it, what peers name is not looked at


@dataclass(slots=True)
class Search:
    """Whom we heard of, asked, and got answers from. `target` and `own` as in kad_table."""

    target: int
    own: PeerId
    heard: dict[PeerId, Contact] = field(default_factory=dict)
    asked: dict[PeerId, bool] = field(default_factory=dict)  # True: answered, or waiting for it
    waiting: int = 0
    _changed: trio.lowlevel.ParkingLot = field(default_factory=trio.lowlevel.ParkingLot)

    def add(self, contacts: list[Contact]) -> None:
        for contact in contacts:
            if contact.peer != self.own and len(self.heard) < CONTACTS_MAX:
                self.heard.setdefault(contact.peer, contact)
        self._changed.unpark_all()

    async def take(self) -> Contact | None:
        """The nearest that was not asked among the BUCKET_PEERS_MAX nearest that may still answer; None at the end."""
        await trio.lowlevel.checkpoint()
        while True:
            hopeful = [contact for contact in self.heard.values() if self.asked.get(contact.peer, True)]
            for contact in nearest(hopeful, self.target):
                if contact.peer not in self.asked:
                    self.asked[contact.peer] = True
                    self.waiting += 1
                    return contact
            if not self.waiting:
                return None
            await self._changed.park()

    def done(self, contact: Contact, answered: bool) -> None:
        self.waiting -= 1
        self.asked[contact.peer] = answered
        self._changed.unpark_all()

    def found(self) -> list[Contact]:
        """The nearest that answered."""
        answered = [contact for contact in self.heard.values() if self.asked.get(contact.peer, False)]
        return nearest(answered, self.target)
