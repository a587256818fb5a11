"""Blocks in one call: the bits of the blocks one by one, in every shape that a block may have."""

from __future__ import annotations

from array import array
from dataclasses import replace
from typing import Any

import pytest
import torch

from models import kernels, stack
from models.blocks import Block
from models.config import BlockConfig, RopeConfig
from models.errors import ModelError
from models.few_rows import FLOAT_ROWS_MAX, INT8_ROWS_MAX
from models.int8 import quantise_block
from models.layout import ALONE_FLOAT32_ROWS_MAX, ALONE_ROWS_MAX, Layout, Segment
from models.pages import Extent, Kvs, KvSlab, Run
from models.rope import Rotary
from models.stack import Stack

CPU, WIDTH, CAPACITY = torch.device("cpu"), 64, 8192
LLAMA = BlockConfig("llama", WIDTH, 96, 4, 2, 16, 1e-5, 512, RopeConfig(1e4))
QWEN3 = replace(LLAMA, family="qwen3", qk_norm=True)
CONFIGS = {
    "llama": LLAMA,
    "biased": replace(LLAMA, family="qwen2", num_heads=6, head_dim=24, intermediate_size=100, q_bias=True, o_bias=True),
    "windowed": replace(LLAMA, family="mistral", sliding_window=5, num_kv_heads=1, head_dim=32),
    "normed": replace(QWEN3, num_kv_heads=4),
    "sealed": replace(QWEN3, head_dim=24, folded=True, k_bias=True),
}
PRECISIONS = [name for name in ("float32", "bfloat16", "int8") if name in kernels.SUPPORTED]
LARGE = replace(LLAMA, hidden_size=512, intermediate_size=1024, num_heads=8, num_kv_heads=2, head_dim=128)
FEW = [(1,), (3, 1, 2), (ALONE_ROWS_MAX,) * 3, (1,) * 20]


def random(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def block(config: BlockConfig, precision: str, seed: int, rotary: Rotary | None = None) -> Block:
    tensors = {
        name: 0.3 * random(shape, seed + place) for place, (name, shape) in enumerate(config.tensor_shapes().items())
    }
    if precision == "int8":
        return Block(config, quantise_block(tensors), rotary=rotary)
    return Block(config, tensors, dtype=getattr(torch, precision), rotary=rotary)


def slabs(blocks: list[Block]) -> list[KvSlab]:
    made = []
    for seed, each in enumerate(blocks):
        slab = KvSlab(each.config, CAPACITY, each.dtype, CPU)
        slab.keys.copy_(random(tuple(slab.keys.shape), seed))
        slab.values.copy_(random(tuple(slab.values.shape), seed + 100))
        made.append(slab)
    return made


def segments(counts: tuple[int, ...]) -> list[Segment]:
    """Every other sequence lies in two runs, and its new tokens in both."""
    made = []
    for index, count in enumerate(counts):
        if index % 2:
            runs = [Run(0, 80 * index, 10), Run(10, 5400 + 40 * index, 40)]
            made.append(Segment(Extent(runs, 9), 9, count))
        else:
            made.append(Segment(Extent([Run(0, 80 * index, 60)], 40), 40, count))
    return made


def one_by_one(blocks: list[Block], x: torch.Tensor, kvs: list[KvSlab], where: list[Segment]) -> torch.Tensor:
    with torch.inference_mode():
        layout = Layout(where, CPU, blocks[0].dtype)
        for each, kv in zip(blocks, kvs, strict=True):
            x = each.run(x, kv, layout, each.rotations_of(layout))
    return x


class Calls:
    """How many there were of `run_blocks`, which is still called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, compiled = 0, kernels.compiled

        def counted(*numbers: int) -> None:
            self.count += 1
            compiled.run_blocks(*numbers)

        class Counting:
            run_blocks = staticmethod(counted)

        monkeypatch.setattr(stack, "compiled", Counting)


def run(made: Stack, x: torch.Tensor, kvs: Any, where: list[Segment]) -> torch.Tensor:
    with torch.inference_mode():
        return made.run(x, Kvs(kvs), where)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("counts", FEW, ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_few_rows_take_one_call_and_have_the_bits_of_many(
    precision: str, config: BlockConfig, counts: tuple[int, ...], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    blocks = [block(config, precision, seed) for seed in (0, 50, 70)]
    ours, theirs, where, calls = slabs(blocks), slabs(blocks), segments(counts), Calls(monkeypatch)
    x = random((sum(counts), WIDTH), 5).to(blocks[0].dtype)
    before = x.clone()
    got = run(Stack(blocks), x, ours, where)
    assert calls.count == 1
    assert torch.equal(got, one_by_one(blocks, x, theirs, where))
    assert torch.equal(x, before)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.values, other.values)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_several_threads_share_products_of_large_blocks(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(LARGE, family="qwen3", qk_norm=True, folded=True)
    blocks = [block(config, precision, seed) for seed in (0, 50)]
    x, calls = random((3, config.hidden_size), 5).to(blocks[0].dtype), Calls(monkeypatch)
    expected = one_by_one(blocks, x, slabs(blocks), segments((1, 2)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(run(Stack(blocks), x, slabs(blocks), segments((1, 2))), expected)
    assert calls.count == 1


@pytest.mark.skipif("int8" not in PRECISIONS, reason="this processor has no kernels for int8")
@pytest.mark.parametrize(("counts", "at_once"), [((8,) * 8, 1), ((8,) * 8 + (1,), 0)], ids=["64", "65"])
def test_int8_takes_as_many_rows_as_its_kernel(
    counts: tuple[int, ...], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a block whose inputs are no whole words."""
    config = replace(LLAMA, hidden_size=65, intermediate_size=99)
    blocks, calls = [block(config, "int8", seed) for seed in (0, 50)], Calls(monkeypatch)
    x, where = random((sum(counts), 65), 5), segments(counts)
    assert torch.equal(run(Stack(blocks), x, slabs(blocks), where), one_by_one(blocks, x, slabs(blocks), where))
    assert calls.count == at_once


@pytest.mark.skipif("float32" not in kernels.SUPPORTED, reason="this processor has no kernels")
def test_rows_that_lie_apart_are_read_where_they_are() -> None:
    blocks, x = [block(LLAMA, "float32", 0)], random((WIDTH, 4), 5).T
    got = run(Stack(blocks), x, slabs(blocks), segments((4,)))
    assert torch.equal(got, one_by_one(blocks, x.contiguous(), slabs(blocks), segments((4,))))


@pytest.mark.skipif("float32" not in kernels.SUPPORTED, reason="this processor has no kernels")
def test_blocks_of_several_kinds_take_their_own_rotations_and_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    far = replace(LLAMA, rope=RopeConfig(1e6))
    rotary = Rotary(LLAMA, torch.float32, CPU)
    blocks = [block(LLAMA, "float32", 0, rotary), block(replace(LLAMA, sliding_window=7), "float32", 1, rotary)]
    blocks += [block(far, "float32", 2), block(replace(LLAMA, num_heads=2, intermediate_size=32), "float32", 3, rotary)]
    ours, theirs, where, calls = slabs(blocks), slabs(blocks), segments((1, 2, 1)), Calls(monkeypatch)
    x = random((4, WIDTH), 6)
    assert torch.equal(run(Stack(blocks), x, ours, where), one_by_one(blocks, x, theirs, where))
    assert calls.count == 1


@pytest.mark.skipif("float32" not in kernels.SUPPORTED, reason="this processor has no kernels")
@pytest.mark.parametrize(
    ("precision", "most"),
    [("float32", ALONE_FLOAT32_ROWS_MAX), ("int8", ALONE_FLOAT32_ROWS_MAX), ("bfloat16", ALONE_ROWS_MAX)],
)
def test_more_rows_go_block_by_block(precision: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if precision not in PRECISIONS:
        pytest.skip("this processor has no kernels for it")
    blocks, calls = [block(LLAMA, precision, seed) for seed in (0, 50)], Calls(monkeypatch)
    rows_max = FLOAT_ROWS_MAX if precision != "int8" else INT8_ROWS_MAX
    for counts, at_once in (((2, most), 1), ((most + 1,), 0), ((2, most + 1), 0), ((1,) * (rows_max + 1), 0)):
        x, where = random((sum(counts), WIDTH), 5).to(blocks[0].dtype), segments(counts)
        expected = one_by_one(blocks, x, slabs(blocks), where)
        calls.count = 0
        assert torch.equal(run(Stack(blocks), x, slabs(blocks), where), expected)
        assert calls.count == at_once, counts


@pytest.mark.skipif("float32" not in kernels.SUPPORTED, reason="this processor has no kernels")
def test_what_kernels_cannot_read_goes_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of two precisions, and a head that is too wide."""
    calls, where = Calls(monkeypatch), segments((1,))
    plain, wide = block(LLAMA, "float32", 0), block(replace(LLAMA, head_dim=514), "float32", 0)
    x = random((1, WIDTH), 5)
    for blocks in ([plain, block(LLAMA, "int8", 1)], [wide]):
        got = run(Stack(blocks), x, slabs(blocks), where)
        assert torch.equal(got, one_by_one(blocks, x, slabs(blocks), where))
    assert calls.count == 0


class Cache:
    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.keys, self.values = keys, values


def cache(tokens: int, dtype: torch.dtype = torch.float32) -> Cache:
    return Cache(torch.zeros(2, tokens, 16, dtype=dtype), torch.zeros(2, tokens, 16, dtype=dtype))


def test_caches_that_kernels_would_misread_are_refused() -> None:
    keys = torch.zeros(2, 8, 16)
    apart = [Cache(keys, torch.zeros(shape)[:, :, :16]) for shape in ((2, 8, 32), (2, 9, 16), (2, 8, 8))]
    apart += [Cache(torch.zeros(2, 8, 32)[:, :, ::2], torch.zeros(2, 8, 32)[:, :, ::2])]
    for one in apart:
        with pytest.raises(ValueError, match="lie otherwise"):
            Kvs([one])
    for others in ([Cache(keys, keys.bfloat16())], [cache(8), cache(8, torch.bfloat16)]):
        with pytest.raises(ValueError, match="differ in precision"):
            Kvs(others)
    with pytest.raises(ValueError, match="caches of 7 and 8 tokens"):
        Kvs([cache(8), cache(7)])


def test_sequences_beyond_the_caches_and_caches_without_a_block_are_refused() -> None:
    made, x = Stack([block(LLAMA, "float32", 0)]), torch.zeros(1, WIDTH)
    made.check(x, Kvs([cache(8)]), [Segment(Extent([Run(0, 2, 6)], 3), 3, 1)])
    with pytest.raises(ValueError, match="2 caches for 1 blocks"):
        made.check(x, Kvs([cache(8)] * 2), [Segment(Extent([Run(0, 2, 6)], 3), 3, 1)])
    for runs in ([Run(0, 3, 6)], [Run(0, 0, 4), Run(4, 8, 1)], [Run(0, -1, 6)]):
        with pytest.raises(ValueError, match="in caches of 8 tokens"):
            made.check(x, Kvs([cache(8)]), [Segment(Extent(runs, 3), 3, 1)])


def test_a_rotary_table_of_other_blocks_is_refused() -> None:
    for table in (Rotary(LLAMA, torch.bfloat16, CPU), Rotary(replace(LLAMA, head_dim=32), torch.float32, CPU)):
        with pytest.raises(ModelError, match="rotary table"):
            block(LLAMA, "float32", 0, table)


@pytest.mark.skipif("float32" not in kernels.SUPPORTED, reason="this processor has no kernels")
def test_shapes_that_do_not_fit_each_other_are_refused() -> None:
    made = Stack([block(LLAMA, "float32", 0)])
    numbers, zeros = array("q", made._numbers), array("q", [0] * 8)
    fields = (4, 5, 10, 11, 16, 17, 22, 23)  # inputs and outputs of the four maps; then heads, and their width
    wrongs = [(field, numbers[field] + 1) for field in fields]
    wrongs += [(field, value) for field in (28, 29, 30) for value in (-1, 0, 3, 514)]
    for field, value in wrongs:
        wrong = array("q", numbers)
        wrong[field] = value
        with pytest.raises(ValueError, match="no such blocks"):
            kernels.compiled.run_blocks(
                wrong.buffer_info()[0], zeros.buffer_info()[0], zeros.buffer_info()[0], 1, 0, 0, 0, 1, WIDTH, 0, 1
            )
    for rows, precision in ((0, 0), (kernels.ROWS_MAX + 1, 0), (1, 3), (1, -1)):
        with pytest.raises(ValueError, match="no such blocks"):
            kernels.compiled.run_blocks(numbers.buffer_info()[0], 0, 0, 1, 0, 0, 0, rows, WIDTH, precision, 1)
