"""The manifest: sealed against change, bounded, and with one entry for each block."""

from __future__ import annotations

from dataclasses import replace

import pytest

from protocol import limits
from protocol.codec import decode, encode, encode_message
from protocol.errors import RemoteProtocolError
from protocol.manifest import BlockEntry, ConfigPair, Manifest, TensorEntry, open_manifest, sign_manifest
from protocol.messages import LeaseSpan
from protocol.tensors import TensorHeader
from tests.helpers.protocol_samples import ADVERT, BLOCK, CLIENT, DEPLOYMENT, DIGEST, MANIFEST, OTHER, SALT


def test_it_opens_to_itself_and_its_owner() -> None:
    assert open_manifest(sign_manifest(MANIFEST, CLIENT)) == (MANIFEST, CLIENT.peer)


@pytest.mark.parametrize("flip", [0x01, 0x80, 0xFF])
def test_every_changed_byte_is_refused_or_another_owners(flip: int) -> None:
    data = sign_manifest(MANIFEST, CLIENT)
    for at in range(len(data)):
        with pytest.raises(RemoteProtocolError):
            open_manifest(data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :])


@pytest.mark.parametrize("domain", ["advert/1", "ticket/1", ""])
def test_a_signature_for_another_purpose_is_refused(domain: str) -> None:
    with pytest.raises(RemoteProtocolError, match="does not hold"):
        open_manifest(encode(CLIENT.sign(domain, encode(MANIFEST))))


def test_another_record_is_refused() -> None:
    with pytest.raises(RemoteProtocolError, match="does not hold"):
        open_manifest(encode(CLIENT.sign("manifest/1", encode(ADVERT))))


@pytest.mark.parametrize(
    "change",
    [
        {"tensors": BLOCK.tensors[::-1]},
        {"tensors": (BLOCK.tensors[0],) * 2},
        {"tensors": ()},
        {"config": BLOCK.config[::-1]},
        {"config": (BLOCK.config[0],) * 2},
        {"shard_bytes": BLOCK.weight_bytes - 1},
        {"shard_bytes": limits.SHARD_BYTES_MAX + 1},
        {"digest": DIGEST[:-1]},
    ],
)
def test_a_block_that_contradicts_itself_cannot_exist(change: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        replace(BLOCK, **change)


def test_the_largest_manifest_is_read() -> None:
    """As many arrays as there can be: 256 blocks of 64 tensors and 64 pairs."""
    tensors = tuple(
        TensorEntry(f"t{number:02}", TensorHeader("float32", (1,))) for number in range(limits.TENSORS_PER_BLOCK_MAX)
    )
    config = tuple(ConfigPair(f"c{number:02}", number) for number in range(limits.CONFIG_PAIRS_MAX))
    block = BlockEntry(DIGEST, 1 << 20, config, tensors)
    manifest = replace(MANIFEST, blocks=(block,) * limits.BLOCKS_MAX)
    assert decode(Manifest, encode(manifest)) == manifest


@pytest.mark.parametrize("change", [{"tier": "secret"}, {"dtype": "float64"}, {"blocks": ()}, {"deployment": b""}])
def test_a_manifest_that_contradicts_itself_cannot_exist(change: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        replace(MANIFEST, **change)


def test_weights_are_counted_by_block_and_span() -> None:
    assert BLOCK.weight_bytes == 2 * 4 * 32
    assert MANIFEST.span_bytes(0, 2) == 2 * BLOCK.weight_bytes
    assert MANIFEST.span_bytes(1, 2) == BLOCK.weight_bytes
    assert MANIFEST.span_bytes(1, 1) == 0


def test_the_deepest_model_fits_into_a_message() -> None:
    config = tuple(sorted((ConfigPair(f"rope_original_max_position_{n:02}", 10_000_000.5) for n in range(32)), key=str))
    names = sorted(
        ("attn_norm", "down", "gate", "k", "k_bias", "k_post", "mlp_norm", "o", "q", "q_bias", "q_post", "up")
    )
    tensors = tuple(TensorEntry(name, TensorHeader("bfloat16", (1024, 1024, 256))) for name in names)
    block = BlockEntry(DIGEST, limits.SHARD_BYTES_MAX, config, tensors)
    signed = sign_manifest(Manifest(DEPLOYMENT, SALT, "ee", "bfloat16", (block,) * limits.BLOCKS_MAX), CLIENT)
    assert len(signed) < limits.MANIFEST_BYTES_MAX
    largest = LeaseSpan(
        bytes(limits.MANIFEST_BYTES_MAX), 0, limits.BLOCKS_MAX, limits.CONTEXT_TOKENS_MAX, limits.LEASE_S_MAX,
        bytes(limits.CAPABILITY_BYTES_MAX),
    )  # fmt: skip
    assert len(encode_message(largest)) <= limits.HEADER_BYTES_MAX


def test_nobody_states_a_manifest_of_anothers_deployment() -> None:
    open_manifest(sign_manifest(MANIFEST, CLIENT))
    with pytest.raises(RemoteProtocolError, match="belongs to another owner"):
        open_manifest(sign_manifest(MANIFEST, OTHER))
    with pytest.raises(RemoteProtocolError, match="belongs to another owner"):
        open_manifest(sign_manifest(replace(MANIFEST, salt=bytes(16)), CLIENT))
