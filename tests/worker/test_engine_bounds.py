"""What one forward may take of the engine: memory, whatever is asked of it at once, and time while others wait."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save

from models.stack import Stack
from protocol.errors import Refused
from protocol.ids import PeerId, SessionId
from protocol.messages import Operation, RefusalReason
from protocol.pieces import PieceList
from protocol.ports import SessionSpec, SpanSpec, StepResult
from protocol.signed import Identity
from protocol.tensors import INT8_BLOCKS
from tests.helpers.engines import CONFIG, SESSION, Shop, inputs, random_tensors, work
from tests.helpers.workers import make_manifest
from worker import payloads, runner
from worker.payloads import to_payload, to_tensor
from worker.runner import FloatBlocks, IntegerBlocks

OTHER = SessionId(b"o" * 16)
LINEAR = {"operation": Operation.LINEAR, "matrix": "k"}
INTEGERS = {name: torch.ones(shape, dtype=torch.int32) for name, shape in CONFIG.tensor_shapes().items()}


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path, [random_tensors(seed) for seed in range(2)])


def watched(monkeypatch: pytest.MonkeyPatch, where: type, name: str, x_at: int) -> list[int]:
    """The rows that each call of the method takes, whose argument `x_at` they are."""
    seen, method = list[int](), getattr(where, name)

    def call(*args: Any) -> Any:
        seen.append(len(args[x_at]))
        return method(*args)

    monkeypatch.setattr(where, name, call)
    return seen


def finished(shop: Shop, ended: list[StepResult | Exception]) -> list[torch.Tensor]:
    while not shop.engine.idle:
        shop.engine.advance()
    assert not [each for each in ended if isinstance(each, Exception)]
    return [to_tensor(each.forward) for each in ended if isinstance(each, StepResult)]


@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_a_linear_step_takes_no_more_memory_than_a_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    shop = Shop(tmp_path, [INTEGERS if dtype == "int32" else random_tensors(0)], dtype=dtype)
    shop.load()
    x = torch.arange(33 * 16, dtype=getattr(torch, dtype)).view(33, 16) % 7
    expected = shop.step(x, 0, **LINEAR)
    blocks = IntegerBlocks if dtype == "int32" else FloatBlocks
    seen = watched(monkeypatch, blocks, "linear", 3)
    # In float32 with what q and v make of a row, which are fused with k.
    row_bytes = 12 * 16 + 16 * 16 if dtype == "int32" else 2 * 4 * (16 + 64)
    monkeypatch.setattr(runner, "WORKSPACE_BYTES", 10 * row_bytes)
    torch.testing.assert_close(shop.step(x, 0, **LINEAR), expected, rtol=1e-6, atol=1e-6)
    assert seen == [10, 10, 10, 3]


def test_what_is_kept_of_a_step_is_its_own_rows(shop: Shop) -> None:
    shop.load()
    shop.engine._scheduler.rows_per_forward = 8
    shop.engine.open(OTHER, shop.spec(10))
    ended: list[StepResult | Exception] = []
    shop.engine.submit(work(inputs(20), 0), ended.append)
    shop.engine.submit(work(inputs(1), 0, session=OTHER), ended.append)
    shop.engine.advance()
    step = shop.engine._sessions[SESSION].step
    assert step is not None
    (rows,) = step.rows
    assert rows.untyped_storage().nbytes() == 7 * 16 * 4
    finished(shop, ended)


@pytest.mark.parametrize("terms", [{}, {"alone": True}, {"deterministic": True}], ids=str)
@pytest.mark.parametrize("operation", [LINEAR, {}], ids=["linear", "pass"])
def test_what_is_kept_of_all_steps_is_bounded(shop: Shop, terms: dict[str, Any], operation: dict[str, Any]) -> None:
    """However many sessions one client, or several, have: each forward could begin one more."""
    shop.load()
    shop.engine._scheduler.kept_bytes_max = most = 4 * 257 * 16 * 4
    sessions = [SessionId(bytes([number]) * 16) for number in range(20)]
    for number, session in enumerate(sessions):
        shop.engine.open(session, shop.spec(257, f"client {number % 5}", **terms))
    kept, ended = 0, list[StepResult | Exception]()
    for session in sessions:
        shop.engine.submit(work(inputs(257), 0, session=session, **operation), ended.append)
    for _ in range(20):
        shop.engine.advance()
        steps = [each.step for each in shop.engine._sessions.values() if each.step is not None]
        kept = max(kept, sum(rows.nbytes for step in steps for rows in step.rows))
    assert 256 * 16 * 4 <= kept <= most
    first, *others = finished(shop, ended)
    assert len(others) == 19
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-5, atol=1e-5)


def test_a_part_of_an_answer_that_finds_no_memory_fails_its_step_alone(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop.load()
    shop.engine._scheduler.rows_per_forward = 8
    shop.engine.open(OTHER, shop.spec(10))
    long, decode = list[StepResult | Exception](), list[StepResult | Exception]()
    shop.engine.submit(work(inputs(20), 0), long.append)
    shop.engine.submit(work(inputs(1), 0, session=OTHER), decode.append)

    def short_of_memory(*_: object) -> torch.Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "clone", short_of_memory)
        shop.engine.advance()
    assert isinstance(decode[0], StepResult)
    assert isinstance(long[0], Refused)
    assert long[0].reason == RefusalReason.MEMORY
    assert shop.engine.idle
    shop.engine.submit(work(inputs(20), 0), decode.append)
    assert len(finished(shop, decode)) == 2


def test_steps_of_several_sessions_take_no_more_memory_than_one(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.load()
    sessions = [SessionId(bytes([number]) * 16) for number in range(6)]
    for session in sessions:
        shop.engine.open(session, shop.spec(60))
    monkeypatch.setattr(runner, "WORKSPACE_BYTES", 60 * (4 * (4 * 16 + 3 * 64 + 4 * 24 + 4 * 50) + 50))
    seen = watched(monkeypatch, Stack, "run", 1)
    ended: list[StepResult | Exception] = []
    for session in sessions:
        shop.engine.submit(work(inputs(50), 0, session=session), ended.append)
    first, *others = finished(shop, ended)
    assert sum(seen) == 6 * 50
    assert max(seen) <= 60
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wire", [INT8_BLOCKS, "bfloat16", "float32"])
def test_a_step_that_waits_takes_what_it_took_on_the_way(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, wire: str
) -> None:
    shop.load()
    x, seen = to_payload(inputs(300), wire), list[int]()
    plain = shop.step(to_tensor(x).float(), 0)

    def widened(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(*args: Any, **given: Any) -> torch.Tensor:
            rows = make(*args, **given)
            seen.append(rows.numel() // 16)
            return rows

        return call

    monkeypatch.setattr(payloads, "from_blocks", widened(payloads.from_blocks))
    monkeypatch.setattr(torch, "frombuffer", widened(torch.frombuffer))
    ended: list[StepResult | Exception] = []
    shop.engine.submit(work(inputs(1), 0, payload=x), ended.append)
    assert not seen, "nothing is widened before it is computed"
    shop.engine.advance()
    assert max(seen) == 256
    (got,) = finished(shop, ended)
    monkeypatch.undo()
    assert torch.equal(got, to_tensor(to_payload(plain, wire)))


class Busy:
    """An engine over integer maps of one owner, whose rows take `row_s` seconds by its clock, and the model of another,
    whose rows take nothing."""

    def __init__(self, shop: Shop, monkeypatch: pytest.MonkeyPatch, row_s: float) -> None:
        self.shop, self.now = shop, 0.0
        self.seen: list[tuple[str, int]] = []
        monkeypatch.setattr("worker.engine.time", SimpleNamespace(perf_counter=lambda: self.now))
        linear, run = IntegerBlocks.linear, Stack.run

        def slow(blocks: IntegerBlocks, block: int, name: str, x: torch.Tensor) -> torch.Tensor:
            self.seen.append(("slow", len(x)))
            self.now += row_s * len(x)
            return linear(blocks, block, name, x)

        def quick(stack: Stack, x: torch.Tensor, *rest: Any) -> torch.Tensor:
            self.seen.append(("quick", len(x)))
            return run(stack, x, *rest)

        monkeypatch.setattr(IntegerBlocks, "linear", slow)
        monkeypatch.setattr(Stack, "run", quick)
        shop.load()
        shard = save(random_tensors(0))
        shop.path(PieceList.of_bytes(shard).digest).write_bytes(shard)
        _, self.other, _ = make_manifest(Identity(b"1" * 32), 1, shards=[shard], config=CONFIG)
        shop.engine.load(SpanSpec(self.other, 0, 1))
        self.seen.clear()
        self.ended: list[StepResult | Exception] = []

    def open(self, **terms: Any) -> None:
        spec = SessionSpec(self.other.deployment, PeerId("other"), PeerId("other"), 100, **terms)
        self.shop.engine.open(OTHER, spec)

    def decode(self, position: int) -> None:
        self.shop.engine.submit(work(inputs(1), position, session=OTHER), self.ended.append)

    def ask_much(self, rows: int, matrix: str = "k") -> None:
        step = work(torch.ones(rows, 16, dtype=torch.int32), 0, **(LINEAR | {"matrix": matrix}))
        self.shop.engine.submit(step, self.ended.append)


@pytest.mark.parametrize("terms", [{}, {"alone": True}, {"deterministic": True}])
def test_a_deployment_that_is_slow_keeps_nobody_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terms: dict[str, Any]
) -> None:
    busy = Busy(Shop(tmp_path, [INTEGERS], dtype="int32"), monkeypatch, row_s=1 / 8)
    engine, slow = busy.shop.engine, busy.shop
    engine.close(SESSION)
    engine.open(SESSION, slow.spec(600, **terms))  # sums of whole numbers are the same however they are cut
    busy.open()
    busy.decode(0)
    busy.ask_much(256)
    for position in range(1, 20):  # the other's next token comes a moment after each answer, when it has no work
        waited = busy.now
        while len(busy.ended) < position:
            engine.advance()
        assert busy.now - waited <= 0.5
        if position > 1:
            engine.advance()
        busy.decode(position)
    assert ("slow", 4) in busy.seen
    assert max(rows for _, rows in busy.seen) == 4
    finished(slow, busy.ended)


def test_choosing_what_runs_is_charged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client may have many steps wait, of a model that is made so that each is looked at for long."""
    busy = Busy(Shop(tmp_path, [INTEGERS], dtype="int32"), monkeypatch, row_s=1.0)
    engine, deployment = busy.shop.engine, busy.other.deployment
    rows_at_once = FloatBlocks.rows_at_once

    def slow(blocks: FloatBlocks, length: int) -> int:
        busy.now += 4.0
        return rows_at_once(blocks, length)

    monkeypatch.setattr(FloatBlocks, "rows_at_once", slow)
    busy.open()
    began = busy.now
    for _ in range(100):
        if engine._sessions[OTHER].step is None:
            busy.decode(busy.seen.count(("quick", 1)))
        if engine._sessions[SESSION].step is None:
            busy.ask_much(1)
        engine.advance()
    assert (busy.seen.count(("quick", 1)), busy.seen.count(("slow", 1))) == (20, 80), "four seconds, and one"
    charged = [engine._scheduler._shares.charged_s(each) for each in (deployment, busy.shop.manifest.deployment)]
    assert charged == [80.0, 80.0]
    assert busy.now - began == 160.0


def test_a_map_that_was_never_computed_is_tried_with_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each of many maps would keep others waiting once."""
    busy = Busy(Shop(tmp_path, [INTEGERS], dtype="int32"), monkeypatch, row_s=1 / 64)
    busy.open()
    busy.decode(0)
    busy.ask_much(256)
    finished(busy.shop, busy.ended)
    assert busy.seen == [("quick", 1), ("slow", 1), *[("slow", 32)] * 7, ("slow", 31)]
    busy.seen.clear()
    busy.ask_much(40, "v")
    finished(busy.shop, busy.ended)
    assert busy.seen == [("slow", 1), ("slow", 32), ("slow", 7)]


@pytest.mark.parametrize(
    ("terms", "rows"), [({}, [1]), ({"alone": True}, [40]), ({"deterministic": True}, [16])], ids=str
)
def test_rows_that_run_alone_are_cut_by_no_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terms: dict[str, Any], rows: list[int]
) -> None:
    """How they are cut may show in their bits."""
    busy = Busy(Shop(tmp_path, [INTEGERS], dtype="int32"), monkeypatch, row_s=1.0)
    seen = list[int]()
    for name in ("forward", "forward_tile"):
        method = getattr(FloatBlocks, name)

        def call(blocks: FloatBlocks, x: torch.Tensor, parts: Any, method: Any = method) -> torch.Tensor:
            seen.append(len(x))
            result: torch.Tensor = method(blocks, x, parts)
            return result

        monkeypatch.setattr(FloatBlocks, name, call)
    busy.open(**terms)
    busy.ask_much(256)
    busy.shop.engine.submit(work(inputs(40), 0, session=OTHER), busy.ended.append)
    busy.shop.engine.advance()
    busy.shop.engine.advance()
    assert seen == rows
