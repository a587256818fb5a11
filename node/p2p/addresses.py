"""Multiaddrs as people and peers write them, checked once. Pure.

What a user gave raises InputError with a sentence that says what to change; what a peer gave is filtered by `dialable`.
"""

from __future__ import annotations

from collections.abc import Iterable

from multiaddr import Multiaddr
from multiaddr.exceptions import Error as MultiaddrError

from protocol.errors import InputError, RemoteProtocolError
from protocol.ids import PeerId, public_key_of

_HOSTS = ("ip4", "ip6", "dns", "dns4", "dns6")
_EXAMPLE = "/ip4/192.0.2.7/tcp/4001"


def parse(text: str) -> Multiaddr:
    """Any multiaddr over TCP, without /p2p. Raises InputError."""
    try:
        maddr = Multiaddr(text)
        names = [protocol.name for protocol in maddr.protocols()]
    except (MultiaddrError, ValueError) as error:
        raise InputError(f"{text!r} is not a multiaddr ({error}): write it like {_EXAMPLE}") from error
    if len(names) != 2 or names[0] not in _HOSTS or names[1] != "tcp":
        raise InputError(f"{text!r} does not name a host and a TCP port: write it like {_EXAMPLE}")
    return maddr


def parse_bootstrap(text: str) -> tuple[PeerId, Multiaddr]:
    """A multiaddr that ends in /p2p/<peer id>. Raises InputError."""
    where, separator, peer = text.strip().rpartition("/p2p/")
    if not separator:
        raise InputError(f"{text!r} does not say whom to expect there: write it like {_EXAMPLE}/p2p/12D3KooW...")
    maddr = parse(where)
    try:
        public_key_of(peer)
    except RemoteProtocolError as error:
        raise InputError(f"{peer!r} is not an Ed25519 peer id (12D3KooW and 44 more characters)") from error
    return PeerId(peer), maddr


def parse_listen(text: str) -> Multiaddr:
    """A multiaddr to listen on: an IP address of this machine and a port. Raises InputError."""
    maddr = parse(text)
    tcp_endpoint(maddr)
    return maddr


def dialable(addrs: Iterable[str]) -> list[Multiaddr]:
    """The well-formed ones among addresses that a peer stated, in their order, each once."""
    found: dict[str, Multiaddr] = {}
    for text in addrs:
        try:
            found.setdefault(text, parse(text))
        except InputError:
            continue
    return list(found.values())


def is_relayed(maddr: Multiaddr) -> bool:
    """Does it lead through another peer?"""
    return "p2p-circuit" in str(maddr).split("/")


def host_and_port(maddr: Multiaddr) -> tuple[str, int]:
    """Host (name or IP address) and port of an address that `parse` accepts."""
    parts = str(maddr).split("/")
    return parts[2], int(parts[4])


def tcp_endpoint(maddr: Multiaddr) -> tuple[str, int]:
    """IP address and port of a multiaddr (what follows the port is ignored). Raises InputError."""
    parts = str(maddr).split("/")
    if len(parts) < 5 or parts[1] not in ("ip4", "ip6") or parts[3] != "tcp":
        raise InputError(f"{maddr} does not begin with an IP address and a TCP port: write it like {_EXAMPLE}")
    return parts[2], int(parts[4])
