"""SwarmView: the fold of the valid adverts. Immutable; what placement and routing look at.

It holds what gossip said and how it came, nothing else: a client that is given one bootstrap address learns of every
worker here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from protocol.adverts import Advert, HeldSpan, believed_until_ms
from protocol.ids import DeploymentId, PeerId


@dataclass(frozen=True, slots=True)
class Member:
    """A worker as its latest advert tells it, until `until_ms` by this node's clock. `received_from` is the neighbour
    that brought the advert."""

    peer: PeerId
    advert: Advert
    received_from: PeerId
    until_ms: int


@dataclass(frozen=True, slots=True)
class SwarmView:
    members: Mapping[PeerId, Member] = field(default_factory=lambda: MappingProxyType({}))

    def with_advert(self, peer: PeerId, advert: Advert, received_from: PeerId, now_ms: int) -> SwarmView:
        """The view after an advert that was admitted at `now_ms`."""
        member = Member(peer, advert, received_from, believed_until_ms(advert, now_ms))
        return SwarmView(MappingProxyType({**self.members, peer: member}))

    def at(self, now_ms: int) -> SwarmView:
        """The view without what has expired by `now_ms`."""
        if all(member.until_ms > now_ms for member in self.members.values()):
            return self
        alive = {key: value for key, value in self.members.items() if value.until_ms > now_ms}
        return SwarmView(MappingProxyType(alive))

    def ranked(self) -> tuple[Member, ...]:
        """All members in the order of their peer ids: the same on every run."""
        return tuple(self.members[peer] for peer in sorted(self.members))

    def holders(self, deployment: DeploymentId) -> tuple[tuple[Member, HeldSpan], ...]:
        """Who holds which blocks of `deployment`."""
        return tuple(
            (member, span) for member in self.ranked() for span in member.advert.spans if span.deployment == deployment
        )
