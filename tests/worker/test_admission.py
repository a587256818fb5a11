"""The pure parts: who gets memory, who must go, and how many sessions there may be."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import limits
from protocol.errors import LocalProtocolError, Refused
from protocol.ids import DeploymentId, PeerId, SessionId
from protocol.manifest import ConfigPair, sign_manifest
from protocol.messages import RefusalReason
from protocol.ports import LoadedSpan
from tests.helpers.workers import BLOCK_BYTES, CONFIG, KV_TOKEN_BYTES, identity, make_manifest
from worker.admission import LEASES_MAX, UPLOAD_SILENCE_S, SessionQuota, SpanLease, SpanLedger, SpanState
from worker.kv_pool import KvPool
from worker.spans import SpanRequest, read_span

ANN, BOB = identity("ann"), identity("bob")


def request(name: int, blocks: int = 1, owner: str = "ann") -> SpanRequest:
    data, _, _ = make_manifest(identity(owner), blocks, DeploymentId(bytes([name]) * 16))
    return read_span(data, 0, blocks)


def loaded(ledger: SpanLedger, wanted: SpanRequest, now: float) -> SpanLease:
    ledger.prepare(wanted, now)
    lease = ledger.leases[wanted.deployment]
    lease.state, lease.loaded = SpanState.LOADED, LoadedSpan(1, 1)
    return lease


def reason_of(action: object) -> str:
    assert callable(action)
    with pytest.raises(Refused) as refused:
        action()
    return refused.value.reason


def test_what_a_span_costs() -> None:
    wanted = request(1, blocks=3)
    assert wanted.weight_bytes == 3 * BLOCK_BYTES
    assert wanted.kv_token_bytes == 3 * KV_TOKEN_BYTES
    assert wanted.context_tokens == CONFIG.max_position
    assert len(wanted.shards) == 3


def test_missing_memory_is_named_to_the_byte_and_nothing_changes() -> None:
    ledger = SpanLedger(2 * BLOCK_BYTES)
    ledger.prepare(request(1), 0.0)
    with pytest.raises(Refused, match=f"{BLOCK_BYTES} bytes are missing") as refused:
        ledger.prepare(request(2, blocks=2), 1.0)
    assert refused.value.reason == RefusalReason.MEMORY
    assert ledger.free_bytes == BLOCK_BYTES
    ledger.prepare(request(3), 1.0)
    assert ledger.free_bytes == 0


def test_the_least_recently_used_idle_deployment_makes_room() -> None:
    ledger = SpanLedger(3 * BLOCK_BYTES)
    first, second, third = (loaded(ledger, request(name), float(name)) for name in (1, 2, 3))
    first.touched = 9.0
    second.sessions = 1
    assert ledger.available_bytes == 2 * BLOCK_BYTES
    assert ledger.prepare(request(4, owner="bob"), 10.0) == (third,)
    assert ledger.prepare(request(5), 11.0) == (first,)
    assert reason_of(lambda: ledger.prepare(request(6), 12.0)) == RefusalReason.MEMORY, "one in use, two on their way"
    assert ledger.holds(second)
    assert not ledger.holds(first)


def test_no_more_is_evicted_than_is_needed() -> None:
    ledger = SpanLedger(4 * BLOCK_BYTES)
    leases = [loaded(ledger, request(name), float(name)) for name in range(4)]
    assert ledger.prepare(request(9, blocks=2), 10.0) == tuple(leases[:2])


def test_only_the_owner_touches_a_deployment() -> None:
    ledger = SpanLedger(1 << 30)
    mine = request(1)
    loaded(ledger, mine, 0.0)
    assert reason_of(lambda: ledger.prepare(request(1, owner="bob"), 1.0)) == RefusalReason.FORBIDDEN
    assert reason_of(lambda: ledger.owned(mine.deployment, BOB.peer)) == RefusalReason.FORBIDDEN
    assert reason_of(lambda: ledger.wants(next(iter(mine.shards)), BOB.peer)) == RefusalReason.FORBIDDEN
    assert reason_of(lambda: ledger.owned(DeploymentId(bytes(16)), ANN.peer)) == RefusalReason.UNKNOWN_DEPLOYMENT
    assert ledger.owned(mine.deployment, ANN.peer) is ledger.wants(next(iter(mine.shards)), ANN.peer)


def test_preparing_again_keeps_the_span_and_another_range_replaces_it() -> None:
    ledger = SpanLedger(2 * BLOCK_BYTES)
    data, _, _ = make_manifest(ANN, 3)
    whole, part = read_span(data, 0, 2), read_span(data, 1, 3)
    lease = loaded(ledger, whole, 0.0)
    assert ledger.prepare(whole, 5.0) == ()
    assert ledger.holds(lease)
    assert lease.state is SpanState.LOADED
    assert lease.touched == 5.0
    lease.sessions = 1
    assert reason_of(lambda: ledger.prepare(part, 6.0)) == RefusalReason.SESSIONS
    lease.sessions, lease.state = 0, SpanState.LOADING
    assert reason_of(lambda: ledger.prepare(part, 6.0)) == RefusalReason.SESSIONS
    lease.state = SpanState.LOADED
    assert ledger.prepare(part, 7.0) == (lease,), "its own memory counts as free for it"
    assert ledger.leases[part.deployment].request == part


def test_a_silent_upload_is_dropped_and_a_loaded_span_is_not() -> None:
    ledger = SpanLedger(1 << 30)
    loaded(ledger, request(1), 0.0)
    ledger.prepare(request(2), 0.0)
    busy = ledger.leases[request(2).deployment]
    assert ledger.silent(UPLOAD_SILENCE_S - 1) == ()
    busy.touched = 10.0
    assert ledger.silent(UPLOAD_SILENCE_S) == ()
    assert ledger.silent(UPLOAD_SILENCE_S + 10) == (busy,)
    assert list(ledger.leases) == [request(1).deployment]


def test_no_more_deployments_than_an_advert_can_name() -> None:
    ledger = SpanLedger(1 << 30)
    for name in range(LEASES_MAX):
        ledger.prepare(request(name), 0.0)
    assert reason_of(lambda: ledger.prepare(request(99), 1.0)) == RefusalReason.MEMORY
    lease = ledger.leases[request(3).deployment]
    lease.state = SpanState.LOADED
    assert ledger.prepare(request(99), 1.0) == (lease,)


def test_a_lease_with_sessions_cannot_be_removed() -> None:
    ledger = SpanLedger(1 << 30)
    lease = loaded(ledger, request(1), 0.0)
    lease.sessions = 1
    with pytest.raises(LocalProtocolError):
        ledger.remove(lease)
    lease.sessions = 0
    ledger.remove(lease)
    ledger.remove(lease)
    assert ledger.free_bytes == 1 << 30


def test_removing_an_old_lease_spares_the_new_one() -> None:
    ledger = SpanLedger(1 << 30)
    data, _, _ = make_manifest(ANN, 2)
    ledger.prepare(read_span(data, 0, 1), 0.0)
    (old,) = ledger.prepare(read_span(data, 1, 2), 0.0)
    ledger.remove(old)
    assert len(ledger.leases) == 1


def test_sessions_are_bounded_per_peer_and_in_all() -> None:
    quota = SessionQuota(total_max=3, per_peer_max=2)
    quota.take(ANN.peer)
    quota.take(ANN.peer)
    assert reason_of(lambda: quota.take(ANN.peer)) == RefusalReason.SESSIONS
    quota.take(BOB.peer)
    assert reason_of(lambda: quota.take(BOB.peer)) == RefusalReason.SESSIONS
    quota.give(ANN.peer)
    quota.take(BOB.peer)
    assert quota.taken == 3
    for peer in (ANN.peer, BOB.peer, BOB.peer):
        quota.give(peer)
    assert not quota._taken, "nothing is remembered of peers that left"


def test_the_bounds_are_the_wires() -> None:
    quota = SessionQuota()
    assert (quota.total_max, quota.per_peer_max) == (limits.SESSIONS_MAX, limits.SESSIONS_PER_PEER_MAX)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(-1, 60)), max_size=60))
def test_kv_reservations_never_exceed_the_pool(actions: list[tuple[int, int]]) -> None:
    pool = KvPool(100)
    held: dict[SessionId, int] = {}
    for name, size in actions:
        session = SessionId(bytes([name]) * 16)
        if size < 0 or session in held:
            pool.release(session)
            pool.release(session)
            held.pop(session, None)
        elif sum(held.values()) + size > 100:
            with pytest.raises(Refused, match=f"{sum(held.values()) + size - 100} bytes are missing"):
                pool.reserve(session, size)
        else:
            pool.reserve(session, size)
            held[session] = size
        assert pool.used_bytes == sum(held.values()) <= 100
        assert pool.free_bytes == 100 - pool.used_bytes


def test_a_session_reserves_once() -> None:
    pool = KvPool(10)
    pool.reserve(SessionId(b"s" * 16), 1)
    with pytest.raises(LocalProtocolError):
        pool.reserve(SessionId(b"s" * 16), 1)


def test_hostile_spans_are_refused() -> None:
    data, manifest, _ = make_manifest(ANN, 2)
    for start, end in [(0, 3), (1, 1), (2, 1), (2, 3)]:
        assert reason_of(lambda start=start, end=end: read_span(data, start, end)) == RefusalReason.BAD_MANIFEST
    assert reason_of(lambda: read_span(data[:-1] + b"x", 0, 1)) == RefusalReason.BAD_MANIFEST
    assert reason_of(lambda: read_span(b"", 0, 1)) == RefusalReason.BAD_MANIFEST
    assert PeerId(read_span(data, 0, 1).owner) == ANN.peer
    assert manifest.deployment == read_span(data, 0, 1).deployment


def test_manifests_that_no_engine_can_run_are_refused() -> None:
    _, manifest, _ = make_manifest(ANN, 2)
    block = manifest.blocks[0]

    def changed(**fields: object) -> bytes:
        blocks = (dataclasses.replace(block, **fields), manifest.blocks[1])
        return sign_manifest(dataclasses.replace(manifest, blocks=blocks), ANN)

    def config(key: str, value: object) -> tuple[ConfigPair, ...]:
        return tuple(ConfigPair(pair.key, value if pair.key == key else pair.value) for pair in block.config)

    unsupported, bad = RefusalReason.UNSUPPORTED, RefusalReason.BAD_MANIFEST
    wide = make_manifest(ANN, 1, config=dataclasses.replace(CONFIG, hidden_size=16))[1].blocks[0]
    cases = [
        (changed(config=config("family", "gpt2")), unsupported),
        (changed(config=config("rope_kind", "longrope")), unsupported),
        (changed(config=config("hidden_size", 1 << 40)), bad),
        (changed(config=config("hidden_size", True)), bad),
        (changed(config=block.config[1:]), bad),
        (changed(tensors=block.tensors[1:]), bad),
        (changed(shard_bytes=block.shard_bytes + (2 << 20)), bad),
        (sign_manifest(dataclasses.replace(manifest, dtype="int8"), ANN), unsupported),
        (sign_manifest(dataclasses.replace(manifest, dtype="int32"), ANN), unsupported),
        (sign_manifest(dataclasses.replace(manifest, blocks=(block, wide)), ANN), bad),
    ]
    for data, reason in cases:
        assert reason_of(lambda data=data: read_span(data, 0, 2)) == reason
