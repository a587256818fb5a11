"""What a neighbour can say about us: the address from which it sees this node come (libp2p's identify)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

import trio
from libp2p.identity.identify.pb.identify_pb2 import Identify
from multiaddr import Multiaddr
from multiaddr.exceptions import Error as MultiaddrError

from node.p2p.addresses import tcp_endpoint
from node.p2p.delimited import Delimited
from protocol.errors import SottoError
from protocol.ids import PeerId
from protocol.ports import Stream

log = logging.getLogger(__name__)

IDENTIFY = "/ipfs/id/1.0.0"
IDENTIFY_BYTES_MAX = 16 * 1024
IDENTIFY_S = 4.0


class Opener(Protocol):
    async def open(self, peer: PeerId, addrs: Sequence[str], protocol: str) -> Stream: ...


async def seen_at(node: Opener, peer: PeerId) -> str | None:
    """The IP address from which `peer`, who is connected, sees this node come; None if it does not say."""
    try:
        with trio.fail_after(IDENTIFY_S):
            stream = await node.open(peer, (), IDENTIFY)
            try:
                said = await Delimited(stream, IDENTIFY_BYTES_MAX).receive(Identify)
            finally:
                await stream.aclose()
        return tcp_endpoint(Multiaddr(said.observed_addr))[0]
    except (trio.TooSlowError, SottoError, MultiaddrError, ValueError) as error:
        log.debug("%s does not say where it sees this node: %s", peer, error)
        return None
