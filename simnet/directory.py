"""Provider records on the virtual network: protocol.ports.Directory without Kademlia under it.

One table for all, reached after a round trip, so that what a node provides others find; records of peers that are gone
stay until they expire, as they do in life.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import trio

from protocol import limits
from protocol.errors import TransportError
from protocol.ids import PeerId
from protocol.ports import Provider, Transport

LOOKUP_S = 0.1


@dataclass(slots=True)
class VirtualDirectory:
    """The records of a network; `of` gives a peer's own access to them."""

    records: dict[bytes, dict[PeerId, tuple[tuple[str, ...], float]]] = field(default_factory=dict)  # (addrs, since)

    def of(self, transport: Transport) -> VirtualDirectoryAccess:
        return VirtualDirectoryAccess(self, transport)


@dataclass(frozen=True, slots=True)
class VirtualDirectoryAccess:
    """Satisfies protocol.ports.Directory."""

    directory: VirtualDirectory
    transport: Transport

    async def provide(self, key: bytes) -> None:
        await trio.sleep(LOOKUP_S)
        own = (self.transport.addrs, trio.current_time())
        self.directory.records.setdefault(key, {})[self.transport.peer] = own
        if not self.transport.connected():
            raise TransportError("no peer took the provider record")

    async def providers(self, key: bytes) -> tuple[Provider, ...]:
        await trio.sleep(LOOKUP_S)
        now = trio.current_time()
        found = [
            Provider(peer, addrs)
            for peer, (addrs, since) in self.directory.records.get(key, {}).items()
            if peer != self.transport.peer and now - since < limits.PROVIDER_LIFE_S
        ]
        return tuple(found[: limits.PROVIDERS_MAX])
