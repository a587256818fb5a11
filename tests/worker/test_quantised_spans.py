"""A deployment in int8, as a stranger may state it: what is taken, its cost, what is refused; and wires of 8 bits."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from client.sealing import block_entry, manifest_of
from models.attention import KvCache
from models.blocks import Block
from models.int8 import quantise_block
from models.precision import kv_token_bytes
from protocol.errors import Refused
from protocol.ids import PeerId
from protocol.manifest import BlockEntry, Manifest, sign_manifest
from protocol.messages import RefusalReason
from protocol.pieces import PieceList
from protocol.ports import SessionSpec, SpanSpec
from protocol.tensors import INT8_BLOCKS, TensorHeader
from tests.helpers.engines import CONFIG, OWNER, SESSION, Shop, inputs, random_tensors, work
from worker.engine import Engine
from worker.payloads import to_payload, to_tensor
from worker.spans import read_span

SALT = bytes(16)


class QuantisedShop:
    """An engine over two int8 blocks; `change` gets its hands on the tensors of the second."""

    def __init__(self, folder: Path, change: dict[str, Any] | None = None) -> None:
        self.blocks = [quantise_block(random_tensors(seed)) for seed in range(2)]
        self.blocks[1] |= change or {}
        shards = [save(tensors) for tensors in self.blocks]
        digests = [PieceList.of_bytes(shard).digest for shard in shards]
        for digest, shard in zip(digests, shards, strict=True):
            (folder / digest.hex()).write_bytes(shard)
        self.entries = [
            block_entry(tensors, CONFIG, digest, len(shard))
            for tensors, digest, shard in zip(self.blocks, digests, shards, strict=True)
        ]
        self.engine = Engine(lambda digest: folder / digest.hex())

    def manifest(self, dtype: str = "int8", last: BlockEntry | None = None) -> Manifest:
        return manifest_of(OWNER.peer, SALT, False, dtype, [self.entries[0], last or self.entries[1]])


def stated(entry: BlockEntry, name: str, header: TensorHeader) -> BlockEntry:
    tensors = [dataclasses.replace(t, header=header) if t.name == name else t for t in entry.tensors]
    size = sum(tensor.header.nbytes for tensor in tensors)
    return dataclasses.replace(entry, tensors=tuple(tensors), shard_bytes=max(size, entry.shard_bytes))


def test_it_computes_what_its_blocks_compute_and_costs_a_quarter(tmp_path: Path) -> None:
    shop, x = QuantisedShop(tmp_path), inputs(5)
    manifest = shop.manifest()
    request = read_span(sign_manifest(manifest, OWNER), 0, 2)
    loaded = shop.engine.load(SpanSpec(manifest, 0, 2))
    assert loaded.weight_bytes == request.weight_bytes == sum(entry.weight_bytes for entry in shop.entries)
    assert request.kv_token_bytes == 2 * kv_token_bytes(CONFIG, "float32")
    wide = dataclasses.replace(CONFIG, head_dim=32)
    assert kv_token_bytes(wide, "int8") == 4 * wide.kv_values_per_token, "keys and values are float32"
    shop.engine.open(SESSION, SessionSpec(manifest.deployment, PeerId("client"), PeerId("tenant"), 600))
    got = to_tensor(shop.engine.step(work(x, 0)).forward)
    expected, floats = x, x
    for seed, tensors in enumerate(shop.blocks):
        expected = Block(CONFIG, tensors).forward(expected, KvCache(CONFIG, 5), 0)
        floats = Block(CONFIG, random_tensors(seed)).forward(floats, KvCache(CONFIG, 5), 0)
    assert torch.equal(got, expected)
    assert (got - floats).norm() < 0.05 * floats.norm()


@pytest.mark.parametrize(
    ("name", "header", "reason"),
    [
        ("q", TensorHeader("float32", (32, 16)), RefusalReason.UNSUPPORTED),
        ("q", TensorHeader(INT8_BLOCKS, (32, 16)), RefusalReason.UNSUPPORTED),
        ("q", TensorHeader("int8", (16, 32)), RefusalReason.BAD_MANIFEST),
        ("q_scale", TensorHeader("float32", (31,)), RefusalReason.BAD_MANIFEST),
        ("q_scale", TensorHeader("float32", (32, 1)), RefusalReason.BAD_MANIFEST),
        ("q_scale", TensorHeader("bfloat16", (32,)), RefusalReason.UNSUPPORTED),
        ("q_scale", TensorHeader("int8", (32,)), RefusalReason.UNSUPPORTED),
        ("q_post", TensorHeader("bfloat16", (4, 8, 8)), RefusalReason.UNSUPPORTED),
    ],
)
def test_manifests_that_do_not_fit_are_refused(tmp_path: Path, name: str, header: TensorHeader, reason: str) -> None:
    shop = QuantisedShop(tmp_path)
    entry = stated(shop.entries[1], name, header)
    with pytest.raises(Refused) as refused:
        read_span(sign_manifest(shop.manifest(last=entry), OWNER), 0, 2)
    assert refused.value.reason == reason


def test_int8_is_a_matter_of_the_whole_deployment(tmp_path: Path) -> None:
    shop = QuantisedShop(tmp_path)
    with pytest.raises(Refused, match="bad_manifest"):
        read_span(sign_manifest(shop.manifest("float32"), OWNER), 0, 2)
    plain = Shop(tmp_path, [random_tensors(1)])
    with pytest.raises(Refused, match="bad_manifest"):
        read_span(sign_manifest(shop.manifest(last=plain.manifest.blocks[0]), OWNER), 0, 2)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -1.0, 0.0])
def test_shards_with_scales_that_cannot_be_meant_are_refused(tmp_path: Path, bad: float) -> None:
    scale = torch.ones(16)
    scale[3] = bad
    shop = QuantisedShop(tmp_path, {"down_scale": scale})
    with pytest.raises(Refused) as refused:
        shop.engine.load(SpanSpec(shop.manifest(), 0, 2))
    assert refused.value.reason == RefusalReason.BAD_SHARD


@pytest.mark.parametrize("wire", ["float32", "bfloat16", INT8_BLOCKS])
def test_an_answer_travels_as_its_step_did(tmp_path: Path, wire: str) -> None:
    shop, x = Shop(tmp_path, [random_tensors(seed) for seed in range(3)]), inputs(4)
    shop.load()
    exact = shop.step(x, 0)
    result = shop.engine.step(work(x, 0, payload=to_payload(x, wire)))
    assert result.forward.header == TensorHeader(wire, (4, 16))
    error = (to_tensor(result.forward).float() - exact).norm() / exact.norm()
    assert error < {"float32": 1e-6, "bfloat16": 0.01, INT8_BLOCKS: 0.02}[wire]


def test_a_narrow_deployment_answers_a_wide_step_narrowly(tmp_path: Path) -> None:
    shop, x = Shop(tmp_path, [random_tensors(1, dtype=torch.bfloat16)], dtype="bfloat16"), inputs(4)
    shop.load()
    wires = {wire: shop.engine.step(work(x, 0, payload=to_payload(x, wire))) for wire in ("float32", INT8_BLOCKS)}
    assert {wire: result.forward.header.dtype for wire, result in wires.items()} == {
        "float32": "bfloat16",
        INT8_BLOCKS: INT8_BLOCKS,
    }
