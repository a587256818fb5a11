"""Multiaddrs as people and peers write them, checked once. Pure.

What a user gave raises InputError with a sentence that says what to change; what a peer gave is filtered by `dialable`
and `stated`. A circuit address, RELAY/p2p/<relay's peer id>/p2p-circuit, names a place behind one relay, never two.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from libp2p.peer.id import ID
from multiaddr import Multiaddr
from multiaddr.exceptions import Error as MultiaddrError

from protocol.errors import InputError, RemoteProtocolError
from protocol.ids import PeerId, public_key_of
from protocol.limits import ADDR_CHARS_MAX, ADDRS_MAX

CIRCUIT = "/p2p-circuit"

_HOSTS = ("ip4", "ip6", "dns", "dns4", "dns6")
_PEER_BYTES = 38  # identity multihash of an Ed25519 key's protobuf
_EXAMPLE = "/ip4/192.0.2.7/tcp/4001"


def parse(text: str) -> Multiaddr:
    """Any multiaddr over TCP, without /p2p. Raises InputError."""
    _require_short(text)
    try:
        maddr = Multiaddr(text)
        names = [protocol.name for protocol in maddr.protocols()]
    except (MultiaddrError, ValueError) as error:
        raise InputError(f"{text!r} is not a multiaddr ({error}): write it like {_EXAMPLE}") from error
    if len(names) != 2 or names[0] not in _HOSTS or names[1] != "tcp":
        raise InputError(f"{text!r} does not name a host and a TCP port: write it like {_EXAMPLE}")
    return maddr


def parse_bootstrap(text: str) -> tuple[PeerId, Multiaddr]:
    """A multiaddr, or a circuit address, that ends in /p2p/<peer id>. Raises InputError."""
    where, separator, peer = text.strip().rpartition("/p2p/")
    if not separator:
        raise InputError(f"{text!r} does not say whom to expect there: write it like {_EXAMPLE}/p2p/12D3KooW...")
    if is_circuit(where):
        _require_short(where)
        relay, at = parse_circuit(where)
        maddr = Multiaddr(f"{at}/p2p/{relay}{CIRCUIT}")
    else:
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


def parse_announced(texts: Sequence[str]) -> tuple[str, ...]:
    """Addresses that an advert can carry and others can dial. Raises InputError."""
    if len(texts) > ADDRS_MAX:
        raise InputError(f"{len(texts)} addresses to announce, but an advert carries {ADDRS_MAX}: give the best ones")
    for text in texts:
        kind, host, _, port = str(parse(text)).split("/")[1:]
        if kind not in ("ip4", "ip6"):
            raise InputError(f"{text!r} is a name, which hops and dial-backs do not look up: announce its IP address")
        if host in ("0.0.0.0", "::") or port == "0":
            raise InputError(f"nobody can dial {text!r}: announce the address and the port that others see")
    return tuple(str(parse(text)) for text in texts)


def parse_circuit(text: str) -> tuple[PeerId, Multiaddr]:
    """The relay of a circuit address, and where it is dialled. Raises InputError."""
    relay, separator, rest = text.partition(CIRCUIT)
    if not separator or rest:
        raise InputError(f"{text!r} is not a circuit address: write it like {_EXAMPLE}/p2p/12D3KooW...{CIRCUIT}")
    return parse_bootstrap(relay)


def is_circuit(text: str) -> bool:
    return CIRCUIT in text


def dialable(addrs: Iterable[str]) -> list[Multiaddr]:
    """The well-formed ones among addresses that a peer stated, each once: direct ones in their order, then circuits."""
    found: dict[str, Multiaddr] = {}
    for text in sorted(addrs, key=is_circuit):
        try:
            if is_circuit(text):
                parse_circuit(text)
            found.setdefault(text, Multiaddr(text) if is_circuit(text) else parse(text))
        except (InputError, MultiaddrError, ValueError):
            continue
    return list(found.values())


def stated(addrs: Sequence[bytes], suffix: str = "") -> tuple[str, ...]:
    """The dialable ones among binary multiaddrs that a peer stated, without `suffix`, ADDRS_MAX at most."""
    texts: list[str] = []
    for data in addrs[: 2 * ADDRS_MAX]:
        try:
            text = str(Multiaddr(data)) if len(data) <= ADDR_CHARS_MAX else ""
        except (MultiaddrError, ValueError):
            continue
        texts += [text.removesuffix(suffix)] if len(text) <= ADDR_CHARS_MAX else []
    return tuple(str(maddr) for maddr in dialable(texts))[:ADDRS_MAX]


def peer_of_bytes(data: bytes) -> PeerId | None:
    """The Ed25519 peer id in libp2p's binary form; None for anything else."""
    if len(data) != _PEER_BYTES:
        return None
    peer = PeerId(ID(data).to_base58())
    try:
        public_key_of(peer)
    except RemoteProtocolError:
        return None
    return peer


def _require_short(text: str) -> None:
    if len(text) > ADDR_CHARS_MAX:
        raise InputError(f"an address of {len(text)} characters: at most {ADDR_CHARS_MAX} fit into an advert")


def of_ip(ip: str) -> str:
    """An IP address as a multiaddr without a port."""
    return f"/ip{6 if ':' in ip else 4}/{ip}"


def tcp_endpoint(maddr: Multiaddr) -> tuple[str, int]:
    """IP address and port of a multiaddr (what follows the port is ignored). Raises InputError."""
    parts = str(maddr).split("/")
    if len(parts) < 5 or parts[1] not in ("ip4", "ip6") or parts[3] != "tcp":
        raise InputError(f"{maddr} does not begin with an IP address and a TCP port: write it like {_EXAMPLE}")
    return parts[2], int(parts[4])
