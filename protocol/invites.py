"""Invites: one line of text that lets a peer into a swarm, as often as one likes.

An invite names peers with their addresses, and the swarm; for a private swarm it carries the key, so it is as secret as
that. As text it is `sotto1` and base64url of length, canonical record and checksum. The checksum finds slips of the
hand; it proves nothing about who made the invite.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Annotated

from protocol import limits
from protocol.codec import decode, encode
from protocol.errors import InputError, RemoteProtocolError
from protocol.ids import PeerId, peer_id_of
from protocol.membership import PUBLIC_SWARM, SECRET_BYTES, SWARM_ID_BYTES, SwarmKey
from protocol.schema import Record, Size

PREFIX = "sotto1"
_LENGTH_BYTES, _CHECK_BYTES = 2, 4
_COPY = "copy it again, whole"


@dataclass(frozen=True, slots=True)
class InvitePeer(Record):
    """A peer of the swarm, by its public key, and where to dial it."""

    public_key: Annotated[bytes, Size(32, 32)]
    addrs: Annotated[tuple[Annotated[str, Size(1, limits.ADDR_CHARS_MAX)], ...], Size(1, limits.ADDRS_MAX)]

    @property
    def peer(self) -> PeerId:
        return peer_id_of(self.public_key)


@dataclass(frozen=True, slots=True)
class Invite(Record):
    """`secret` is empty for a public swarm."""

    swarm: Annotated[bytes, Size(SWARM_ID_BYTES, SWARM_ID_BYTES)]
    secret: Annotated[bytes, Size(0, SECRET_BYTES)] = field(repr=False)
    peers: Annotated[tuple[InvitePeer, ...], Size(1, limits.INVITE_PEERS_MAX)]

    def check(self) -> None:
        if len(self.secret) not in (0, SECRET_BYTES):
            raise ValueError(f"a swarm's key has {SECRET_BYTES} bytes")
        if self.swarm != (SwarmKey(self.secret).swarm if self.secret else PUBLIC_SWARM):
            raise ValueError("the swarm is not the one of the key")

    @property
    def key(self) -> SwarmKey | None:
        """The private swarm's key; None for a public swarm."""
        return SwarmKey(self.secret) if self.secret else None

    @property
    def addrs(self) -> tuple[str, ...]:
        """Every address, ending in /p2p/<peer id>."""
        return tuple(f"{addr}/p2p/{peer.peer}" for peer in self.peers for addr in peer.addrs)


def make_invite(key: SwarmKey | None, peers: tuple[InvitePeer, ...]) -> Invite:
    """An invite to the swarm of `key`, public without one. Raises ValueError: no peers, or too many."""
    return Invite(PUBLIC_SWARM, b"", peers) if key is None else Invite(key.swarm, key.secret, peers)


def is_invite(text: str) -> bool:
    """Does `text` want to be an invite (and not an address)?"""
    return text.strip().startswith("sotto")


def print_invite(invite: Invite) -> str:
    """The invite as one word of text."""
    record = encode(invite)
    data = len(record).to_bytes(_LENGTH_BYTES, "big") + record
    return PREFIX + base64.urlsafe_b64encode(data + _checksum(data)).decode().rstrip("=")


def parse_invite(text: str) -> Invite:
    """Inverse of print_invite; white space that a terminal or a mail put in is ignored. Raises InputError."""
    word = "".join(text.split())
    if not word.startswith(PREFIX):
        raise InputError(f"an invite begins with {PREFIX}: copy it again, or update sotto if it begins otherwise")
    if len(word) > limits.INVITE_CHARS_MAX:
        raise InputError(f"an invite has at most {limits.INVITE_CHARS_MAX} characters, not {len(word)}: {_COPY}")
    data = _decode(word.removeprefix(PREFIX))
    body, check = data[:-_CHECK_BYTES], data[-_CHECK_BYTES:]
    if check != _checksum(body):
        raise InputError(f"a character of this invite is wrong: {_COPY}")
    try:
        invite = decode(Invite, body[_LENGTH_BYTES:])
    except RemoteProtocolError as error:
        raise InputError(f"this invite was made by another version of sotto, or badly ({error})") from None
    if print_invite(invite) != word:
        raise InputError(f"a character of this invite is wrong: {_COPY}")
    return invite


def _decode(letters: str) -> bytes:
    try:
        data = base64.b64decode(letters + "=" * (-len(letters) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise InputError(f"characters of this invite are wrong or missing: {_COPY}") from None
    stated = int.from_bytes(data[:_LENGTH_BYTES], "big") + _LENGTH_BYTES + _CHECK_BYTES
    if len(data) < stated:
        raise InputError(f"the end of this invite is missing: {_COPY}")
    if len(data) > stated:
        raise InputError(f"this invite is longer than it says: {_COPY}")
    return data


def _checksum(data: bytes) -> bytes:
    return blake2b(data, digest_size=_CHECK_BYTES, person=b"sotto-invite").digest()
