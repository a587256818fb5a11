"""The compiled kernels beside the same in float64: right to a few roundings, and each row for itself."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
import threading
from array import array

import pytest
import torch
import torch.nn.functional as F

from models import kernels, layout
from models.attention import attend, attend_batch
from models.config import BlockConfig, RopeConfig
from models.kernels import attended, fits, gated, mixed, normalised, turned
from models.layout import Layout, Segment
from models.linear import Linear
from models.pages import Extent, KvSlab, Run

pytestmark = pytest.mark.skipif("float32" not in kernels.SUPPORTED, reason="this processor has no kernels")
FLOATS = [dtype for dtype in (torch.float32, torch.bfloat16) if str(dtype)[6:] in kernels.SUPPORTED]
CPU = torch.device("cpu")


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def close(got: torch.Tensor, exact: torch.Tensor, roundings: int) -> bool:
    """Within so many roundings of the largest number of its row."""
    largest = exact.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    return bool(((got.double() - exact).abs() <= roundings * torch.finfo(got.dtype).eps * largest).all())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [1, 5, 16, 33, 64, 768])
def test_norm_and_gate_are_their_formulas_row_by_row(width: int, dtype: torch.dtype) -> None:
    x = 3 * random(5, 2 * width, dtype=dtype)
    wide = x.double()
    assert close(normalised(x, 1e-5), wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt(), 2)
    assert torch.equal(normalised(x[3:4], 1e-5), normalised(x, 1e-5)[3:4])
    assert close(gated(x), F.silu(wide[:, :width]) * wide[:, width:], 4)
    assert torch.equal(gated(x[3:4]), gated(x)[3:4])
    assert torch.equal(gated(x[:, ::2].contiguous()), gated(x[:, ::2])) or width % 2, "however it lies"


def test_a_gate_of_bfloat16_is_rounded_where_torchs_is() -> None:
    """But for an exponential that is the other way by half a unit, now and then."""
    both = 3 * random(16, 2048, dtype=torch.bfloat16)
    torchs = F.silu(both[:, :1024]) * both[:, 1024:]
    assert both.dtype not in FLOATS or (gated(both) == torchs).float().mean() > 0.99


@pytest.mark.parametrize("value", [-math.inf, -1e30, -200.0, -90.0, -0.0, 90.0, 1e30, math.inf, math.nan])
def test_a_gate_of_extreme_numbers_is_torchs(value: float) -> None:
    both = torch.tensor([[value, 1.0]])
    torch.testing.assert_close(gated(both), F.silu(both[:, :1]), equal_nan=True, rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [2, 8, 64, 80, 128])
def test_heads_are_turned_to_the_bits_of_torch(width: int, dtype: torch.dtype) -> None:
    rows = random(3, 4 * width, dtype=dtype)
    heads = rows.view(3, 4, width).transpose(0, 1)
    cos, sin = random(3, width, dtype=dtype), random(3, width + 1, dtype=dtype)[:, :width]
    expected = (heads * cos).add_(heads.roll(width // 2, -1).mul_(sin))
    assert torch.equal(turned(heads, cos, sin), expected)
    with pytest.raises(ValueError, match="do not fit"):
        turned(heads, cos[:2], sin)
    for wrong in ((cos.double(), sin), (cos, sin.double()), (cos[:, :1], sin[:, :1])):
        with pytest.raises(ValueError, match="do not fit"):
            turned(heads, *wrong)
    with pytest.raises(ValueError, match="do not fit"):
        turned(heads[:, :, 1:], cos[:, 1:], sin[:, 1:])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("width", "threads"), [(2, 1), (24, 1), (64, 1), (80, 1), (512, 1), (512, 3)])
def test_heads_are_multiplied_each_by_its_own_matrix(
    width: int, threads: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    heads, matrices = random(3, 13, width, dtype=dtype), random(3, width, width, dtype=dtype)
    before = heads.clone()
    got = mixed(heads, matrices)
    assert close(got, torch.bmm(heads.double(), matrices.double()), 16)
    assert torch.equal(heads, before)
    for row in range(13):
        assert torch.equal(mixed(heads[:, row : row + 1], matrices), got[:, row : row + 1])
    for wrong in (matrices[:2], matrices.double(), matrices.transpose(1, 2)):
        with pytest.raises(ValueError, match="do not fit"):
            mixed(heads, wrong)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("heads", "key_heads", "width"),
    [(1, 1, 2), (4, 4, 8), (6, 2, 24), (3, 1, 64), (16, 2, 80), (7, 1, 128), (2, 1, 512)],
)
def test_rows_are_attended_as_if_each_were_alone(
    heads: int, key_heads: int, width: int, dtype: torch.dtype, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    config = BlockConfig("llama", heads * width, 48, heads, key_heads, width, 1e-6, 1024, RopeConfig(1e4))
    slab = KvSlab(config, 1024, dtype, CPU)
    slab.keys.copy_(2 * random(*slab.keys.shape))
    slab.values.copy_(random(*slab.values.shape))
    # 1, 127 to 129 and 300 tokens: less than a piece, a piece and one more, pieces; the last in three runs
    runs = [[Run(0, 0, 1)], [Run(0, 10, 127)], [Run(0, 200, 128)], [Run(0, 400, 129)]]
    runs.append([Run(0, 700, 100), Run(100, 600, 60), Run(160, 850, 140)])
    lengths = [1, 127, 128, 129, 300]
    queries = 2 * random(heads, len(lengths), width, dtype=dtype)
    segments = [Segment(Extent(each, n), n - 1, 1) for each, n in zip(runs, lengths, strict=True)]
    plan = Layout(segments, CPU, dtype).plan(slab.keys, 0)
    assert plan.alone is not None
    got = attend_batch(queries, slab, Layout(segments, CPU, dtype), 0).view(len(lengths), heads, width)
    for row, segment in enumerate(segments):
        places = segment.extent.places(0, lengths[row])
        keys, values = (torch.cat([t[:, at : at + n] for at, n in places], 1) for t in (slab.keys, slab.values))
        exact = attend(queries[:, row : row + 1].double(), keys.double(), values.double(), 0)[:, 0]
        assert (got[row].double() - exact).abs().max() < 8 * torch.finfo(dtype).eps * values.abs().max()
        alone = attend_batch(queries[:, row : row + 1], slab, Layout([segment], CPU, dtype), 0).view(heads, width)
        assert torch.equal(got[row], alone)


@pytest.mark.parametrize("window", [0, 1, 3, 50])
@pytest.mark.parametrize("count", [1, 2, layout.ALONE_FLOAT32_ROWS_MAX, layout.ALONE_FLOAT32_ROWS_MAX + 1])
def test_a_few_rows_of_a_sequence_see_what_lies_before_each(count: int, window: int) -> None:
    config = BlockConfig("llama", 64, 48, 4, 2, 16, 1e-6, 1024, RopeConfig(1e4))
    slab = KvSlab(config, 64, torch.float32, CPU)
    slab.keys.copy_(random(*slab.keys.shape))
    slab.values.copy_(random(*slab.values.shape))
    queries = random(4, count + 1, 16)
    segments = [Segment(Extent([Run(0, 40, 20)], 20), 19, 1), Segment(Extent([Run(0, 3, 30)], 30), 30 - count, count)]
    got = attend_batch(queries, slab, Layout(segments, CPU, torch.float32), window)
    plan = Layout(segments, CPU, torch.float32).plan(slab.keys, window)
    assert plan.alone is not None
    assert [read.count for read in plan.apart] == ([count] if count > layout.ALONE_FLOAT32_ROWS_MAX else [])
    expected = attend(queries[:, 1:].double(), slab.keys[:, 3:33].double(), slab.values[:, 3:33].double(), window)
    torch.testing.assert_close(got[1:].double(), expected.transpose(0, 1).reshape(count, -1), rtol=0, atol=1e-5)


def test_a_score_that_is_no_number_is_not_hidden() -> None:
    keys, values, places = random(1, 40, 16), random(1, 40, 16), array("q", (0, 40))
    reads, queries = array("q", (0, 0, 1)), random(2, 1, 16)
    keys[0, 5, 3] = math.nan
    assert bool(attended(queries, keys, values, reads, places, 40).isnan().all())
    keys[0, 5, 3], values[0, 39, 2] = 1e30, math.nan
    assert attended(queries, keys, values, reads, places, 40).isnan().any(1).any(1).tolist() == [True]


def test_scores_far_apart_are_weighed_from_the_largest() -> None:
    """The largest comes last, in another piece: what came before fades to nothing."""
    keys, values = torch.zeros(1, 300, 16), random(1, 300, 16)
    keys[0, :299, 0], keys[0, 299, 0] = -1000.0, 1000.0
    query = torch.zeros(1, 1, 16)
    query[0, 0, 0] = 4.0
    got = attended(query, keys, values, array("q", (0, 0, 1)), array("q", (0, 300)), 300)
    assert torch.equal(got[0, 0], values[0, 299])


def test_bits_do_not_depend_on_where_keys_lie() -> None:
    """Runs that end within a piece, at its end, and one token before."""
    keys, values, query = random(2, 900, 24), random(2, 900, 24), random(4, 1, 24)
    reads, whole = array("q", (0, 0, 1)), array("q", (7, 400))
    expected = attended(query, keys, values, reads, whole, 400)
    for lengths in ([64, 336], [128, 1, 271], [127, 128, 145], [1] * 400):
        moved_keys, moved_values, at, end = keys.clone(), values.clone(), 7, 900
        places: list[tuple[int, int]] = []
        for length in lengths:
            end -= length
            places.append((end, length))
        for start, length in places:
            moved_keys[:, start : start + length] = keys[:, at : at + length]
            moved_values[:, start : start + length] = values[:, at : at + length]
            at += length
        reads_all = array("q", (0, 0, len(places)))
        assert torch.equal(
            attended(query, moved_keys, moved_values, reads_all, array("q", itertools.chain(*places)), 400), expected
        )


def test_first_scores_of_minus_infinity_do_not_spoil_later_ones() -> None:
    keys, values, query = torch.zeros(1, 129, 16), random(1, 129, 16), torch.zeros(1, 1, 16)
    query[0, 0, 0], keys[0, :128, 0] = 1e20, -1e20
    got = attended(query, keys, values, array("q", (0, 0, 1)), array("q", (0, 129)), 129)
    assert torch.equal(got[0, 0], values[0, 128])


def test_several_threads_may_compute_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    layer, keys, values = Linear(random(1024, 256)), random(2, 600, 64), random(2, 600, 64)
    reads, places = array("q", (0, 0, 1)), array("q", (0, 600))
    inputs = [(random(3, 256) + each, random(4, 1, 64) + each) for each in range(4)]
    expected = [(layer(x), attended(query, keys, values, reads, places, 600)) for x, query in inputs]
    wrong: list[int] = []

    def work(index: int) -> None:
        x, query = inputs[index]
        for _ in range(50):
            got = layer(x), attended(query, keys, values, reads, places, 600)
            if not all(torch.equal(*pair) for pair in zip(got, expected[index], strict=True)):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_other_threads_go_on_during_a_long_call() -> None:
    both, y, done, turns = torch.zeros(64, 1 << 19), torch.zeros(64, 1 << 18), threading.Event(), [0]

    def count() -> None:
        while not done.is_set():
            turns[0] += 1
            done.wait(1e-4)

    thread = threading.Thread(target=count)
    thread.start()
    try:
        before = turns[0]
        kernels.compiled.gate(both.data_ptr(), y.data_ptr(), 64, 1 << 18, False)  # alone: torch lets others go on
        during = turns[0] - before
    finally:
        done.set()
        thread.join()
    assert during > 3


def test_teams_are_of_one_size() -> None:
    """Or OpenMP would end threads and start others, between the products of one token."""
    script = """
import os, torch
from array import array
torch.set_num_threads(4)
from models.kernels import attended
from models.linear import Linear
layer, x = Linear(torch.rand(2048, 512) - 0.5), torch.rand(1, 512)
keys, query = torch.rand(2, 2048, 64), torch.rand(4, 1, 64)
layer(x)
before = set(os.listdir("/proc/self/task"))
for _ in range(3):
    attended(query, keys, keys, array("q", (0, 0, 1)), array("q", (0, 2048)), 2048)
    layer(x)
assert len(before) > 3, before
assert set(os.listdir("/proc/self/task")) == before
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr


def test_what_lies_otherwise_is_refused() -> None:
    reads, places, query = array("q", (0, 0, 1)), array("q", (0, 4)), random(2, 1, 16)
    for keys, values in (
        (random(1, 8, 32)[:, :, ::2], random(1, 8, 32)[:, :, ::2]),
        (random(1, 8, 16), random(1, 8, 17)[:, :, :16]),
        (random(1, 8, 8), random(1, 8, 8)),
        (random(1, 8, 16), random(1, 9, 16)),
        (random(1, 8, 16, dtype=torch.float64), random(1, 8, 16, dtype=torch.float64)),
    ):
        with pytest.raises(ValueError, match="lie otherwise"):
            attended(query, keys, values, reads, places, 4)
    for wrong in ((array("i", reads), places), (reads, array("d", places)), (reads[:2], places)):
        with pytest.raises(ValueError, match="places are written otherwise"):
            attended(query, random(1, 8, 16), random(1, 8, 16), *wrong, 4)
    with pytest.raises(ValueError, match="queries lie otherwise"):
        attended(random(3, 2, 16).transpose(0, 1), random(1, 8, 16), random(1, 8, 16), reads, places, 4)
    with pytest.raises(ValueError, match="no such attention"):
        attended(random(2, 1, 513), random(1, 8, 513), random(1, 8, 513), reads, places, 4)


def test_only_small_tensors_on_a_cpu_in_what_the_processor_has_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fits(torch.zeros(8, 64))
    assert not fits(torch.zeros(8, 64, dtype=torch.float64))
    assert not fits(torch.zeros(8, 64, dtype=torch.float16))
    assert fits(torch.zeros(kernels.NUMBERS_MAX + 1)), "where torch has one thread, too"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert not fits(torch.zeros(kernels.NUMBERS_MAX + 1))
    assert fits(torch.zeros(kernels.NUMBERS_MAX))
    assert not fits(torch.zeros(8, 64, device="meta"))
