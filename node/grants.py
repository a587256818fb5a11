"""What the owner of a deployment lets others do: capabilities issued, shown, kept and revoked.

A token is what people hand on: the capability, the precision of the blocks, and check values of the root key (never the
key) and of the model, so that a wrong one is noticed before anything is computed. Issued ones are kept in
`client/grants/`, one file each, so that they can be named by their serial; a revoked one keeps its name there, and
every worker that takes the deployment later is told.
"""

from __future__ import annotations

import base64
import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from models.precision import PRECISIONS
from node.files import parse_life, write_atomic
from node.identity import load_identity
from node.sealing import SealInfo
from protocol import limits
from protocol.capabilities import Capability, Right, issue_capability, open_capability, rights_of
from protocol.errors import InputError, RemoteProtocolError
from protocol.ids import ID_BYTES, DeploymentId, PeerId, deployment_id, public_key_of
from protocol.signed import Identity

OWN_LIFE_MS = 86_400_000  # what a process of the owner's shows, renewed at half-time, or a worker that fetches shards
_PREFIX = "sotto-use-"


@dataclass(frozen=True, slots=True)
class Token:
    """A capability as it is handed on. `key_check` is "" in the plain tier; `dtype` is that of the sealed blocks;
    `model` is the checkpoint's likeness."""

    signed: bytes
    key_check: str
    dtype: str
    model: str
    capability: Capability
    owner: PeerId

    @property
    def text(self) -> str:
        signed = base64.b64encode(self.signed).decode()
        fields = {"capability": signed, "key_check": self.key_check, "dtype": self.dtype, "model": self.model}
        return _PREFIX + base64.urlsafe_b64encode(json.dumps(fields).encode()).decode().rstrip("=")

    @property
    def serial(self) -> str:
        return self.capability.serial.hex()


def read_token(text: str) -> Token:
    """Raises InputError for what is no token."""
    body = text.strip().removeprefix(_PREFIX)
    try:
        fields = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
        signed = base64.b64decode(fields["capability"], validate=True)
        capability, owner = open_capability(signed)
        if fields["dtype"] not in PRECISIONS:
            raise ValueError
        model = str(fields.get("model", ""))  # one that names none can be revoked, and is of no use
        return Token(signed, str(fields["key_check"]), fields["dtype"], model, capability, owner)
    except (ValueError, KeyError, TypeError, RecursionError, RemoteProtocolError):
        raise InputError(
            "this is no capability, or it was changed: copy the whole token that 'sotto grant' printed"
        ) from None


def grant_to(peer: str, folder: Path, info: SealInfo, model: str, rights: str, life: str) -> Token:
    """A token for `peer` over the deployment `info` of a checkpoint whose likeness is `model`, signed by the identity
    in `folder`; `rights` and `life` as people write them. Raises InputError."""
    try:
        public_key_of(peer)
        chosen = rights_of(Right(name.strip()) for name in rights.split(","))
        if Right.OWN in chosen:
            raise ValueError("nobody else can be the owner")
    except (RemoteProtocolError, ValueError) as error:
        others = ", ".join(right for right in Right if right is not Right.OWN)
        raise InputError(f"{error}: give a peer id (12D3KooW…), and rights out of {others}") from None
    life_s = parse_life(life)
    if life_s > limits.CAPABILITY_LIFE_MAX_S - limits.CLOCK_SKEW_MAX_S:
        raise InputError(f"{life} is too long: {limits.CAPABILITY_LIFE_MAX_S / 86_400 - 1:.0f}d at most")
    expires_ms = int((time.time() + life_s) * 1000)
    deployment = DeploymentId(bytes.fromhex(info.deployment))
    owner = load_identity(folder)
    if deployment != deployment_id(owner.peer, bytes.fromhex(info.salt)):
        raise InputError("the model was sealed under another identity: only its owner can grant its use")
    capability = Capability(os.urandom(ID_BYTES), deployment, PeerId(peer), chosen, expires_ms)
    return Token(issue_capability(capability, owner), info.key_check, info.dtype, model, capability, owner.peer)


def _kept_in(file: Path) -> Token:
    try:
        return read_token(file.read_text(encoding="ascii"))
    except (OSError, UnicodeDecodeError, InputError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is damaged"
        raise InputError(
            f"cannot read {file} ({why}): run 'sotto revoke' with the whole token, which writes it anew; without the "
            "token move the file away, and workers that get the deployment later accept the capability until it expires"
        ) from None


@dataclass(frozen=True, slots=True)
class Grants:
    """The capabilities that this user issued, in `folder`."""

    folder: Path

    def keep(self, token: Token) -> None:
        write_atomic(self.folder / f"{token.serial}.token", token.text.encode(), 0o600)

    def find(self, text: str) -> Token:
        """By token or serial. Raises InputError."""
        if not re.fullmatch(r"[0-9a-f]{32}", text.strip()):
            return read_token(text)
        for kind in ("token", "revoked"):
            file = self.folder / f"{text.strip()}.{kind}"
            if file.exists():
                return _kept_in(file)
        raise InputError(f"no capability of serial {text} was issued from {self.folder.parent}: give the whole token")

    def revoke(self, token: Token, owner: PeerId) -> None:
        """Remember that it is revoked by `owner`. Raises InputError when it is not `owner`'s to revoke."""
        if token.owner != owner:
            raise InputError("the capability was issued by another identity: only its owner can revoke it")
        write_atomic(self.folder / f"{token.serial}.revoked", token.text.encode(), 0o600)
        (self.folder / f"{token.serial}.token").unlink(missing_ok=True)

    def revoked(self, deployment: DeploymentId, now_ms: int) -> tuple[bytes, ...]:
        """Serials to refuse; those that have expired are forgotten. Raises InputError for a file that is damaged: to
        leave it out would let somebody in."""
        serials = []
        for file in sorted(self.folder.glob("*.revoked")):
            capability = _kept_in(file).capability
            if capability.expires_ms <= now_ms:
                file.unlink(missing_ok=True)
            elif capability.deployment == deployment:
                serials.append(capability.serial)
        return tuple(serials)


@dataclass(slots=True)
class OwnCredentials:
    """Capabilities that the owner issues to a process of its own, which runs under an identity of the moment: so any
    number of them work side by side. `now_ms` gives Unix milliseconds."""

    owner: Identity
    holder: PeerId
    now_ms: Callable[[], int]
    _issued: dict[DeploymentId, tuple[int, bytes]] = field(default_factory=dict)

    def __call__(self, deployment: DeploymentId) -> bytes:
        """All rights, for the process."""
        now_ms = self.now_ms()
        due_ms, signed = self._issued.get(deployment, (0, b""))
        if now_ms >= due_ms:
            signed = self._issue(deployment, self.holder, rights_of(Right))
            self._issued[deployment] = (now_ms + OWN_LIFE_MS // 2, signed)
        return signed

    def introduce(self, deployment: DeploymentId, worker: PeerId) -> bytes:
        """The right to fetch the deployment's shards from other workers, for a worker that they are brought to."""
        return self._issue(deployment, worker, rights_of([Right.FETCH]))

    def _issue(self, deployment: DeploymentId, holder: PeerId, rights: tuple[str, ...]) -> bytes:
        expires_ms = self.now_ms() + OWN_LIFE_MS
        return issue_capability(Capability(os.urandom(ID_BYTES), deployment, holder, rights, expires_ms), self.owner)
