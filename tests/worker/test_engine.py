"""The engine against models.blocks, and against shards made to do harm."""

from __future__ import annotations

import dataclasses
import itertools
import random
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save

from models.attention import KvCache
from models.blocks import Block
from models.pages import KvSlab
from models.precision import MATRICES
from models.stack import Stack
from protocol.errors import LocalProtocolError, Refused
from protocol.ids import DeploymentId, SessionId
from protocol.messages import Operation, RefusalReason
from protocol.ports import SpanSpec, StepResult
from protocol.tensors import Payload, TensorHeader
from tests.helpers.engines import CONFIG, SESSION, Shop, direct, inputs, random_tensors, work
from worker import runner
from worker.payloads import to_payload, to_tensor
from worker.spans import read_span


def test_a_span_computes_what_its_blocks_compute(shop: Shop) -> None:
    shop.load(1, 3)
    x = inputs(7)
    assert torch.equal(shop.step(x, 0), direct(shop.blocks[1:], x))


def test_steps_and_rollback_give_one_answer(shop: Shop) -> None:
    shop.load(kv_tokens=141)
    x = inputs(141)
    whole = direct(shop.blocks, x)
    for start, end in [(0, 3), (3, 4), (4, 90), (9, 21), (0, 130), (130, 140), (140, 141), (64, 141), (63, 65)]:
        got = shop.step(x[start:end], start)
        torch.testing.assert_close(got, whole[start:end], rtol=1e-5, atol=1e-5)


def test_a_step_too_large_for_the_workspace_is_computed_in_parts(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.load()
    x = inputs(33)
    seen: list[int] = []
    forward = Stack.run

    def watched(self: Stack, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(len(x))
        return forward(self, x, *rest)

    monkeypatch.setattr(Stack, "run", watched)
    monkeypatch.setattr(runner, "WORKSPACE_BYTES", 16_000)
    got = shop.step(x, 0)
    assert len(seen) > 3
    assert max(seen) < 20
    monkeypatch.undo()
    torch.testing.assert_close(got, direct(shop.blocks, x), rtol=1e-5, atol=1e-5)


def test_the_tail_and_the_copy_for_the_client(shop: Shop) -> None:
    shop.load()
    x = inputs(5)
    result = shop.engine.step(work(x, 0, forward_tail=2, returns="bfloat16"))
    whole = direct(shop.blocks, x)
    assert torch.equal(to_tensor(result.forward), whole[-2:])
    assert result.returned is not None
    assert result.returned.header == TensorHeader("bfloat16", (5, 16))
    assert torch.equal(to_tensor(result.returned), whole.bfloat16())


@pytest.mark.parametrize("wire", ["float32", "bfloat16", "float16"])
def test_wire_dtypes_become_the_deployments(tmp_path: Path, wire: str) -> None:
    shop = Shop(tmp_path, [random_tensors(1, dtype=torch.bfloat16)], dtype="bfloat16")
    shop.load()
    x = inputs(4).to(getattr(torch, wire))
    result = shop.engine.step(work(x, 0))
    assert result.forward.header.dtype == "bfloat16"
    block = Block(CONFIG, shop.blocks[0])
    assert torch.equal(to_tensor(result.forward), block.forward(x.bfloat16(), KvCache(CONFIG, 4, torch.bfloat16), 0))


@pytest.mark.parametrize("name", MATRICES)
def test_a_linear_step_is_the_named_matrix(shop: Shop, name: str) -> None:
    shop.load(1, 3)
    weight = shop.blocks[2][name]
    x = torch.randn((3, weight.shape[1]), generator=torch.Generator().manual_seed(4))
    got = shop.step(x, 0, operation=Operation.LINEAR, block=2, matrix=name)
    torch.testing.assert_close(got, x @ weight.T, rtol=1e-6, atol=1e-6)
    assert shop.engine._sessions[SESSION].kv.length == 0, "stateless"  # type: ignore[union-attr]


def test_integer_maps_wrap(tmp_path: Path) -> None:
    low, high = -(1 << 31), (1 << 31) - 1
    generator = torch.Generator().manual_seed(2)
    tensors = {
        name: torch.randint(low, high, shape, generator=generator, dtype=torch.int32)
        for name, shape in CONFIG.tensor_shapes().items()
    }
    shop = Shop(tmp_path, [tensors], dtype="int32")
    shop.load()
    x = torch.randint(low, high, (2, 16), generator=generator, dtype=torch.int32)
    got = shop.step(x, 0, operation=Operation.LINEAR, block=0, matrix="gate")
    for row in range(2):
        for out in range(24):
            exact = sum(int(a) * int(b) for a, b in zip(x[row], tensors["gate"][out], strict=True))
            assert int(got[row, out]) == (exact + (1 << 31)) % (1 << 32) - (1 << 31)
    with pytest.raises(Refused, match="linear steps only"):
        shop.step(x, 0)
    with pytest.raises(Refused, match="unsupported"):
        shop.step(x.float(), 0, operation=Operation.LINEAR, block=0, matrix="gate")


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"payload": Payload(TensorHeader("float32", (1, 15)), bytes(60))}, RefusalReason.BAD_STEP),
        ({"payload": Payload(TensorHeader("int32", (1, 16)), bytes(64))}, RefusalReason.UNSUPPORTED),
        ({"payload": Payload(TensorHeader("int8", (1, 16)), bytes(16))}, RefusalReason.UNSUPPORTED),
        ({"operation": Operation.LINEAR, "matrix": "q_post"}, RefusalReason.BAD_STEP),
        ({"operation": Operation.LINEAR, "matrix": "q", "block": 3}, RefusalReason.BAD_STEP),
    ],
)
def test_hostile_steps_are_refused_and_change_nothing(shop: Shop, other: dict[str, Any], reason: str) -> None:
    shop.load()
    x = inputs(4)
    shop.step(x[:3], 0)
    with pytest.raises(Refused) as refused:
        shop.engine.step(work(x[3:], 3, **other))
    assert refused.value.reason == reason
    torch.testing.assert_close(shop.step(x[3:], 3), direct(shop.blocks, x)[3:], rtol=1e-5, atol=1e-5)


def test_an_answer_that_no_frame_can_hold_is_refused_before_it_is_computed(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop.load()
    monkeypatch.setattr("worker.engine.ANSWER_BYTES_MAX", 4 * 16 * 5)
    shop.step(inputs(5), 0)
    with pytest.raises(Refused, match="larger than a frame"):
        shop.step(inputs(6), 0)
    with pytest.raises(Refused, match="larger than a frame"):
        shop.step(inputs(5), 0, operation=Operation.LINEAR, matrix="gate")


def test_misuse_is_our_own_bug(shop: Shop) -> None:
    x, deployment = inputs(1), shop.manifest.deployment
    with pytest.raises(LocalProtocolError):
        shop.step(x, 0)
    with pytest.raises(LocalProtocolError):
        shop.engine.open(SESSION, shop.spec(4))
    shop.load(kv_tokens=4)
    for call in (
        lambda: shop.engine.open(SESSION, shop.spec(4)),
        lambda: shop.engine.unload(deployment),
        lambda: shop.engine.load(SpanSpec(shop.manifest, 0, 1)),
        lambda: shop.step(x, 1),
        lambda: shop.step(inputs(5), 0),
    ):
        with pytest.raises(LocalProtocolError):
            call()
    shop.engine.close(SESSION)
    shop.engine.close(SESSION)
    shop.engine.unload(deployment)
    shop.engine.unload(DeploymentId(b"nobody's" * 2))


def _without(tensors: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in tensors.items() if key != name}


TAMPERED = {
    "a tensor missing": lambda t: _without(t, "down"),
    "a tensor too many": lambda t: t | {"embedding": torch.zeros(4)},
    "a wrong name": lambda t: _without(t, "down") | {"Down": t["down"]},
    "a wrong shape": lambda t: t | {"down": t["down"].T.contiguous()},
    "a wrong dtype": lambda t: t | {"down": t["down"].view(torch.int32)},
}


@pytest.mark.parametrize("how", TAMPERED)
def test_a_shard_that_is_not_the_manifests_is_refused(shop: Shop, how: str) -> None:
    _tamper(shop, save(TAMPERED[how](shop.blocks[1])))


@pytest.mark.parametrize(
    "harm",
    [
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: b"",
        lambda data: b"\xff" * 8 + data[8:],
        lambda data: (1 << 62).to_bytes(8, "little") + data[8:],
        lambda data: data[:8] + b"{" * 100 + data[108:],
    ],
)
def test_a_broken_file_is_refused(shop: Shop, harm: Any) -> None:
    _tamper(shop, harm(save(shop.blocks[1])))


def _tamper(shop: Shop, shard: bytes) -> None:
    """Put `shard` where the manifest's second one was, of the right size or not: loading refuses it either way."""
    entry = shop.manifest.blocks[1]
    shop.path(entry.digest).write_bytes(shard)
    honest = dataclasses.replace(entry, shard_bytes=max(len(shard), entry.weight_bytes))
    for manifest in (shop.manifest, dataclasses.replace(shop.manifest, blocks=(shop.manifest.blocks[0], honest))):
        with pytest.raises(Refused) as refused:
            shop.engine.load(SpanSpec(manifest, 0, 2))
        assert refused.value.reason == RefusalReason.BAD_SHARD
    shop.engine.load(SpanSpec(shop.manifest, 0, 1))


def test_a_missing_file_is_refused(shop: Shop) -> None:
    shop.path(shop.manifest.blocks[0].digest).unlink()
    with pytest.raises(Refused, match="bad_shard"):
        shop.load()


def test_a_manifest_whose_tensors_are_not_its_configs_is_refused_by_the_engine_too(shop: Shop) -> None:
    entry = shop.manifest.blocks[0]
    lying = dataclasses.replace(entry, tensors=entry.tensors[:-1])
    manifest = dataclasses.replace(shop.manifest, blocks=(lying,))
    with pytest.raises(Refused, match="bad_manifest"):
        shop.engine.load(SpanSpec(manifest, 0, 1))


def test_what_loading_reports(shop: Shop) -> None:
    loaded = shop.engine.load(SpanSpec(shop.manifest, 0, 2))
    request = read_span(shop.data, 0, 2)
    assert loaded.weight_bytes == request.weight_bytes == 2 * 4 * CONFIG.num_parameters
    assert request.kv_token_bytes == 2 * KvSlab(CONFIG, 1, torch.float32, torch.device("cpu")).token_bytes
    assert loaded.block_time_us > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8", "int32"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_payloads_round_trip(dtype: str, shape: tuple[int, ...]) -> None:
    data = bytes(range(1, 49))[: TensorHeader(dtype, shape).nbytes]
    payload = Payload(TensorHeader(dtype, shape), data)
    tensor = to_tensor(payload)
    assert to_payload(tensor) == payload
    if len(shape) == 2:
        assert to_tensor(to_payload(tensor.T)).equal(tensor.T), "any stride travels in C order"


def test_a_batch_of_sessions_computes_what_each_would_alone(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    """Decodes of several sessions and chunks of their prompts in one forward, at different positions."""
    shop.load()
    sessions = [SessionId(bytes([number]) * 16) for number in range(5)]
    texts = [inputs(20 + 9 * number, seed=number) for number in range(5)]
    for session in sessions:
        shop.engine.open(session, shop.spec(100))
    expected = [direct(shop.blocks, text) for text in texts]
    got: list[list[torch.Tensor]] = [[] for _ in texts]
    position = [0] * 5
    generator = random.Random(0)
    while any(position[n] < len(text) for n, text in enumerate(texts)):
        for number, text in enumerate(texts):
            rows = min(generator.choice([1, 1, 5, 30]), len(text) - position[number])
            if rows:
                step = work(text[position[number] :][:rows], position[number], session=sessions[number])
                shop.engine.submit(step, partial(_keep, got[number]))
                position[number] += rows
        while not shop.engine.idle:
            shop.engine.advance()
    for number in range(5):
        torch.testing.assert_close(torch.cat(got[number]), expected[number], rtol=1e-5, atol=1e-5)
    assert not [record for record in caplog.records if record.levelname == "ERROR"], "no batch was taken apart"


def test_an_answer_says_whether_others_ended_with_it(shop: Shop) -> None:
    shop.load()
    sessions = [SessionId(bytes([number]) * 16) for number in range(3)]
    for session in sessions:
        shop.engine.open(session, shop.spec(400))
    answers: list[StepResult | Exception] = []
    for session in sessions[:2]:
        shop.engine.submit(work(inputs(1), 0, session=session), answers.append)
    shop.engine.advance()
    shop.engine.submit(work(inputs(1), 0, session=sessions[2]), answers.append)
    shop.engine.advance()
    shop.engine.submit(work(inputs(300), 1, session=sessions[1]), answers.append)  # more than one forward takes
    shop.engine.submit(work(inputs(1), 1, session=sessions[2]), answers.append)
    shop.engine.advance()
    assert [isinstance(answer, StepResult) and answer.company for answer in answers] == [True, True, False, False]


def test_each_answer_says_how_long_the_engine_has_computed_for_all(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what it has computed of steps that have not ended; here each forward takes a second."""
    shop.load()
    other, ended = SessionId(b"o" * 16), list[tuple[int, float]]()
    shop.engine.open(other, shop.spec(600, "other", alone=True))
    monkeypatch.setattr("worker.engine.time", SimpleNamespace(perf_counter=partial(next, itertools.count())))

    def done(result: StepResult | Exception) -> None:
        assert isinstance(result, StepResult)
        ended.append((result.forward.header.shape[0], result.busy_s))

    shop.engine.submit(work(inputs(600), 0), done)
    for position in range(2):
        shop.engine.advance()
        shop.engine.submit(work(inputs(1), position, session=other), done)
        shop.engine.advance()
    shop.engine.advance()
    assert ended == [(1, 3.0), (600, 4.0), (1, 5.0)]


def _keep(rows: list[torch.Tensor], result: StepResult | Exception) -> None:
    assert isinstance(result, StepResult), result
    rows.append(to_tensor(result.forward))


def test_a_long_prompt_does_not_hold_up_a_decode(shop: Shop) -> None:
    shop.load()
    shop.engine._scheduler.rows_per_forward = 8
    other = SessionId(b"o" * 16)
    shop.engine.open(other, shop.spec(10))
    ended: list[str] = []
    shop.engine.submit(work(inputs(40), 0), lambda _: ended.append("prompt"))
    shop.engine.advance()
    shop.engine.submit(work(inputs(1), 0, session=other), lambda _: ended.append("decode"))
    shop.engine.advance()
    assert ended == ["decode"]
    while not shop.engine.idle:
        shop.engine.advance()
    assert ended == ["decode", "prompt"]


def test_one_step_that_fails_in_a_batch_fails_alone(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.load()
    other = SessionId(b"o" * 16)
    shop.engine.open(other, shop.spec(10))
    forward = Stack.run

    def short_of_memory(self: Stack, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        if len(x) > 1:
            raise MemoryError
        return forward(self, x, *rest)

    monkeypatch.setattr(Stack, "run", short_of_memory)
    ended: dict[str, StepResult | Exception] = {}
    shop.engine.submit(work(inputs(2), 0), lambda result: ended.update(large=result))
    shop.engine.submit(work(inputs(1), 0, session=other), lambda result: ended.update(small=result))
    shop.engine.advance()
    assert isinstance(ended["small"], StepResult)
    assert isinstance(ended["large"], Refused)
    assert ended["large"].reason == RefusalReason.MEMORY
    assert shop.engine.idle


def test_a_step_waits_for_other_forwards_and_not_for_its_own(shop: Shop) -> None:
    shop.load()
    shop.engine._scheduler.rows_per_forward = 8
    other = SessionId(b"o" * 16)
    shop.engine.open(other, shop.spec(60))
    asked_s = time.perf_counter()
    prompt = shop.engine.step(work(inputs(40), 0))  # five forwards of its own
    took_us = 1e6 * (time.perf_counter() - asked_s)
    assert prompt.queue_us < took_us - prompt.compute_us + 1
    ended: list[StepResult | Exception] = []
    shop.engine.submit(work(inputs(1), 0, session=other), ended.append, asked_s)
    shop.engine.advance()
    (late,) = ended
    assert isinstance(late, StepResult)
    assert late.queue_us > prompt.compute_us  # it was asked for before the prompt's forwards ran
    shop.engine.submit(work(inputs(1), 1, session=other), ended.append, time.perf_counter())
    shop.engine.advance()
    assert isinstance(ended[1], StepResult)
    assert ended[1].queue_us < prompt.compute_us


def test_an_answer_that_finds_no_memory_fails_its_step_and_not_the_engine(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What escaped from `advance` would end the engine's thread, and every step would wait for ever."""
    shop.load()

    def short_of_memory(*_: object) -> Payload:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr("worker.engine.to_payload", short_of_memory)
        with pytest.raises(Refused) as refused:
            shop.engine.step(work(inputs(1), 0))
    assert refused.value.reason == RefusalReason.MEMORY
    assert shop.engine.idle
    assert isinstance(shop.engine.step(work(inputs(1), 0)), StepResult)


def test_a_bug_in_batches_costs_no_step_and_is_seen(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shop.load()
    other = SessionId(b"o" * 16)
    shop.engine.open(other, shop.spec(10))
    forward = Stack.run

    def broken(self: Stack, x: torch.Tensor, kvs: Any, segments: Any) -> torch.Tensor:
        if len(segments) > 1:
            raise TypeError("a bug")
        return forward(self, x, kvs, segments)

    monkeypatch.setattr(Stack, "run", broken)
    ended: list[StepResult | Exception] = []
    for step in (work(inputs(2), 0), work(inputs(1), 0, session=other)):
        shop.engine.submit(step, ended.append)
    shop.engine.advance()
    assert [type(end) for end in ended] == [StepResult, StepResult]
    assert "a batch of 2 steps failed" in caplog.text


def test_closing_a_session_drops_the_rest_of_its_step(shop: Shop) -> None:
    shop.load()
    shop.engine._scheduler.rows_per_forward = 8
    ended: list[StepResult | Exception] = []
    shop.engine.submit(work(inputs(40), 0), ended.append)
    with pytest.raises(LocalProtocolError):
        shop.engine.submit(work(inputs(1), 0), ended.append)
    shop.engine.advance()
    shop.engine.close(SESSION)
    shop.engine.advance()
    assert shop.engine.idle
    assert [type(end) for end in ended] == [Refused]
    shop.engine.unload(shop.manifest.deployment)
