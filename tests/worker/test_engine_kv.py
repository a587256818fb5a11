"""KV that outlives sessions, KV in pieces, and rows that come out the same bit for bit."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from client.placement.needs import ModelNeeds
from models.pages import KvSlab
from protocol.errors import Refused
from protocol.ids import PeerId, SessionId
from protocol.limits import PAGE_TOKENS
from protocol.ports import SessionSpec, SpanSpec, StepResult
from tests.helpers.engines import CONFIG, OWNER, SESSION, Shop, direct, inputs, random_tensors, work
from tests.helpers.workers import make_manifest
from worker import engine, span_kv
from worker.engine import Engine
from worker.kv_pages import KvBudget
from worker.payloads import to_tensor
from worker.span_kv import SpanKv
from worker.spans import read_span

KEYS = tuple(bytes([number]) * 16 for number in range(8))
TOKEN_BYTES = 3 * 2 * 2 * 64  # of the shop's three blocks: heads 8 wide in float32 take as much as if they had 16


def named(number: int) -> SessionId:
    return SessionId(bytes([number]) * 16)


def begin(shop: Shop, number: int, tokens: int, **other: Any) -> int:
    terms: dict[str, Any] = {"client": PeerId("client"), "tenant": PeerId("ann"), "kv_tokens": tokens}
    spec = SessionSpec(shop.manifest.deployment, **(terms | other))
    return shop.engine.open(named(number), spec)


def test_memory_of_free_pages_is_given_back_a_little_at_a_time(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded(shop)
    x, forgotten, forget = inputs(9 * PAGE_TOKENS), list[int](), KvSlab.forget

    def counted(slab: KvSlab, start: int, count: int) -> None:
        forgotten.append(count * slab.token_bytes)
        forget(slab, start, count)

    monkeypatch.setattr(KvSlab, "forget", counted)
    monkeypatch.setattr(engine, "GIVEN_BACK_BYTES", 3 * PAGE_TOKENS * TOKEN_BYTES)
    begin(shop, 1, len(x))
    run(shop, 1, x, 0, [len(x)])
    shop.engine.close(named(1))
    assert not forgotten, "closing waits for nothing"
    begin(shop, 2, 3 * PAGE_TOKENS)
    given = []
    while not shop.engine.idle:
        forgotten.clear()
        shop.engine.advance()
        given.append(sum(forgotten) // (PAGE_TOKENS * TOKEN_BYTES))
        check(shop)
    assert given == [3, 3], "all that nobody took again"
    assert torch.allclose(run(shop, 2, x, 0, [150]), direct(shop.blocks, x[:150]), atol=1e-5)
    shop.engine.close(named(2))
    shop.engine.unload(shop.manifest.deployment)
    tidied(shop)
    assert not shop.engine._leaving


def nine_free_pages(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """What a session wrote that is gone, and whose memory is there yet; it goes back page by page."""
    loaded(shop)
    x = inputs(9 * PAGE_TOKENS)
    monkeypatch.setattr(engine, "GIVEN_BACK_BYTES", 1)
    begin(shop, 1, len(x))
    run(shop, 1, x, 0, [len(x)])
    shop.engine.close(named(1))
    return x


def test_a_forward_gives_back_as_much_as_it_writes(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    x = nine_free_pages(shop, monkeypatch)
    begin(shop, 2, PAGE_TOKENS)
    (book,) = shop.engine.kv_budget.books
    assert len(book.stale) == 8
    shop.engine.submit(work(x[:PAGE_TOKENS], 0, session=named(2)), lambda _: None)
    shop.engine.advance()
    assert len(book.stale) == 7


def test_a_forward_gives_back_as_many_pages_as_it_begins(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token takes memory in as many of the system's pages as 64 may, where heads are narrow."""
    x = nine_free_pages(shop, monkeypatch)
    (book,) = shop.engine.kv_budget.books
    for number in (2, 3, 4):
        begin(shop, number, PAGE_TOKENS)
    assert len(book.stale) == 6
    for number in (2, 3, 4):
        shop.engine.submit(work(x[:1], 0, session=named(number)), lambda _: None)
    shop.engine.advance()
    assert len(book.stale) == 3


def test_what_one_span_has_not_to_give_back_another_gives(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded(shop)
    shards = [shop.path(entry.digest).read_bytes() for entry in shop.manifest.blocks]
    _, other, _ = make_manifest(OWNER, 3, b"other deployment", shards, CONFIG)
    shop.engine.load(SpanSpec(other, 0, 3))
    x, ann = inputs(8 * PAGE_TOKENS), PeerId("ann")
    begin(shop, 1, PAGE_TOKENS)
    shop.engine.open(named(2), SessionSpec(other.deployment, ann, ann, len(x)))
    run(shop, 1, x, 0, [PAGE_TOKENS])
    run(shop, 2, x, 0, [len(x)])
    shop.engine.close(named(1))
    shop.engine.close(named(2))
    books = shop.engine.kv_budget.books
    assert [len(book.stale) for book in books] == [1, 8]
    monkeypatch.setattr(engine, "GIVEN_BACK_BYTES", 3 * PAGE_TOKENS * TOKEN_BYTES)
    shop.engine.advance()
    assert [len(book.stale) for book in books] == [0, 6]


def test_after_a_new_route_full_pages_have_no_key(shop: Shop) -> None:
    shop, x = loaded(shop), inputs(3 * PAGE_TOKENS)
    begin(shop, 1, len(x) + 1, page_keys=KEYS)
    shop.engine.step(work(x[:70], 0, session=named(1)))
    shop.engine.step(work(x[70:], 70, session=named(1), keeps=False))
    shop.engine.close(named(1))
    assert begin(shop, 2, len(x) + 1, page_keys=KEYS) == PAGE_TOKENS
    check(shop)


def check(shop: Shop) -> None:
    engine = shop.engine
    for span in engine._spans.values():
        assert span.kv is not None
        sessions = [each.kv for each in engine._sessions.values() if each.span is span]
        span.kv.book.check([kv.table for kv in sessions if kv is not None])


def loaded(shop: Shop, kv_bytes: int | None = None) -> Shop:
    if kv_bytes is not None:
        shop.engine = Engine(shop.path, kv_bytes=kv_bytes)
    shop.load(kv_tokens=1)
    shop.engine.close(SESSION)
    tidied(shop)
    return shop


def tidied(shop: Shop) -> None:
    """Until the engine has nothing to do."""
    while not shop.engine.idle:
        shop.engine.advance()


def run(shop: Shop, number: int, x: torch.Tensor, start: int, cuts: list[int]) -> torch.Tensor:
    """Rows of x from `start` on, in steps of `cuts` rows."""
    parts = []
    for count in cuts:
        parts.append(shop.step(x[start : start + count], start, session=named(number)))
        start += count
    return torch.cat(parts)


def test_a_later_session_begins_where_an_earlier_one_left_its_pages(shop: Shop) -> None:
    loaded(shop)
    x = inputs(300)
    whole = direct(shop.blocks, x)
    assert begin(shop, 1, 300, page_keys=KEYS[:2]) == 0
    run(shop, 1, x, 0, [200, 1, 1])
    assert begin(shop, 2, 300, page_keys=KEYS[:4]) == 2 * PAGE_TOKENS, "while the first session goes on"
    torch.testing.assert_close(run(shop, 2, x, 128, [100, 1]), whole[128:229], rtol=1e-5, atol=1e-5)
    shop.engine.close(named(2), KEYS[:4])
    check(shop)
    torch.testing.assert_close(run(shop, 1, x, 202, [1, 90]), whole[202:293], rtol=1e-5, atol=1e-5)
    shop.engine.close(named(1))
    assert begin(shop, 3, 300, page_keys=KEYS) == 3 * PAGE_TOKENS, "229 tokens fill three pages"
    torch.testing.assert_close(run(shop, 3, x, 192, [108]), whole[192:], rtol=1e-5, atol=1e-5)
    check(shop)


def test_who_goes_back_before_a_page_is_full_names_it_no_more(shop: Shop) -> None:
    loaded(shop)
    x, other = inputs(300), -inputs(300)
    begin(shop, 1, 300, page_keys=KEYS[:4])
    run(shop, 1, x, 0, [200])
    run(shop, 1, other, 195, [100])
    assert begin(shop, 2, 300, page_keys=KEYS) == 3 * PAGE_TOKENS, "the fourth page holds another text"
    check(shop)


def test_who_goes_back_into_named_pages_takes_their_names_with_it(shop: Shop) -> None:
    """Another text follows there: found under the old name, it would be a wrong beginning."""
    loaded(shop)
    x, other = inputs(300), -inputs(300)
    begin(shop, 1, 300, page_keys=KEYS[:3])
    run(shop, 1, x, 0, [200])
    run(shop, 1, other, 70, [230])
    assert begin(shop, 2, 300, page_keys=KEYS) == PAGE_TOKENS, "the first page is as it was"
    now = (KEYS[0], *KEYS[5:])
    shop.engine.close(named(1), now)
    assert begin(shop, 3, 300, page_keys=now) == 4 * PAGE_TOKENS, "what closing names is there"
    check(shop)


def test_a_hop_that_holds_more_than_others_begins_where_they_do(shop: Shop) -> None:
    """The client begins at the least that any hop holds: here inside what this hop shares."""
    loaded(shop)
    x = inputs(200)
    whole = direct(shop.blocks, x)
    begin(shop, 1, 200, page_keys=KEYS)
    run(shop, 1, x, 0, [200])
    other = x.clone()
    other[70:] += 1
    for start in (0, 64, 70):
        assert begin(shop, 2, 200, page_keys=KEYS) == 3 * PAGE_TOKENS
        got = run(shop, 2, other, start, [199 - start, 1])
        torch.testing.assert_close(got, direct(shop.blocks, other)[start:], rtol=1e-5, atol=1e-5)
        shop.engine.close(named(2))
        check(shop)
    torch.testing.assert_close(run(shop, 1, x, 199, [1]), whole[199:], rtol=1e-5, atol=1e-5)


def test_another_tenant_with_the_same_keys_finds_nothing(shop: Shop) -> None:
    loaded(shop)
    x = inputs(200)
    begin(shop, 1, 200, page_keys=KEYS)
    run(shop, 1, x, 0, [200])
    shop.engine.close(named(1), KEYS)
    assert begin(shop, 2, 200, page_keys=KEYS, tenant=PeerId("ben")) == 0
    assert begin(shop, 3, 200, page_keys=KEYS) == 3 * PAGE_TOKENS


def test_what_a_step_did_not_finish_is_not_kept(shop: Shop) -> None:
    loaded(shop)
    shop.engine._scheduler.rows_per_forward = 80
    begin(shop, 1, 200, page_keys=KEYS)
    ended: list[StepResult | Exception] = []
    shop.engine.submit(work(inputs(200), 0, session=named(1)), ended.append)
    shop.engine.advance()
    shop.engine.close(named(1), KEYS)
    assert [type(end) for end in ended] == [Refused]
    check(shop)
    assert begin(shop, 2, 200, page_keys=KEYS) == PAGE_TOKENS, "80 of 200 rows were computed"


def test_sessions_in_scattered_pages_compute_the_same(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(span_kv, "SLACK", 1)
    loaded(shop, 9 * PAGE_TOKENS * TOKEN_BYTES)
    x = inputs(270)
    whole = direct(shop.blocks, x)
    for number in range(9):
        begin(shop, number, PAGE_TOKENS)
    for number in (1, 3, 5, 6, 8):
        shop.engine.close(named(number))
    begin(shop, 10, 270)
    kv = shop.engine._sessions[named(10)].kv
    assert kv is not None
    assert [run.count // PAGE_TOKENS for run in kv.extent.runs] == [2, 1, 1, 1]
    got = run(shop, 10, x, 0, [60, 1, 1, 1, 1, 1, 100, 1, 20, 1, 64, 1, 1, 1, 16])
    torch.testing.assert_close(got, whole, rtol=1e-5, atol=1e-5)
    check(shop)


def test_kept_pages_make_room_and_memory_never_exceeds_the_budget(shop: Shop) -> None:
    loaded(shop, 6 * PAGE_TOKENS * TOKEN_BYTES)
    x = inputs(190)
    whole, generator = direct(shop.blocks, x), random.Random(3)
    for turn in range(20):
        tenant, keys = PeerId(generator.choice(["ann", "ben"])), KEYS[: generator.randint(0, 2)]
        held = begin(shop, turn, 190, tenant=tenant, page_keys=keys)
        torch.testing.assert_close(run(shop, turn, x, held, [190 - held]), whole[held:], rtol=1e-5, atol=1e-5)
        if generator.random() < 0.5:
            begin(shop, 100, 190)
            with pytest.raises(Refused, match="kv_memory"):
                begin(shop, 101, 1)
            shop.engine.close(named(100))
        shop.engine.close(named(turn), keys)
        check(shop)
    shop.engine.unload(shop.manifest.deployment)
    assert shop.engine.kv_budget.used_bytes == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_deterministic_rows_do_not_depend_on_cuts_or_company(tmp_path: Path, dtype: str) -> None:
    blocks = [random_tensors(seed, dtype=getattr(torch, dtype)) for seed in range(2)]
    wide = [{name: tensor.float() for name, tensor in block.items()} for block in blocks]
    shop = loaded(Shop(tmp_path, blocks, dtype=dtype))
    x, generator = inputs(90), random.Random(0)
    begin(shop, 0, 90, deterministic=True)
    whole = run(shop, 0, x, 0, [90])
    torch.testing.assert_close(whole.float(), direct(wide, x).float(), rtol=0.1, atol=0.1)
    for number in range(1, 6):
        begin(shop, number, 200, deterministic=True)
        begin(shop, 100 + number, 200)
        got, at = list[torch.Tensor](), 0
        while at < 90:
            count = min(generator.choice([1, 1, 2, 7, 16, 40]), 90 - at)
            shop.engine.submit(work(x[at : at + 3], 0, session=named(100 + number)), lambda _: None)
            back = generator.choice([0, 0, min(3, at)])  # a rollback: computed once more
            part = run(shop, number, x, at - back, [count + back])
            got.append(part[back:])
            assert torch.equal(part[:back], whole[at - back : at])
            at += count
        assert torch.equal(torch.cat(got), whole)


def test_a_deterministic_session_may_begin_on_kept_pages(tmp_path: Path) -> None:
    shop = loaded(Shop(tmp_path, [random_tensors(seed) for seed in range(2)]))
    x = inputs(150)
    begin(shop, 0, 150, deterministic=True)
    whole = run(shop, 0, x, 0, [150])
    shop.engine.close(named(0), KEYS)
    assert begin(shop, 1, 150, deterministic=True, page_keys=KEYS) == 2 * PAGE_TOKENS
    assert torch.equal(run(shop, 1, x, 128, [5, 1, 16]), whole[128:])


def test_a_deterministic_session_reaches_the_end_of_the_context(shop: Shop) -> None:
    loaded(shop)
    x = inputs(600)  # all that the model takes; no multiple of a tile
    begin(shop, 0, 600, deterministic=True)
    torch.testing.assert_close(run(shop, 0, x, 0, [599, 1]), direct(shop.blocks, x), rtol=1e-4, atol=1e-4)


def test_steps_that_run_alone_share_no_forward(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded(shop)
    seen: list[int] = []
    forward = shop.engine._forward

    def watched(taken: Any) -> torch.Tensor:
        seen.append(len(taken))
        return forward(taken)

    monkeypatch.setattr(shop.engine, "_forward", watched)
    for number in range(6):
        begin(shop, number, 10, alone=number % 2 == 0)
    ended: list[StepResult | Exception] = []
    for number in range(6):
        shop.engine.submit(work(inputs(1, seed=number), 0, session=named(number)), ended.append)
    while not shop.engine.idle:
        shop.engine.advance()
    assert sorted(seen) == [1, 1, 1, 3]
    assert all(isinstance(end, StepResult) for end in ended)
    got = [to_tensor(end.forward) for end in ended if isinstance(end, StepResult)]
    assert len(got) == 6


def test_a_slab_gives_back_what_nobody_needs(shop: Shop) -> None:
    loaded(shop)
    begin(shop, 0, 600)
    run(shop, 0, inputs(600), 0, [600])
    slab = shop.engine._spans[shop.manifest.deployment].kv._slabs[0]  # type: ignore[union-attr]
    if not slab.lazy:
        pytest.skip("memory cannot be given back here")
    assert slab.keys[:, :600].count_nonzero()
    shop.engine.close(named(0))
    tidied(shop)
    assert not slab.keys[:, :600].count_nonzero(), "forgotten memory reads as zeros"


@pytest.mark.parametrize(
    ("heads", "width", "counted"),
    [(1, 2, 128), (1, 8, 128), (2, 8, 256), (1, 80, 384), (8, 64, 2048), (8, 96, 3072), (8, 128, 4096)],
)
def test_however_small_keys_are_a_token_counts_the_same_for_all(heads: int, width: int, counted: int) -> None:
    config = dataclasses.replace(CONFIG, num_heads=8, num_kv_heads=heads, head_dim=width)
    data, manifest, _ = make_manifest(OWNER, 3, config=config, dtype="bfloat16")
    kv = SpanKv([config] * 2, torch.bfloat16, torch.device("cpu"), KvBudget(1 << 20))
    assert kv.token_bytes == 2 * counted
    assert kv.book.page_bytes == 2 * counted * PAGE_TOKENS
    assert read_span(data, 1, 3).kv_token_bytes == kv.token_bytes, "what a session reserves"
    assert sum(ModelNeeds.of_manifest(manifest, 1).kv_bytes()[1:]) == kv.token_bytes, "what a client plans with"


def test_the_memory_of_a_session_is_that_of_its_tokens_in_whole_pages(shop: Shop) -> None:
    loaded(shop)
    begin(shop, 0, 600, page_keys=KEYS)
    book = shop.engine._spans[shop.manifest.deployment].kv.book  # type: ignore[union-attr]
    assert book.page_bytes == PAGE_TOKENS * TOKEN_BYTES
    assert 600 * TOKEN_BYTES <= book.used_bytes == 10 * book.page_bytes
    assert not book.unused
    run(shop, 0, inputs(200), 0, [200])
    shop.engine.close(named(0))
    assert book.used_bytes == len(book.unused) * book.page_bytes == 3 * book.page_bytes
