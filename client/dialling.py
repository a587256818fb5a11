"""Dialling a worker where its advert says: of the addresses that it states, those that this client connects to
(protocol/scopes.py), for whoever advertises could name any. It retries nothing."""

from __future__ import annotations

from collections.abc import Sequence

from client.ports import ClientPorts
from protocol.errors import TransportError
from protocol.ids import PeerId
from protocol.ports import Stream
from protocol.scopes import dialable_beside, scope_of


async def open_stream(ports: ClientPorts, peer: PeerId, stated: Sequence[str], protocol: str) -> Stream:
    """A stream to `peer`, which `stated` these addresses. Raises what Transport.open raises; where all addresses are
    inside networks that this client dials nowhere in, the error says so."""
    addrs = dialable_beside(ports.transport.own_addrs, stated, ports.trusted)
    try:
        return await ports.transport.open(peer, addrs, protocol)
    except TransportError as error:
        if addrs or not any(scope_of(addr) for addr in stated):
            raise
        raise TransportError(
            f"{error}: it states only addresses inside a network; join through an address there, too (-b ADDRESS)"
        ) from error
