"""The blocks of a span: what a forward that fails leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from models import kernels, stack
from models.attention import KvCache
from models.blocks import Block
from models.config import RopeConfig
from models.errors import ContextExceeded
from protocol.ids import PeerId
from protocol.limits import PAGE_TOKENS
from tests.helpers.engines import CONFIG, inputs, random_tensors
from worker import runner
from worker.kv_pages import KvBudget
from worker.runner import FloatBlocks, Part, build_float_blocks
from worker.span_kv import SessionKv, SpanKv

KEYS = (b"k" * 16,)
CPU = torch.device("cpu")


class Span:
    """Two blocks, and two sessions over them of 70 and 80 tokens of 600; the second one shares its first page."""

    def __init__(self) -> None:
        self.blocks: FloatBlocks = build_float_blocks([CONFIG] * 2, random_tensors, torch.float32, CPU)
        self.kv = SpanKv([CONFIG] * 2, torch.float32, CPU, KvBudget(1 << 24))
        self.first, self.second = self._open(70), self._open(80)
        assert self.second.held == PAGE_TOKENS

    def _open(self, tokens: int) -> SessionKv:
        session = self.kv.open(PeerId("ann"), 600, KEYS)
        x = inputs(tokens)[session.held :]
        self.blocks.forward(x, [Part(session, session.held, len(x))])
        return session


REFUSED: list[tuple[type[Exception], Callable[[Span], Part]]] = [
    (ValueError, lambda span: Part(span.second, 81, 1)),
    (ValueError, lambda span: Part(span.second, -1, 1)),
    (ValueError, lambda span: Part(span.second, 80, 2)),
    (ContextExceeded, lambda span: Part(span.second, 80, 521)),
]


@pytest.mark.parametrize(("error", "bad"), REFUSED)
def test_a_refused_forward_leaves_every_session_as_it_was(error: type[Exception], bad: Any) -> None:
    span, plain, x = Span(), Span(), inputs(2, seed=3)
    part = bad(span)
    rows = torch.cat([x[:1], inputs(part.count if part.count > 2 else 1)])
    with pytest.raises(error):
        span.blocks.forward(rows, [Part(span.first, 30, 1), part])
    assert (span.first.length, span.second.length) == (70, 80)
    got = span.blocks.forward(x, [Part(span.first, 70, 1), Part(span.second, 80, 1)])
    assert torch.equal(got, plain.blocks.forward(x, [Part(plain.first, 70, 1), Part(plain.second, 80, 1)]))


@pytest.mark.usefixtures("without_kernels")
def test_a_failed_forward_may_be_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    span, plain, x = Span(), Span(), inputs(2, seed=3)
    parts = [Part(span.first, 70, 1), Part(span.second, 20, 1)]
    expected = plain.blocks.forward(x, [Part(plain.first, 70, 1), Part(plain.second, 20, 1)])
    run, calls = Block.run, list[int]()

    def short_of_memory(*rest: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) > 1:
            raise MemoryError
        return run(*rest)

    with monkeypatch.context() as patch:
        patch.setattr(Block, "run", short_of_memory)
        with pytest.raises(MemoryError):
            span.blocks.forward(x, parts)
    assert (span.first.length, span.second.length) == (70, 20), "no token is valid that some block lacks"
    assert torch.equal(span.blocks.forward(x, parts), expected)


@pytest.mark.skipif("float32" not in kernels.SUPPORTED, reason="this processor has no kernels")
@pytest.mark.parametrize("computed", [False, True])
def test_a_failed_call_may_be_repeated(computed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it wrote anything, or after all."""
    span, plain, x = Span(), Span(), inputs(2, seed=3)
    parts = [Part(span.first, 70, 1), Part(span.second, 20, 1)]
    expected = plain.blocks.forward(x, [Part(plain.first, 70, 1), Part(plain.second, 20, 1)])

    def short_of_memory(*numbers: int) -> None:
        if computed:
            kernels.compiled.run_blocks(*numbers)
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(stack, "compiled", SimpleNamespace(run_blocks=short_of_memory))
        with pytest.raises(MemoryError):
            span.blocks.forward(x, parts)
    assert (span.first.length, span.second.length) == (70, 20), "no token is valid that some block lacks"
    assert torch.equal(span.blocks.forward(x, parts), expected)


def test_how_many_rows_fit_is_asked_of_no_more_blocks_than_differ_in_it() -> None:
    """It is asked of each step that waits, before each forward."""
    wide = replace(CONFIG, num_heads=8, head_dim=4)
    configs = [replace(config, rope=RopeConfig(1e4 + n)) for n in range(5) for config in (CONFIG, wide)]
    blocks, plain = (
        build_float_blocks(each, lambda n, each=each: random_tensors(n, each[n]), torch.float32, CPU)  # type: ignore[misc]
        for each in (configs, [CONFIG, wide])
    )
    assert len(blocks._row_costs) == len(plain._row_costs) == 2
    for length in (1, 77, 600, 1 << 20):
        # By the block that takes more: at few tokens the one, at many the other.
        heads = 4 * (4 * 16 + 3 * 64 + 4 * 24) + 17 * length, 4 * (4 * 16 + 3 * 48 + 4 * 24) + 33 * length
        assert blocks.rows_at_once(length) == plain.rows_at_once(length) == max(1, (1 << 30) // max(heads))


def test_the_rotary_tables_of_a_span_are_together_as_large_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a model have one; a stranger's may have as many as there are blocks."""
    monkeypatch.setattr(runner, "TABLE_NUMBERS", 400 * CONFIG.head_dim)
    configs = [replace(CONFIG, rope=RopeConfig(theta)) for theta in (1e4, 2e4, 1e4, 3e4, 4e4)]
    blocks = build_float_blocks(configs, random_tensors, torch.float32, CPU)
    session = SpanKv(configs, torch.float32, CPU, KvBudget(1 << 24)).open(PeerId("ann"), 600)
    x = expected = inputs(350)
    for index, config in enumerate(configs):
        alone = Block(config, random_tensors(index))
        expected = alone.forward(expected, KvCache(config, 600), 0)
    torch.testing.assert_close(blocks.forward(x, [Part(session, 0, 350)]), expected, rtol=1e-5, atol=1e-5)
    blocks.forward(x[:1], [Part(session, 40, 1)])
    tables = {block.rotary_id: block._rotary._table for block in blocks.blocks}
    assert len(tables) == 4
    numbers = [sum(turn.numel() for turn in table) for table in tables.values()]
    assert 0 < sum(numbers) <= 400 * CONFIG.head_dim
