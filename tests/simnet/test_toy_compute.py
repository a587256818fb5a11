"""The toy engine: whatever way a sequence is cut, one answer; whatever is lost, repeated or misordered, another."""

from __future__ import annotations

import numpy as np
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import LocalProtocolError, Refused
from protocol.ids import PeerId, SessionId
from protocol.messages import Operation
from protocol.ports import SessionSpec, SpanSpec, StepWork
from protocol.tensors import Payload, TensorHeader
from simnet.compute import CostModel, Rows, ToyCompute, apply_block, toy_answer
from simnet.runtime import run
from tests.helpers.workers import identity, make_manifest, some_rows

SESSION = SessionId(b"s" * 16)
ROWS = some_rows(12)


def work(rows: Rows, position: int, operation: Operation = Operation.SPAN) -> StepWork:
    payload = Payload(TensorHeader("float32", rows.shape), rows.tobytes())
    return StepWork(SESSION, position, operation, 0, "", payload, 0, "float32")


async def opened(cost: CostModel | None = None) -> ToyCompute:
    engine = ToyCompute(cost or CostModel())
    _, manifest, _ = make_manifest(identity("ann"), 3)
    await engine.load(SpanSpec(manifest, 1, 3))
    await engine.open(SESSION, SessionSpec(manifest.deployment, PeerId("client"), PeerId("tenant"), 12))
    return engine


@given(st.lists(st.integers(1, 5), min_size=1, max_size=8))
def test_any_cut_of_a_sequence_gives_one_answer(cuts: list[int]) -> None:
    kv: list[bytes] = []
    parts, at = [], 0
    for cut in cuts:
        piece = ROWS[at : at + cut]
        if len(piece):
            parts.append(apply_block(4, kv, at, piece))
            at += len(piece)
    np.testing.assert_array_equal(np.concatenate(parts), toy_answer([4], ROWS[:at]))
    np.testing.assert_array_equal(toy_answer([5], toy_answer([4], ROWS)), toy_answer([4, 5], ROWS))


@pytest.mark.parametrize(
    "wrong",
    [
        np.delete(ROWS, 3, axis=0),
        np.insert(ROWS, 3, ROWS[3], axis=0),
        ROWS[[0, 2, 1, *range(3, 12)]],
        ROWS + np.float32(1e-6) * (np.arange(12) == 0)[:, None].astype(np.float32),
    ],
    ids=["lost", "repeated", "misordered", "changed"],
)
def test_what_goes_wrong_early_shows_in_the_last_row(wrong: Rows) -> None:
    assert not np.array_equal(toy_answer([0], wrong)[-1], toy_answer([0], ROWS)[-1])


def test_answers_are_finite_and_depend_on_the_block() -> None:
    first, second = toy_answer([0], ROWS), toy_answer([1], ROWS)
    assert np.isfinite(first).all()
    assert np.abs(first).max() <= 1
    assert not np.array_equal(first, second)


def test_the_engine_rolls_back_and_returns_both_copies() -> None:
    async def main() -> None:
        engine = await opened()
        await engine.step(work(ROWS, 0))
        result = await engine.step(work(ROWS[4:], 4))
        np.testing.assert_array_equal(
            np.frombuffer(result.forward.data, "<f4").reshape(8, -1), toy_answer([1, 2], ROWS)[4:]
        )
        assert result.returned == result.forward
        assert engine.steps == 2

    run(main, 1)


def test_a_cancelled_step_still_happens_and_the_engine_stays_busy() -> None:
    async def main() -> None:
        engine = await opened(CostModel(load_s=0.0, step_s=10.0, block_position_s=0.0))
        with trio.move_on_after(1):
            await engine.step(work(ROWS[:4], 0))
        assert trio.current_time() == 1
        await engine.step(work(ROWS[4:], 4))
        assert trio.current_time() == 20
        await engine.close(SESSION)
        await engine.close(SESSION)
        assert not engine.sessions

    run(main, 1)


def test_misuse_is_loud() -> None:
    async def main() -> None:
        engine = await opened()
        (deployment,) = engine.spans
        with pytest.raises(LocalProtocolError):
            await engine.step(work(ROWS, 1))
        with pytest.raises(LocalProtocolError):
            await engine.open(SESSION, SessionSpec(deployment, PeerId("client"), PeerId("tenant"), 1))
        with pytest.raises(LocalProtocolError):
            await engine.unload(deployment)
        with pytest.raises(Refused):
            await engine.step(work(ROWS, 0, Operation.LINEAR))
        await engine.close(SESSION)
        with pytest.raises(LocalProtocolError):
            await engine.step(work(ROWS, 0))
        await engine.unload(deployment)
        assert not engine.spans

    run(main, 1)
