from __future__ import annotations

import subprocess
import sys

import pytest
import trio

from simnet import runtime
from simnet.runtime import SeededEntropy, VirtualClock

PROGRAM = """
import trio
from simnet import runtime
order = []
async def worker(i):
    for _ in range(5):
        await trio.lowlevel.checkpoint()
        order.append(i)
async def main():
    async with trio.open_nursery() as nursery:
        for i in range(8):
            nursery.start_soon(worker, i)
runtime.run(main, seed=int({seed}))
print(order)
"""


def interleaving(seed):
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.format(seed=seed)], capture_output=True, text=True, check=True
    ).stdout


def test_a_seed_fixes_the_interleaving_in_every_process():
    assert interleaving(7) == interleaving(7) != interleaving(8)


def test_an_hour_passes_at_once_and_the_result_comes_back():
    async def main():
        before = VirtualClock().monotonic()
        await trio.sleep(3600)
        return VirtualClock().monotonic() - before

    assert runtime.run(main, seed=1) == pytest.approx(3600)


def test_clocks_differ_by_their_skew():
    async def main():
        return VirtualClock(skew_s=30).time() - VirtualClock().time(), VirtualClock().time()

    skew, now = runtime.run(main, seed=1)
    assert skew == 30
    assert now >= runtime.EPOCH_S


def test_trio_is_left_as_it_was_found_also_after_an_error():
    scheduler = trio._core._run
    before = scheduler._ALLOW_DETERMINISTIC_SCHEDULING, scheduler._r

    async def main():
        assert scheduler._ALLOW_DETERMINISTIC_SCHEDULING
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        runtime.run(main, seed=1)
    assert (scheduler._ALLOW_DETERMINISTIC_SCHEDULING, scheduler._r) == before


@pytest.mark.parametrize("name", ["_ALLOW_DETERMINISTIC_SCHEDULING", "_r"])
def test_a_trio_without_its_switches_is_refused(monkeypatch, name):
    async def main():
        pass

    monkeypatch.delattr(trio._core._run, name)
    with pytest.raises(RuntimeError, match=name):
        runtime.run(main, seed=1)


def test_entropy_repeats_with_its_seed_and_name():
    assert SeededEntropy(1, "a")(32) == SeededEntropy(1, "a")(32)
    assert len({SeededEntropy(1, "a")(32), SeededEntropy(1, "b")(32), SeededEntropy(2, "a")(32)}) == 3
    entropy = SeededEntropy(1)
    assert entropy(16) != entropy(16)
