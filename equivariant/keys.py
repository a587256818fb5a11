"""The root key: 32 bytes from which every secret of a deployment follows.

Invariant: the bytes leave a RootKey only through `to_bytes` (for a key file of mode 0600, which is node's work) and,
sealed under a passphrase, through `export_key`. Text forms (repr, str, format) show the fingerprint. Entropy is an
argument, never drawn here. This module touches no file and does not erase memory: Python cannot promise that.
"""

from __future__ import annotations

import hmac
import struct
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b

import nacl.exceptions
from nacl.pwhash import argon2id
from nacl.secret import SecretBox

from protocol.errors import InputError
from protocol.ids import ID_BYTES

KEY_BYTES = 32
KEY_CHECK_BYTES = 16

# BLAKE2b's personalisation, 16 bytes: one per use, so that no two uses of the root key ever share a value.
_DOMAIN_FINGERPRINT = b"sotto/keyprint/1"
_DOMAIN_CHECK = b"sotto/keycheck/1"

_MAGIC = b"sotto-key\x01"  # name and version of the export format
_HEADER = struct.Struct("<10sII16s")  # magic, Argon2id operations, Argon2id memory in KiB (its own unit), salt
_OPERATIONS_MAX = 16
_MEMORY_KIB_MAX = 1 << 20  # an export file from a stranger may ask for 1 GiB of memory and no more
_EXPORT_BYTES = _HEADER.size + SecretBox.NONCE_SIZE + KEY_BYTES + SecretBox.MACBYTES


@dataclass(frozen=True, slots=True)
class RootKey:
    """The owner's secret. `generate` and `from_bytes` are the ways to make one."""

    _secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self._secret) != KEY_BYTES:
            raise InputError(
                f"a root key has {KEY_BYTES} bytes, not {len(self._secret)}: name a key file of `sotto key new`"
            )

    @classmethod
    def generate(cls, entropy: Callable[[int], bytes]) -> RootKey:
        """A fresh key; `entropy(n)` gives n unpredictable bytes (os.urandom in production)."""
        return cls(entropy(KEY_BYTES))

    @classmethod
    def from_bytes(cls, secret: bytes) -> RootKey:
        """The key that `to_bytes` gave. Raises InputError unless it has 32 bytes."""
        return cls(bytes(secret))

    def to_bytes(self) -> bytes:
        """The 32 secret bytes, for a key file. Never logged, never sent."""
        return self._secret

    def fingerprint(self) -> str:
        """16 hex digits in groups of four that name this key to people; they tell nothing else about it."""
        digits = self.derive(_DOMAIN_FINGERPRINT, b"", 8).hex()
        return "-".join(digits[i : i + 4] for i in range(0, 16, 4))

    def derive(self, domain: bytes, message: bytes, size: int) -> bytes:
        """`size` (at most 64) bytes of BLAKE2b keyed with the root, personalised with `domain` (exactly 16 bytes)."""
        if len(domain) != blake2b.PERSON_SIZE:
            raise ValueError(f"a domain has {blake2b.PERSON_SIZE} bytes")
        return blake2b(message, digest_size=size, key=self._secret, person=domain).digest()

    def __repr__(self) -> str:
        return f"RootKey({self.fingerprint()})"


def key_check(root: RootKey, deployment_id: bytes) -> bytes:
    """16 bytes that a deployment's folder stores so that a wrong key is noticed before anything is computed.

    They stay with the owner: whoever holds them can confirm a guess of the key, nothing more.
    """
    if len(deployment_id) != ID_BYTES:
        raise ValueError(f"a deployment id has {ID_BYTES} bytes")
    return root.derive(_DOMAIN_CHECK, deployment_id, KEY_CHECK_BYTES)


def require_key(root: RootKey, deployment_id: bytes, stored: bytes) -> None:
    """Raise InputError unless `stored` is the `key_check` of this key and deployment."""
    if not hmac.compare_digest(key_check(root, deployment_id), stored):
        raise InputError(
            f"wrong key: deployment {deployment_id.hex()} was not sealed with key {root.fingerprint()}; "
            "name the key file that sealed it, or seal the model again"
        )


@dataclass(frozen=True, slots=True)
class Argon2Cost:
    """Work of one passphrase guess. The default is libsodium's MODERATE: about a second and 256 MiB."""

    operations: int = argon2id.OPSLIMIT_MODERATE
    memory_kib: int = argon2id.MEMLIMIT_MODERATE >> 10

    def __post_init__(self) -> None:
        if not argon2id.OPSLIMIT_MIN <= self.operations <= _OPERATIONS_MAX:
            raise InputError(f"key export: {self.operations} Argon2id operations, allowed are 1 to {_OPERATIONS_MAX}")
        if not argon2id.MEMLIMIT_MIN >> 10 <= self.memory_kib <= _MEMORY_KIB_MAX:
            raise InputError(
                f"key export: {self.memory_kib} KiB of Argon2id memory, allowed are 8 to {_MEMORY_KIB_MAX}"
            )


def export_key(
    root: RootKey, passphrase: str, entropy: Callable[[int], bytes], cost: Argon2Cost | None = None
) -> bytes:
    """The key sealed under `passphrase` (Argon2id, then XSalsa20-Poly1305): safe to keep where others can read it.

    Raises InputError when the passphrase is empty. The cost and the salt are authenticated because the box key follows
    from them: changing either makes `import_key` fail.
    """
    cost = cost or Argon2Cost()
    header = _HEADER.pack(_MAGIC, cost.operations, cost.memory_kib, entropy(argon2id.SALTBYTES))
    box = SecretBox(_box_key(passphrase, header))
    return header + bytes(box.encrypt(root.to_bytes(), entropy(SecretBox.NONCE_SIZE)))


def import_key(blob: bytes, passphrase: str) -> RootKey:
    """The key inside an export. Raises InputError: not an export, damaged, unreasonable cost, wrong passphrase."""
    if len(blob) != _EXPORT_BYTES or not blob.startswith(_MAGIC):
        raise InputError(
            "not a sotto key export of a version that this program reads: make one with `sotto key export`"
        )
    box = SecretBox(_box_key(passphrase, blob[: _HEADER.size]))
    try:
        return RootKey(box.decrypt(blob[_HEADER.size :]))
    except nacl.exceptions.CryptoError as error:
        raise InputError("wrong passphrase, or the key export is damaged") from error


def _box_key(passphrase: str, header: bytes) -> bytes:
    _, operations, memory_kib, salt = _HEADER.unpack(header)
    cost = Argon2Cost(operations, memory_kib)
    # The same characters have several encodings; keyboards disagree about which one they send.
    secret = unicodedata.normalize("NFKC", passphrase).encode("utf-8", "surrogatepass")
    if not secret:
        raise InputError("the passphrase is empty: choose one")
    try:
        return argon2id.kdf(SecretBox.KEY_SIZE, secret, salt, cost.operations, cost.memory_kib << 10)
    except nacl.exceptions.RuntimeError as error:
        raise InputError(f"no memory for the passphrase: {cost.memory_kib >> 10} MiB must be free") from error
