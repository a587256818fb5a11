"""The client's ends, with a key and without."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from equivariant.ends import ClientEnds, FoldedEnds
from equivariant.families import DeploymentSecrets
from equivariant.keys import RootKey

GENERATOR = torch.Generator().manual_seed(3)
ROTATION = DeploymentSecrets(RootKey.from_bytes(bytes(32)), bytes(16), 24).rotation
EPS = 1e-5


@dataclass(frozen=True)
class Ends:
    embedding: Tensor
    final_norm: Tensor
    head: Tensor


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


TABLE = draw(50, 24)
UNTIED = Ends(TABLE, 1 + 0.3 * draw(24), draw(50, 24))
TIED = Ends(TABLE, UNTIED.final_norm, TABLE)


def opened(
    ends: Ends = UNTIED,
    rotation: Tensor | None = ROTATION,
    dtype: torch.dtype = torch.float32,
    head: torch.dtype | None = None,
) -> ClientEnds:
    return ClientEnds.open(FoldedEnds.of(ends, rotation, dtype) if rotation is not None else ends, EPS, dtype, head)


@pytest.mark.parametrize("ends", [UNTIED, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("rotation", [ROTATION, None], ids=["ee", "plain"])
def test_ends_are_those_of_the_model(ends: Ends, rotation: Tensor | None) -> None:
    client, ids, hidden = opened(ends, rotation, torch.float64), [3, 49, 0, 3], draw(6, 24)
    keyed = hidden if rotation is None else hidden @ rotation
    sent = ends.embedding[ids] if rotation is None else ends.embedding[ids] @ rotation
    expected = torch.nn.functional.rms_norm(hidden, (24,), ends.final_norm, EPS) @ ends.head.T
    torch.testing.assert_close(client.embed(ids), sent, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(client.logits(keyed), expected, rtol=1e-12, atol=1e-12)


def test_tables_are_folded_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = FoldedEnds.of(UNTIED, ROTATION, torch.float64)
    monkeypatch.setattr("equivariant.ends.FOLDED_NUMBERS", 24 * 7)
    parts = FoldedEnds.of(UNTIED, ROTATION, torch.float64)
    torch.testing.assert_close(parts.embedding, whole.embedding, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(parts.head, whole.head, rtol=1e-13, atol=1e-13)


def test_another_key_gives_other_logits() -> None:
    other = DeploymentSecrets(RootKey.from_bytes(bytes(32)), bytes(15) + b"\1", 24).rotation
    hidden = draw(6, 24) @ ROTATION
    right = opened(dtype=torch.float64).logits(hidden)
    wrong = opened(rotation=other, dtype=torch.float64).logits(hidden)
    assert float((right - wrong).norm() / right.norm()) > 0.5


@pytest.mark.parametrize("ids", [[50], [-1], [0, 1, 1000]])
def test_ids_outside_the_vocabulary_are_refused(ids: list[int]) -> None:
    with pytest.raises(ValueError, match="vocabulary of 50"):
        opened().embed(ids)


def test_a_rotation_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match="hidden size 24"):
        FoldedEnds.of(UNTIED, ROTATION[:12, :12], torch.float32)


def test_results_have_the_dtype_asked_for_and_the_table_keeps_its_own() -> None:
    stored = Ends(*(tensor.to(torch.bfloat16) for tensor in (TABLE, UNTIED.final_norm, UNTIED.head)))
    for dtype in (torch.float32, torch.bfloat16):
        client = opened(stored, None, dtype)
        assert client.embedding is stored.embedding
        assert client.embed([1, 2]).dtype == dtype
        assert client.logits(client.embed([1, 2])).dtype == dtype


def test_sixteen_bit_ends_round_once() -> None:
    """They are folded in float32, so a row is the rounding of the exact one."""
    exact, client = (FoldedEnds.of(UNTIED, ROTATION, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert torch.equal(client.embedding, exact.embedding.to(torch.bfloat16))
    assert torch.equal(client.head, exact.head.to(torch.bfloat16))
    torch.testing.assert_close(exact.embedding, TABLE.float() @ ROTATION.float())


@pytest.mark.parametrize("head", [torch.bfloat16, torch.int8])
def test_a_rounded_head_leaves_everything_else_in_float32(head: torch.dtype) -> None:
    exact, rounded = (opened(head=each) for each in (None, head))
    hidden = draw(6, 24).float()
    assert rounded.head.dtype in (torch.bfloat16, torch.float32)
    assert torch.equal(rounded.embed([1, 2]), exact.embed([1, 2]))
    got, want = rounded.logits(hidden), exact.logits(hidden)
    assert got.dtype == torch.float32
    assert not torch.equal(got, want)
    assert float((got - want).norm() / want.norm()) < 0.03


def test_a_head_that_the_processor_does_not_multiply_in_stays_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.linear.HAS_ONEDNN", False)
    assert ClientEnds.open(UNTIED, EPS, head=torch.bfloat16).head.dtype == torch.float32


def test_ends_do_not_show_the_rotation() -> None:
    assert "tensor" not in repr(opened())
    assert "tensor" not in repr(FoldedEnds.of(UNTIED, ROTATION, torch.float32))
