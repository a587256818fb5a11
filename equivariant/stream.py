"""The keyed stream: every secret number of a deployment, from the root key and nothing else.

    key    = BLAKE2b-256(key = root, person = "sotto/stream/v01",
                         deployment id (16) | tag (1: none 0, block 1) | block (4, little endian) | name (UTF-8))
    bytes  = chunk 0 | chunk 1 | ...      chunk i = ChaCha20-IETF(key, nonce = i (12, little endian), 64 KiB),
             taken as the ciphertext of zeros under ChaCha20-Poly1305, hence from block counter 1 on

The encoding is injective (all fixed width, the name last), so two matrices never share a stream, and a name determines
its numbers whatever spans, workers or order of work surround it. Bytes, integers, permutations and signs are the same
bits on every machine. Numbers that pass through log, cos or a QR may differ in the last place, so the manifest says
what a shard is (README.md, "Secrets"). No generator of torch or numpy is ever asked for a secret.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from nacl.bindings import crypto_aead_chacha20poly1305_ietf_encrypt
from torch import Tensor

from equivariant.keys import RootKey
from protocol.ids import ID_BYTES

CHUNK_BYTES = 1 << 16
_DOMAIN = b"sotto/stream/v01"
_NORMAL_PAIRS = 1 << 18  # drawn at a time: the result is the only large thing in memory
_NONCE_BYTES = 12
_TAG_BYTES = 16


class Stream:
    """One name's numbers, read from the front. Each draw continues where the last one ended."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._chunk = 0
        self._rest = b""

    def read(self, size: int) -> bytes:
        """The next `size` bytes of keystream."""
        pieces = [self._rest[:size]]
        self._rest = self._rest[size:]
        missing = size - len(pieces[0])
        while missing > 0:
            chunk = self._next_chunk()
            pieces.append(chunk[:missing])
            self._rest = chunk[missing:]
            missing -= len(pieces[-1])
        return b"".join(pieces)

    def _next_chunk(self) -> bytes:
        nonce = self._chunk.to_bytes(_NONCE_BYTES, "little")
        self._chunk += 1
        sealed = crypto_aead_chacha20poly1305_ietf_encrypt(bytes(CHUNK_BYTES), None, nonce, self._key)
        return sealed[:-_TAG_BYTES]

    def uint64(self, count: int) -> npt.NDArray[np.uint64]:
        """`count` uniform 64-bit integers (little endian words of the stream)."""
        return np.frombuffer(self.read(8 * count), dtype="<u8").astype(np.uint64)

    def uniform(self, count: int) -> Tensor:
        """[count] float64, uniform in the open interval (0, 1): the centres of 2^52 equal cells."""
        cells = (self.uint64(count) >> np.uint64(12)).astype(np.float64)
        return torch.from_numpy((cells + 0.5) * 2.0**-52)

    def log_uniform(self, count: int, low: float, high: float) -> Tensor:
        """[count] float64 in (low, high), the logarithm uniform."""
        return low * torch.pow(high / low, self.uniform(count))

    def normal(self, *shape: int) -> Tensor:
        """Standard normal float64 of `shape`: pair i is Box-Muller's of words 2i, 2i + 1."""
        count = math.prod(shape)
        out = torch.empty((count + 1) // 2, 2, dtype=torch.float64)
        for start in range(0, len(out), _NORMAL_PAIRS):
            part = out[start : start + _NORMAL_PAIRS]
            u = self.uniform(2 * len(part)).reshape(-1, 2)
            radius, angle = torch.sqrt(-2.0 * torch.log(u[:, 0])), (2.0 * math.pi) * u[:, 1]
            part.copy_(torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=1))
        return out.reshape(-1)[:count].reshape(shape)

    def permutation(self, count: int) -> Tensor:
        """[count] int64: a uniform permutation of range(count), as the order of `count` distinct 64-bit words.

        Words with a tie are drawn again, all of them: keeping either order would favour one.
        """
        while True:
            words = self.uint64(count)
            order = np.argsort(words, kind="stable")
            ranked = words[order]
            if not np.any(ranked[1:] == ranked[:-1]):
                return torch.from_numpy(order.astype(np.int64))

    def signs(self, count: int) -> Tensor:
        """[count] float64, each +1 or -1 with equal chance (bit 0 is +1, lowest bit of each byte first)."""
        raw = np.frombuffer(self.read((count + 7) // 8), dtype=np.uint8)
        bits = np.unpackbits(raw, count=count, bitorder="little")
        return torch.from_numpy(1.0 - 2.0 * bits.astype(np.float64))

    def orthogonal(self, size: int) -> Tensor:
        """[size, size] float64, Haar distributed: QR of a Gaussian with R's diagonal made positive (Mezzadri 2007)."""
        q: Tensor
        q, r = torch.linalg.qr(self.normal(size, size))
        return q * torch.where(r.diagonal() < 0, -1.0, 1.0)

    def invertible(self, size: int, condition_max: float) -> tuple[Tensor, Tensor]:
        """A matrix [size, size] float64 and its inverse: U diag(s) V, U and V Haar, s log-uniform.

        s lies in (condition_max^-1/2, condition_max^1/2), so the condition number is below `condition_max`.
        """
        left, right = self.orthogonal(size), self.orthogonal(size)
        s = self.log_uniform(size, condition_max**-0.5, condition_max**0.5)
        return (left * s) @ right, (right.T / s) @ left.T


@dataclass(frozen=True, slots=True)
class KeyStream:
    """All streams of one deployment."""

    root: RootKey
    deployment_id: bytes

    def __post_init__(self) -> None:
        if len(self.deployment_id) != ID_BYTES:
            raise ValueError(f"a deployment id has {ID_BYTES} bytes")

    def derive(self, block: int | None, name: str) -> Stream:
        """The stream of `name` in `block`, or in the deployment as a whole when `block` is None."""
        tag, index = (0, 0) if block is None else (1, block)
        place = bytes([tag]) + index.to_bytes(4, "little")
        return Stream(self.root.derive(_DOMAIN, self.deployment_id + place + name.encode(), 32))
