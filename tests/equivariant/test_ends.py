"""The client's ends, with a key and without."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from equivariant.ends import ClientEnds
from equivariant.families import DeploymentSecrets
from equivariant.keys import RootKey

GENERATOR = torch.Generator().manual_seed(3)
ROTATION = DeploymentSecrets.derive(RootKey.from_bytes(bytes(32)), bytes(16), 24).rotation
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


@pytest.mark.parametrize("ends", [UNTIED, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("rotation", [ROTATION, None], ids=["ee", "plain"])
def test_ends_are_those_of_the_model(ends: Ends, rotation: Tensor | None) -> None:
    client, ids, hidden = ClientEnds.open(ends, EPS, rotation, torch.float64), [3, 49, 0, 3], draw(6, 24)
    keyed = hidden if rotation is None else hidden @ rotation
    sent = ends.embedding[ids] if rotation is None else ends.embedding[ids] @ rotation
    expected = torch.nn.functional.rms_norm(hidden, (24,), ends.final_norm, EPS) @ ends.head.T
    torch.testing.assert_close(client.embed(ids), sent, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(client.residual(keyed), hidden, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(client.logits(keyed), expected, rtol=1e-12, atol=1e-12)


def test_another_key_gives_other_logits() -> None:
    other = DeploymentSecrets.derive(RootKey.from_bytes(bytes(32)), bytes(15) + b"\1", 24).rotation
    hidden = draw(6, 24) @ ROTATION
    right = ClientEnds.open(UNTIED, EPS, ROTATION, torch.float64).logits(hidden)
    wrong = ClientEnds.open(UNTIED, EPS, other, torch.float64).logits(hidden)
    assert float((right - wrong).norm() / right.norm()) > 0.5


@pytest.mark.parametrize("ids", [[50], [-1], [0, 1, 1000]])
def test_ids_outside_the_vocabulary_are_refused(ids: list[int]) -> None:
    with pytest.raises(ValueError, match="vocabulary of 50"):
        ClientEnds.open(UNTIED, EPS).embed(ids)


def test_a_rotation_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match="hidden size 24"):
        ClientEnds.open(UNTIED, EPS, ROTATION[:12, :12])


def test_results_have_the_dtype_asked_for_and_the_table_keeps_its_own() -> None:
    stored = Ends(*(tensor.to(torch.bfloat16) for tensor in (TABLE, UNTIED.final_norm, UNTIED.head)))
    for dtype in (torch.float32, torch.bfloat16):
        client = ClientEnds.open(stored, EPS, ROTATION, dtype)
        assert client.embedding is stored.embedding
        assert client.embed([1, 2]).dtype == dtype
        assert client.logits(client.embed([1, 2])).dtype == dtype


def test_sixteen_bit_ends_round_once() -> None:
    """The rotation works in float32, so an embedded row is the rounding of the exact one."""
    exact, client = (ClientEnds.open(UNTIED, EPS, ROTATION, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert torch.equal(client.embed(range(50)), exact.embed(range(50)).to(torch.bfloat16))
    torch.testing.assert_close(exact.embed(range(50)), TABLE.float() @ ROTATION.float())


@pytest.mark.parametrize("head", [torch.bfloat16, torch.int8])
def test_a_rounded_head_leaves_everything_else_in_float32(head: torch.dtype) -> None:
    exact, rounded = (ClientEnds.open(UNTIED, EPS, ROTATION, head=each) for each in (None, head))
    hidden = draw(6, 24).float()
    assert rounded.head.dtype in (torch.bfloat16, torch.float32)
    assert torch.equal(rounded.embed([1, 2]), exact.embed([1, 2]))
    assert torch.equal(rounded.residual(hidden), exact.residual(hidden))
    got, want = rounded.logits(hidden), exact.logits(hidden)
    assert got.dtype == torch.float32
    assert not torch.equal(got, want)
    assert float((got - want).norm() / want.norm()) < 0.03


def test_a_head_that_the_processor_does_not_multiply_in_stays_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.linear.HAS_ONEDNN", False)
    assert ClientEnds.open(UNTIED, EPS, head=torch.bfloat16).head.dtype == torch.float32


def test_ends_do_not_show_the_rotation() -> None:
    assert "tensor" not in repr(ClientEnds.open(UNTIED, EPS, ROTATION))
