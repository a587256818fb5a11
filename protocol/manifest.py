"""The deployment manifest: one signed entry per block, never spans, so re-placement needs no re-sealing.

It is the truth about a sealed model: a worker accepts a shard only when digest, names, shapes and dtypes agree with it.
It names no model, file or person, and holds nothing about the key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from protocol import limits
from protocol.codec import decode, encode
from protocol.errors import RemoteProtocolError
from protocol.ids import DIGEST_BYTES, ID_BYTES, DeploymentId, PeerId, ShardDigest, deployment_id
from protocol.schema import Between, Record, Scalar, Size
from protocol.signed import Identity, Signed
from protocol.tensors import DTYPE_BYTES, TensorHeader

TIERS = ("plain", "ee")
_DOMAIN = "manifest/1"
Name = Annotated[str, Size(1, limits.NAME_CHARS_MAX)]


@dataclass(frozen=True, slots=True)
class ConfigPair(Record):
    """One scalar of a block's configuration (models.config.BlockConfig.to_pairs)."""

    key: Name
    value: Scalar


@dataclass(frozen=True, slots=True)
class TensorEntry(Record):
    """One tensor of a shard."""

    name: Name
    header: TensorHeader


@dataclass(frozen=True, slots=True)
class BlockEntry(Record):
    """One block: the shard that holds it, and what a worker must find inside."""

    digest: Annotated[ShardDigest, Size(DIGEST_BYTES, DIGEST_BYTES)]
    shard_bytes: Annotated[int, Between(1, limits.SHARD_BYTES_MAX)]
    config: Annotated[tuple[ConfigPair, ...], Size(1, limits.CONFIG_PAIRS_MAX)]
    tensors: Annotated[tuple[TensorEntry, ...], Size(1, limits.TENSORS_PER_BLOCK_MAX)]

    @property
    def weight_bytes(self) -> int:
        """Memory that the block's tensors take."""
        return sum(entry.header.nbytes for entry in self.tensors)

    def check(self) -> None:
        if self.weight_bytes > self.shard_bytes:
            raise ValueError("the tensors are larger than the shard")
        for names in ([pair.key for pair in self.config], [entry.name for entry in self.tensors]):
            if names != sorted(set(names)):
                raise ValueError("names must be sorted and unique")


@dataclass(frozen=True, slots=True)
class Manifest(Record):
    """A deployment: one model under one root key and deployment id, which follows from the owner and `salt`."""

    ARRAYS_MAX: ClassVar[int] = limits.MANIFEST_ARRAYS_MAX

    deployment: Annotated[DeploymentId, Size(ID_BYTES, ID_BYTES)]
    salt: Annotated[bytes, Size(ID_BYTES, ID_BYTES)]
    tier: Name
    dtype: Annotated[str, Size(1, 16)]  # that the blocks compute in: a declared property of the deployment
    blocks: Annotated[tuple[BlockEntry, ...], Size(1, limits.BLOCKS_MAX)]

    def check(self) -> None:
        if self.tier not in TIERS:
            raise ValueError(f"tier {self.tier!r} is not one of {', '.join(TIERS)}")
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"dtype {self.dtype!r} is not one of {', '.join(DTYPE_BYTES)}")

    def span_bytes(self, start: int, end: int) -> int:
        """Weights of blocks [start, end), in bytes."""
        return sum(block.weight_bytes for block in self.blocks[start:end])


def sign_manifest(manifest: Manifest, identity: Identity) -> bytes:
    """The manifest as it travels and is stored; `identity` is the one that its deployment id names."""
    return encode(identity.sign(_DOMAIN, encode(manifest)))


def open_manifest(data: bytes) -> tuple[Manifest, PeerId]:
    """Manifest and owner. Raises RemoteProtocolError when a byte of it was changed."""
    signed = decode(Signed, data)
    try:
        manifest = decode(Manifest, signed.verify(_DOMAIN))
    except RemoteProtocolError as error:
        raise RemoteProtocolError(f"the manifest does not hold: {error}") from None
    if manifest.deployment != deployment_id(signed.signer, manifest.salt):
        raise RemoteProtocolError("the manifest does not hold: its deployment belongs to another owner")
    return manifest, signed.signer
