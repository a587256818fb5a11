"""A loaded span and the files that it was read from: they are the store's to delete."""

from __future__ import annotations

import errno
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from client.sealing import manifest_of
from models.config import BlockConfig
from models.int8 import quantise_block
from protocol.errors import Refused
from protocol.manifest import BlockEntry, ConfigPair, TensorEntry
from protocol.messages import RefusalReason
from protocol.pieces import PieceList
from protocol.ports import SpanSpec
from protocol.tensors import TensorHeader
from tests.helpers.engines import CONFIG, OWNER, random_tensors
from worker.engine import Engine
from worker.payloads import NAMES
from worker.shards import read_shard

# The blocks of the tier `plain` have norms of their own, and all biases that there are.
PLAIN = replace(CONFIG, folded=False, q_bias=True, k_bias=True, v_bias=True, o_bias=True, mlp_bias=True)


def written(folder: Path, tensors: dict[str, Any], config: BlockConfig) -> BlockEntry:
    shard = save(tensors)
    digest = PieceList.of_bytes(shard).digest
    (folder / digest.hex()).write_bytes(shard)
    headers = {name: TensorHeader(NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
    return BlockEntry(
        digest=digest,
        shard_bytes=len(shard),
        config=tuple(ConfigPair(key, value) for key, value in config.to_pairs()),
        tensors=tuple(TensorEntry(name, header) for name, header in sorted(headers.items())),
    )


def of_dtype(dtype: str, config: BlockConfig) -> dict[str, Any]:
    match dtype:
        case "int8":
            return quantise_block(random_tensors(0, config))
        case "int32":
            return {name: torch.ones(shape, dtype=torch.int32) for name, shape in config.tensor_shapes().items()}
        case _:
            return random_tensors(0, config, getattr(torch, dtype))


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.EMFILE, "too many open files"), RefusalReason.DISK),
        (FileNotFoundError(errno.ENOENT, "gone"), RefusalReason.BAD_SHARD),
    ],
)
def test_a_file_that_cannot_be_read_now_is_no_bad_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError, reason: str
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    entry = written(tmp_path, of_dtype("float32", CONFIG), CONFIG)
    monkeypatch.setattr("worker.shards.safe_open", fails)
    with pytest.raises(Refused) as refused:
        read_shard(tmp_path / entry.digest.hex(), entry)
    assert refused.value.reason == reason


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what is mapped")
@pytest.mark.parametrize("config", [PLAIN, CONFIG], ids=["plain", "ee"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8", "int32"])
def test_a_loaded_span_keeps_no_file_on_the_disk(tmp_path: Path, dtype: str, config: BlockConfig) -> None:
    """What is deleted takes room as long as it is mapped, and no budget counts it."""

    def mapped() -> bool:
        return str(tmp_path) in Path("/proc/self/maps").read_text()

    entry = written(tmp_path, of_dtype(dtype, config), config)
    engine = Engine(lambda digest: tmp_path / digest.hex())
    tensors = read_shard(tmp_path / entry.digest.hex(), entry)
    assert mapped(), "what this test looks for can be seen"
    del tensors
    manifest = manifest_of(OWNER.peer, bytes(16), False, dtype, [entry])
    engine.load(SpanSpec(manifest, 0, 1))
    assert not mapped()
    engine.unload(manifest.deployment)
