"""What `sotto bench engine` says that a token reads: the denominators of its shares of the memory limit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from client.sealing import Sealer
from models.checkpoint import Checkpoint
from models.int8 import Int8Linear
from protocol.ids import ID_BYTES, DeploymentId
from simnet.bench.engine.decode import message_bytes
from simnet.bench.engine.rig import Bench, Budget, Rig, Sizes
from tests.helpers.tiny_models import make_checkpoint


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2), ("int8", 1)])
def test_a_token_reads_blocks_and_head_as_they_are_kept(tmp_path: Path, dtype: str, size: int) -> None:
    place = make_checkpoint(tmp_path / "model")
    model, config = Checkpoint.open(str(place)), Checkpoint.open(str(place)).config
    bench = Bench(tmp_path, place, "", Sizes(), Budget(0.0, 1), print)
    numbers = sum(block.num_parameters for block in config.blocks) + config.vocab_size * config.hidden_size
    assert Rig(bench, dtype).bytes_per_token(dtype) == size * numbers
    head = Sealer.open(model, dtype, None, DeploymentId(bytes(ID_BYTES))).ends().head
    assert isinstance(head, Int8Linear) == (dtype == "int8"), "the head is kept as the blocks are"
    assert head.dtype == (torch.bfloat16 if dtype == "bfloat16" and head.is_packed else torch.float32)


def test_a_message_in_eight_bits_has_factors_too() -> None:
    assert [message_bytes(wire, 768) for wire in ("float32", "bfloat16", "int8")] == [3072, 1536, 768 + 2 * 12]
