"""One block against a plain spelling of its mathematics; its cache; what it refuses."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from models.attention import KvCache, attend
from models.blocks import Block, check_tensors
from models.config import BlockConfig
from models.errors import ContextExceeded, ModelError
from models.rope import Rotary
from tests.helpers.blocks import CONFIG, random_tensors

pytestmark = pytest.mark.usefixtures("in_both_ways")


def inputs(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, 24, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(config: BlockConfig, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    return Block(config, tensors).forward(x, KvCache(config, len(x), x.dtype), 0)


def spelled_attention(queries: Tensor, keys: Tensor, values: Tensor, window: int) -> Tensor:
    """Attention one query at a time, as the definition says."""
    group, (count, length) = len(queries) // len(keys), (queries.shape[1], keys.shape[1])
    out = torch.empty_like(queries)
    for head in range(len(queries)):
        for row in range(count):
            last = length - count + row
            first = max(0, last + 1 - window) if window else 0
            seen = slice(first, last + 1)
            scores = keys[head // group, seen] @ queries[head, row] / math.sqrt(queries.shape[2])
            out[head, row] = scores.softmax(0) @ values[head // group, seen]
    return out


SPANS = [(1, 9, 0), (1, 9, 3), (9, 9, 0), (4, 9, 0), (9, 9, 3), (4, 9, 3), (4, 9, 9), (9, 9, 20)]


@pytest.mark.parametrize("num_keys", [1, 2, 6])
@pytest.mark.parametrize(("count", "length", "window"), SPANS)
def test_attention_is_its_definition(num_keys: int, count: int, length: int, window: int) -> None:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(6, count, 8, generator=generator, dtype=torch.float64)
    keys, values = torch.randn(2, num_keys, length, 8, generator=generator, dtype=torch.float64)
    expected = spelled_attention(queries, keys, values, window)
    torch.testing.assert_close(attend(queries, keys, values, window), expected, rtol=0, atol=1e-12)


def folded_from(config: BlockConfig, plain: dict[str, Tensor]) -> tuple[BlockConfig, dict[str, Tensor]]:
    """The same block with its gains folded into what follows them; head gains become diagonal matrices."""
    tensors = {name: tensor for name, tensor in plain.items() if not name.endswith("_norm")}
    for name in ("q", "k", "v"):
        tensors[name] = plain[name] * plain["attn_norm"]
    for name in ("gate", "up"):
        tensors[name] = plain[name] * plain["mlp_norm"]
    for side, heads in (("q", config.num_heads), ("k", config.num_kv_heads)):
        if config.qk_norm:
            tensors[f"{side}_post"] = torch.diag(plain[f"{side}_norm"]).expand(heads, -1, -1).contiguous()
    return dataclasses.replace(config, folded=True), tensors


@pytest.mark.parametrize("qk_norm", [False, True])
def test_the_folded_form_computes_the_same(qk_norm: bool) -> None:
    config = dataclasses.replace(CONFIG, qk_norm=qk_norm)
    plain = random_tensors(config)
    expected = run(config, plain, inputs(12))
    torch.testing.assert_close(run(*folded_from(config, plain), inputs(12)), expected, rtol=0, atol=1e-12)


def test_head_matrices_multiply_row_vectors_head_by_head() -> None:
    """norm(y U) = norm(y) U for orthogonal U: turning each head's rows and undoing it in its matrix changes nothing."""
    config, tensors = folded_from(CONFIG, random_tensors(CONFIG))
    changed = dict(tensors)
    for seed, (side, heads) in enumerate((("q", config.num_heads), ("k", config.num_kv_heads))):
        noise = torch.randn(heads, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        undo = torch.linalg.qr(noise).Q.transpose(1, 2)
        changed[side] = (undo @ tensors[side].view(heads, 8, 24)).reshape(heads * 8, 24)
        changed[f"{side}_post"] = undo @ tensors[f"{side}_post"]
    expected = run(config, tensors, inputs(12))
    torch.testing.assert_close(run(config, changed, inputs(12)), expected, rtol=0, atol=1e-12)
    assert (changed["q_post"] - tensors["q_post"]).abs().max() > 0.1


@pytest.mark.parametrize("flag", ["q_bias", "k_bias", "v_bias", "o_bias", "mlp_bias"])
def test_every_bias_counts_alone(flag: str) -> None:
    """A flag alone with zero biases changes nothing; with biases it changes the output."""
    config = dataclasses.replace(CONFIG, qk_norm=False, **{flag: True})
    tensors = random_tensors(config)
    zeroed = {name: torch.zeros_like(t) if name.endswith("_bias") else t for name, t in tensors.items()}
    without = {name: tensor for name, tensor in tensors.items() if not name.endswith("_bias")}
    bare = run(dataclasses.replace(config, **{flag: False}), without, inputs(12))
    torch.testing.assert_close(run(config, zeroed, inputs(12)), bare, rtol=0, atol=1e-14)
    assert (run(config, tensors, inputs(12)) - bare).abs().max() > 1e-3


def test_value_bias_equals_the_same_bias_after_the_output_matrix() -> None:
    """Attention weights sum to one: b_v can move into b_o. Sealing relies on this."""
    config = dataclasses.replace(CONFIG, v_bias=True)
    tensors = random_tensors(config)
    moved = {name: tensor for name, tensor in tensors.items() if name != "v_bias"}
    moved["o_bias"] = tensors["o"] @ tensors["v_bias"].view(2, 1, 8).expand(2, 3, 8).reshape(-1)
    after = run(dataclasses.replace(config, v_bias=False, o_bias=True), moved, inputs(12))
    torch.testing.assert_close(after, run(config, tensors, inputs(12)), rtol=0, atol=1e-12)


def test_a_sliding_window_forgets_and_still_allows_rollback() -> None:
    config = dataclasses.replace(CONFIG, sliding_window=3)
    tensors, x = random_tensors(config), inputs(20)
    block, kv = Block(config, tensors), KvCache(config, 20, torch.float64)
    whole = block.forward(x, kv, 0)
    changed = torch.cat([inputs(10, seed=5), x[10:]])
    # the last query sees tokens 17, 18 and 19 only
    torch.testing.assert_close(run(config, tensors, changed)[-1], whole[-1], rtol=0, atol=1e-12)
    for position in (4, 11, 0):
        torch.testing.assert_close(block.forward(x[position:], kv, position), whole[position:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_block_runs_in_the_dtype_that_is_asked_for(dtype: torch.dtype) -> None:
    block = Block(CONFIG, random_tensors(CONFIG), dtype=dtype)
    kv = KvCache(CONFIG, 16, dtype)
    x = inputs(12).to(dtype)
    out = torch.cat([block.forward(x[:8], kv, 0), block.forward(x[8:], kv, 8)])
    expected = run(CONFIG, random_tensors(CONFIG), x.double())
    assert out.dtype == block.dtype == dtype
    assert (out.double() - expected).abs().max() < 64 * torch.finfo(dtype).eps


def test_single_matrices_are_found_in_the_fused_ones() -> None:
    tensors = random_tensors(CONFIG)
    block = Block(CONFIG, tensors)
    for name in ("q", "k", "v", "o", "gate", "up", "down"):
        x = torch.randn(3, tensors[name].shape[1], generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        torch.testing.assert_close(block.linear(name, x), x @ tensors[name].T, rtol=0, atol=1e-12)
    with pytest.raises(KeyError):
        block.linear("q_norm", inputs(1))


def test_blocks_may_share_a_rotary_table() -> None:
    tensors, x = random_tensors(CONFIG), inputs(12)
    shared = Rotary(CONFIG, torch.float64, torch.device("cpu"))
    kv = KvCache(CONFIG, 12, torch.float64)
    assert torch.equal(Block(CONFIG, tensors, rotary=shared).forward(x, kv, 0), run(CONFIG, tensors, x))


def test_a_refused_step_leaves_the_cache_as_it_was() -> None:
    block = Block(CONFIG, random_tensors(CONFIG))
    kv = KvCache(CONFIG, 10, torch.float64)
    whole = block.forward(inputs(8), kv, 0)
    refused: list[tuple[type[Exception], Tensor, int]] = [
        (ValueError, inputs(1), 9),  # a hole
        (ValueError, inputs(1), -1),
        (ValueError, inputs(3), 8),  # more than the cache holds
        (ValueError, inputs(8), 4),
        (ContextExceeded, inputs(61), 4),
        (ValueError, inputs(1).float(), 8),
        (ValueError, inputs(1)[0], 8),
        (ValueError, inputs(0), 8),
        (ValueError, inputs(1)[:, :-1], 8),
    ]
    for error, x, position in refused:
        with pytest.raises(error):
            block.forward(x, kv, position)
        assert kv.length == 8
    torch.testing.assert_close(block.forward(inputs(8)[5:], kv, 5), whole[5:], rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="the block runs in"):
        block.forward(inputs(1), KvCache(CONFIG, 10, torch.float32), 0)
    with pytest.raises(ValueError, match="another shape"):
        block.forward(inputs(1), KvCache(dataclasses.replace(CONFIG, num_kv_heads=6), 10, torch.float64), 0)


def test_the_cache_takes_what_it_says() -> None:
    kv = KvCache(CONFIG, 10, torch.bfloat16)
    assert (kv.length, kv.capacity) == (0, 10)
    assert kv.keys.shape == kv.values.shape == (2, 10, 8)
    for capacity in (0, -1, CONFIG.max_position + 1):
        with pytest.raises(ValueError, match="capacity"):
            KvCache(CONFIG, capacity)
    with pytest.raises(ValueError, match="cached"):
        kv.truncate(1)


def test_tensors_must_be_exactly_those_of_the_config() -> None:
    good = random_tensors(CONFIG)
    wrong: list[dict[str, Tensor]] = [
        {name: tensor for name, tensor in good.items() if name != "o"},
        good | {"extra": good["o"]},
        good | {"o": good["o"][:, :-1]},
        good | {"o": good["o"].to(torch.int32)},
        good | {"attn_norm": good["attn_norm"][None]},
        good | {"o": good["o"].float()},
    ]
    check_tensors(CONFIG, good)
    for tensors in wrong:
        with pytest.raises(ModelError):
            Block(CONFIG, tensors)
