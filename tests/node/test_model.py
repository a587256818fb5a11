"""A deployed model's small decisions: what computes where, and what leaves the client in which precision."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import trio

from node.model import turns_over, wire_of
from protocol.strategy import parse


@pytest.mark.parametrize(
    ("dtype", "wire", "sent"),
    [
        ("float32", "float32", "float32"),
        ("bfloat16", "float32", "bfloat16"),
        ("int8", "float32", "float32"),
        ("bfloat16", "int8", "int8"),
        ("float32", "bfloat16", "bfloat16"),
    ],
)
def test_activations_leave_in_what_the_first_hop_computes_in(dtype: str, wire: str, sent: str) -> None:
    assert wire_of(parse(f"wire={wire}"), dtype) == sent


@pytest.mark.parametrize(("itemsize", "threads"), [(2, 0), (4, 1)])
def test_a_lone_request_computes_a_head_of_a_few_ms_on_the_loop(
    itemsize: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[object] = []

    async def in_thread(function):  # type: ignore[no-untyped-def]
        used.append(function)
        return function()

    async def main() -> None:
        head = SimpleNamespace(weight_bytes=itemsize * 2560 * 48_000)
        ends = SimpleNamespace(head=head, logits=lambda x: x, embed=lambda ids: torch.zeros(len(ids), 4))
        turn = await turns_over(ends).take(torch.ones(1, 4), lambda _: (1,))  # type: ignore[arg-type]
        assert turn is not None

    monkeypatch.setattr("node.model.in_thread", in_thread)
    trio.run(main)
    assert len(used) == threads
