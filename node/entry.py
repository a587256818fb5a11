"""The way into a swarm: addresses and invites as people give them, and the key of a private swarm on disk.

Invariant: a folder belongs to one private swarm at most, and to which one never changes by itself: a key is made once
or taken from an invite, in a file of mode 0600, and never overwritten. A worker whose folder holds a key does not serve
the public swarm unless its owner says so.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from node.files import read_private, write_private
from node.lifetime import running_worker
from node.p2p.addresses import parse_bootstrap
from protocol import limits
from protocol.errors import InputError
from protocol.ids import PeerId, public_key_of
from protocol.invites import Invite, InvitePeer, is_invite, make_invite, parse_invite
from protocol.membership import SECRET_BYTES, SwarmKey, swarm_of
from protocol.ports import Entropy

KEY_FILE, STATE_FILE = "swarm.key", "worker.json"


@dataclass(frozen=True, slots=True)
class Entry:
    """Whom to dial (multiaddrs that end in /p2p/<peer id>), and the credential. `invited`: an invite was among it."""

    addrs: tuple[str, ...] = ()
    key: SwarmKey | None = None
    invited: bool = False


def read_entry(given: Iterable[str]) -> Entry:
    """Addresses and invites, in any order, to one swarm. Raises InputError."""
    addrs: list[str] = []
    swarms: dict[bytes, SwarmKey | None] = {}
    for text in given:
        if is_invite(text):
            invite = parse_invite(text)
            addrs += invite.addrs
            swarms[invite.swarm] = invite.key
        else:
            addrs.append(text.strip())
    for addr in addrs:
        parse_bootstrap(addr)
    if len(swarms) > 1:
        raise InputError("these invites are to different swarms: give those of one")
    return Entry(tuple(dict.fromkeys(addrs)), next(iter(swarms.values()), None), bool(swarms))


def key_of_worker(folder: Path, entry: Entry, private: bool | None, entropy: Entropy) -> SwarmKey | None:
    """The key of the swarm that the worker in `folder` serves, written there; None for the public swarm.

    `private`: True makes a key when there is none; False serves the public swarm though there may be one; None is what
    the folder, or the invite, says. Raises InputError where these disagree.
    """
    key = known_key(folder, entry, private)
    if key is None and private:
        key = SwarmKey(entropy(SECRET_BYTES))
    if key is not None and not (folder / KEY_FILE).exists():
        write_private(folder / KEY_FILE, key.secret)
    return key


def known_key(folder: Path, entry: Entry, private: bool | None) -> SwarmKey | None:
    """The key that a worker in `folder` would serve under, as key_of_worker; nothing is made or written."""
    if private is False:
        if entry.key is not None:
            raise InputError("this invite is to a private swarm: leave --public away, or use another invite")
        return None
    stored = _stored(folder)
    if entry.invited and entry.key is None and (private or stored is not None):
        raise InputError("this invite is to the public swarm: give --public, or an invite to the private one")
    if stored is None:
        return entry.key
    if entry.key is not None and entry.key.swarm != stored.swarm:
        raise InputError(
            f"{folder} belongs to another private swarm ({stored.swarm.hex()}): give --data-dir for this one, "
            f"or move its {KEY_FILE} away"
        )
    return stored


def invite_of_worker(folder: Path) -> Invite:
    """An invite to the swarm of the worker that runs in `folder`, by way of that worker. Raises InputError."""
    state = running_worker(folder)
    if state is None:
        raise InputError(
            f"no worker runs in {folder}: start one with 'sotto worker', or give its --data-dir, or --bootstrap ADDRESS"
        )
    try:
        peer, addrs, swarm = state["peer"], state["addrs"], bytes.fromhex(state["swarm"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / STATE_FILE} cannot be read ({error}): start the worker again") from None
    key = _stored(folder)
    if swarm != swarm_of(key):
        key = None
    if swarm != swarm_of(key):
        raise InputError(f"{folder / KEY_FILE} is not the key of the worker that runs there: start the worker again")
    return make_invite(key, (_invited(PeerId(peer), addrs),))


def invite_by(entry: Entry) -> Invite:
    """An invite that carries what `entry` holds. Raises InputError."""
    peers: dict[PeerId, list[str]] = {}
    for addr in entry.addrs:
        peer, where = parse_bootstrap(addr)
        peers.setdefault(peer, []).append(str(where))
    if len(peers) > limits.INVITE_PEERS_MAX:
        raise InputError(f"an invite names at most {limits.INVITE_PEERS_MAX} peers: give fewer addresses")
    return make_invite(entry.key, tuple(_invited(peer, addrs) for peer, addrs in peers.items()))


def _invited(peer: PeerId, addrs: Iterable[str]) -> InvitePeer:
    """Loopback addresses only where there are no others."""
    stated = list(addrs)
    others = [addr for addr in stated if not _is_loopback(addr)]
    if not stated:
        raise InputError(f"{peer} has no address that others could dial: give it --listen or --announce")
    return InvitePeer(public_key_of(peer), tuple(others or stated)[: limits.ADDRS_MAX])


def _is_loopback(addr: str) -> bool:
    try:
        return ipaddress.ip_address(addr.split("/")[2]).is_loopback
    except (IndexError, ValueError):
        return False


def _stored(folder: Path) -> SwarmKey | None:
    file = folder / KEY_FILE
    return SwarmKey(read_private(file)) if file.exists() else None
