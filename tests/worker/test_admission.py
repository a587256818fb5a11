"""The pure parts: who gets memory, who must go, and how many sessions there may be."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import limits
from protocol.errors import LocalProtocolError, Refused
from protocol.ids import DeploymentId, PeerId, SessionId
from protocol.manifest import ConfigPair, sign_manifest
from protocol.messages import RefusalReason
from protocol.ports import LoadedSpan
from tests.helpers.protocol_samples import LEASE
from tests.helpers.workers import BLOCK_BYTES, CONFIG, DEPLOYMENT, KV_TOKEN_BYTES, identity, make_manifest
from worker.admission import LEASES_MAX, UPLOAD_SILENCE_S, SessionQuota, SpanLease, SpanLedger, SpanState
from worker.kv_pool import KvPool
from worker.leases import Holding
from worker.spans import SpanRequest, read_span

ANN, BOB = identity("ann"), identity("bob")


def request(name: int, blocks: int = 1, owner: str = "ann") -> SpanRequest:
    data, _, _ = make_manifest(identity(owner), blocks, bytes([name]) * 16)
    return read_span(data, 0, blocks)


def prepared(ledger: SpanLedger, wanted: SpanRequest, now: float, holder: PeerId = ANN.peer) -> SpanLease:
    """Prepared and leased."""
    ledger.prepare(wanted, now, holder)
    lease = ledger.leases[wanted.deployment]
    lease.holders[holder] = Holding(LEASE, inf, b"")
    return lease


def loaded(ledger: SpanLedger, wanted: SpanRequest, now: float) -> SpanLease:
    """Loaded, and leased by nobody."""
    ledger.prepare(wanted, now, ANN.peer)
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
    assert wanted.session_tokens_max == CONFIG.max_position
    assert len(wanted.shards) == 3


@pytest.mark.parametrize(
    ("heads", "window", "tokens"),
    [(1, 0, 1 << 21), (1024, 0, 1 << 16), (1024, 4096, 1 << 21), (1024, 1 << 20, 1 << 16)],
)
def test_scores_of_one_row_bound_what_a_session_may_hold(heads: int, window: int, tokens: int) -> None:
    config = dataclasses.replace(CONFIG, num_heads=heads, sliding_window=window, max_position=1 << 21)
    assert read_span(make_manifest(ANN, 2, config=config)[0], 0, 2).session_tokens_max == tokens


def test_missing_memory_is_named_to_the_byte_and_nothing_changes() -> None:
    ledger = SpanLedger(2 * BLOCK_BYTES)
    prepared(ledger, request(1), 0.0)
    with pytest.raises(Refused, match=f"{BLOCK_BYTES} bytes are missing") as refused:
        ledger.prepare(request(2, blocks=2), 1.0, ANN.peer)
    assert refused.value.reason == RefusalReason.MEMORY
    assert ledger.free_bytes == BLOCK_BYTES
    ledger.prepare(request(3), 1.0, ANN.peer)
    assert ledger.free_bytes == 0


def test_the_least_recently_used_idle_deployment_makes_room() -> None:
    ledger = SpanLedger(3 * BLOCK_BYTES)
    first, second, third = (loaded(ledger, request(name), float(name)) for name in (1, 2, 3))
    first.touched = 9.0
    second.sessions = 1
    assert ledger.available_bytes == 2 * BLOCK_BYTES
    assert ledger.prepare(request(4, owner="bob"), 10.0, BOB.peer) == (third,)
    ledger.leases[request(4, owner="bob").deployment].holders[BOB.peer] = Holding(LEASE, inf, b"")
    assert ledger.available_bytes == BLOCK_BYTES
    assert ledger.prepare(request(5), 11.0, ANN.peer) == (first,)
    ledger.leases[request(5).deployment].state = SpanState.LOADING
    assert reason_of(lambda: ledger.prepare(request(6), 12.0, ANN.peer)) == RefusalReason.MEMORY, (
        "used, leased, loading"
    )
    assert ledger.holds(second)
    assert not ledger.holds(first)
    last = ledger.leases[request(5).deployment]
    last.state = SpanState.PREPARED
    assert last.idle
    last.makes_room = True
    assert not last.idle, "what went for it is not gone yet"


def test_no_more_is_evicted_than_is_needed() -> None:
    ledger = SpanLedger(4 * BLOCK_BYTES)
    leases = [loaded(ledger, request(name), float(name)) for name in range(4)]
    assert ledger.prepare(request(9, blocks=2), 10.0, ANN.peer) == tuple(leases[:2])


def test_a_deployment_is_its_owners_alone() -> None:
    ledger = SpanLedger(1 << 30)
    mine, theirs = request(1), request(1, owner="bob")
    assert mine.deployment != theirs.deployment, "the same salt makes another deployment for another owner"
    lease = prepared(ledger, mine, 0.0)
    digest = next(iter(mine.shards))
    assert reason_of(lambda: ledger.wants(digest, BOB.peer)) == RefusalReason.FORBIDDEN
    assert reason_of(lambda: ledger.known(DeploymentId(bytes(16)))) == RefusalReason.UNKNOWN_DEPLOYMENT
    assert ledger.known(mine.deployment) is ledger.wants(digest, ANN.peer) is lease
    lease.holders.clear()
    assert reason_of(lambda: ledger.wants(digest, ANN.peer)) == RefusalReason.FORBIDDEN, "no lease, no upload"


def test_no_more_is_offered_than_one_owner_may_have() -> None:
    ledger = SpanLedger(4 * BLOCK_BYTES, owner_share=0.5)
    assert ledger.available_bytes == 2 * BLOCK_BYTES
    prepared(ledger, request(1), 0.0)
    assert ledger.available_bytes == 2 * BLOCK_BYTES, "another owner may have as much as before"
    prepared(ledger, request(2, blocks=2, owner="bob"), 1.0, BOB.peer)
    assert ledger.available_bytes == BLOCK_BYTES, "that is all there is"
    ledger.prepare(request(3), 2.0, ANN.peer)


def test_an_owner_leases_at_most_its_share_of_the_memory() -> None:
    ledger = SpanLedger(4 * BLOCK_BYTES, owner_share=0.5)
    first = prepared(ledger, request(1), 0.0)
    with pytest.raises(Refused, match=f"{BLOCK_BYTES} bytes too many"):
        ledger.prepare(request(2, blocks=2), 1.0, ANN.peer)
    prepared(ledger, request(2), 1.0)
    prepared(ledger, request(3, owner="bob"), 1.0, BOB.peer)
    assert reason_of(lambda: ledger.prepare(request(4), 1.0, ANN.peer)) == RefusalReason.MEMORY
    first.holders.clear()
    first.sessions = 1
    assert reason_of(lambda: ledger.prepare(request(4), 1.0, ANN.peer)) == RefusalReason.MEMORY, "it is still in use"
    first.sessions = 0
    ledger.prepare(request(4), 1.0, ANN.peer)


@pytest.mark.parametrize("use", ["leased", "sessions", "loading", "idle"])
@pytest.mark.parametrize("share", [1.0, 0.5, 0.01])
def test_whatever_one_owner_does_another_finds_a_place(use: str, share: float) -> None:
    ledger, ann = SpanLedger(1 << 30, owner_share=share), 0
    for name in range(LEASES_MAX):
        with suppress(Refused):
            lease = loaded(ledger, request(name), 0.0)
            ledger.require_use(lease)
            if use == "leased":
                lease.holders[ANN.peer] = Holding(LEASE, inf, b"")
            lease.sessions = int(use == "sessions")
            lease.state = SpanState.LOADING if use == "loading" else SpanState.LOADED
            ann += 1
    assert ann == (LEASES_MAX if use == "idle" else ledger.owner_places)
    assert ledger.owner_places == {1.0: LEASES_MAX - 1, 0.5: LEASES_MAX // 2, 0.01: 1}[share]
    prepared(ledger, request(9, owner="bob"), 1.0, BOB.peer)


def test_a_cache_beyond_its_owners_share_is_used_only_when_others_make_way() -> None:
    ledger = SpanLedger(4 * BLOCK_BYTES, owner_share=0.5)
    caches = [loaded(ledger, request(name), 0.0) for name in range(4)]
    for lease in caches[:2]:
        ledger.require_use(lease)
        lease.sessions = 1
    for name in (2, 3):
        assert reason_of(lambda name=name: ledger.require_use(caches[name])) == RefusalReason.MEMORY
        assert reason_of(lambda name=name: ledger.prepare(request(name), 1.0, ANN.peer)) == RefusalReason.MEMORY
    ledger.require_use(caches[0])
    ledger.prepare(request(0), 1.0, ANN.peer)
    caches[1].sessions = 0
    ledger.require_use(caches[2])


def test_the_disk_is_bounded_before_a_byte_is_uploaded() -> None:
    size = sum(request(1).shards.values())
    ledger = SpanLedger(1 << 30, disk_bytes=2 * size)
    prepared(ledger, request(1), 0.0)
    second = prepared(ledger, request(2), 0.0)
    assert ledger.available_disk_bytes == 0
    assert reason_of(lambda: ledger.prepare(request(3), 1.0, ANN.peer)) == RefusalReason.DISK
    second.holders.clear()
    assert ledger.available_disk_bytes == size, "what nobody leases makes room"
    ledger.prepare(request(3), 1.0, ANN.peer)


def test_sessions_need_no_disk_and_a_cache_that_is_leased_again_is_counted_again() -> None:
    size = sum(request(1).shards.values())
    ledger = SpanLedger(1 << 30, disk_bytes=2 * size, owner_share=0.75)
    first, second = loaded(ledger, request(1), 0.0), loaded(ledger, request(2), 0.0)
    first.sessions = second.sessions = 1
    assert not ledger.pinned()
    for name in (3, 4):
        prepared(ledger, request(name), 1.0)
    assert ledger.pinned() == ledger.leased() == request(3).shards.keys() | request(4).shards.keys()
    assert reason_of(lambda: ledger.prepare(request(1), 2.0, ANN.peer)) == RefusalReason.DISK
    first.state = SpanState.LOADING
    assert ledger.pinned() - ledger.leased() == request(1).shards.keys()


def test_an_owner_cannot_lease_caches_beyond_its_share() -> None:
    ledger = SpanLedger(4 * BLOCK_BYTES, owner_share=0.5)
    loaded(ledger, request(1), 0.0)
    for name in (2, 3):
        prepared(ledger, request(name), 1.0)
    assert reason_of(lambda: ledger.prepare(request(1), 2.0, ANN.peer)) == RefusalReason.MEMORY


def test_a_shard_of_two_spans_is_on_disk_once() -> None:
    data, _, (shard,) = make_manifest(ANN, 1)
    again, _, _ = make_manifest(BOB, 1, shards=[shard])
    ledger = SpanLedger(1 << 30, disk_bytes=len(shard))
    prepared(ledger, read_span(data, 0, 1), 0.0)
    prepared(ledger, read_span(again, 0, 1), 0.0, BOB.peer)


def test_preparing_again_keeps_the_span_and_another_range_replaces_it() -> None:
    ledger = SpanLedger(2 * BLOCK_BYTES)
    data, _, _ = make_manifest(ANN, 3)
    whole, part = read_span(data, 0, 2), read_span(data, 1, 3)
    lease = loaded(ledger, whole, 0.0)
    assert ledger.prepare(whole, 5.0, ANN.peer) == ()
    assert ledger.holds(lease)
    assert lease.state is SpanState.LOADED
    assert lease.touched == 5.0
    lease.sessions = 1
    assert reason_of(lambda: ledger.prepare(part, 6.0, ANN.peer)) == RefusalReason.SESSIONS
    lease.sessions, lease.state = 0, SpanState.LOADING
    assert reason_of(lambda: ledger.prepare(part, 6.0, ANN.peer)) == RefusalReason.SESSIONS
    lease.state = SpanState.LOADED
    lease.holders[BOB.peer] = Holding(LEASE, inf, b"")
    assert reason_of(lambda: ledger.prepare(part, 6.0, ANN.peer)) == RefusalReason.SESSIONS, "another leases it"
    lease.holders = {ANN.peer: Holding(LEASE, inf, b"")}
    assert ledger.prepare(part, 7.0, ANN.peer) == (lease,), "its own memory counts as free for it"
    assert ledger.leases[part.deployment].request == part


def test_a_silent_upload_is_dropped_and_a_loaded_span_is_not() -> None:
    ledger = SpanLedger(1 << 30)
    loaded(ledger, request(1), 0.0)
    ledger.prepare(request(2), 0.0, ANN.peer)
    busy = ledger.leases[request(2).deployment]
    assert ledger.silent(UPLOAD_SILENCE_S - 1) == ()
    busy.touched = 10.0
    assert ledger.silent(UPLOAD_SILENCE_S) == ()
    assert ledger.silent(UPLOAD_SILENCE_S + 10) == (busy,)
    assert list(ledger.leases) == [request(1).deployment]


def test_no_more_deployments_than_an_advert_can_name() -> None:
    ledger = SpanLedger(1 << 30)
    for name in range(LEASES_MAX):
        prepared(ledger, request(name, owner="ann" if name else "bob"), 0.0)
    for owner in ("ann", "carl"):
        wanted = request(99, owner=owner)
        assert reason_of(lambda wanted=wanted: ledger.prepare(wanted, 1.0, wanted.owner)) == RefusalReason.MEMORY
    lease = ledger.leases[request(3).deployment]
    lease.holders.clear()
    assert ledger.prepare(request(99), 1.0, ANN.peer) == (lease,)


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
    ledger.prepare(read_span(data, 0, 1), 0.0, ANN.peer)
    (old,) = ledger.prepare(read_span(data, 1, 2), 0.0, ANN.peer)
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


Action = tuple[str, int, int, int]  # what, session or size, holder, bytes
ACTIONS = st.tuples(
    st.sampled_from(["open", "close", "lease", "end"]), st.integers(0, 5), st.integers(0, 2), st.integers(0, 60)
)


@given(st.lists(ACTIONS, max_size=80))
def test_kv_is_never_promised_twice_and_all_of_it_comes_back(actions: list[Action]) -> None:
    pool = KvPool(100)
    for what, name, holder, size in actions:
        session, key = SessionId(bytes([name]) * 16), (DeploymentId(bytes(16)), PeerId(str(holder)))
        before = pool.used_bytes
        try:
            if what == "open" and session not in pool._sessions:
                pool.reserve(session, size, key)
            elif what == "lease":
                pool.set_aside(key, size)
            elif what == "close":
                pool.release(session)
            elif what == "end":
                pool.give_up(key)
        except Refused:
            assert pool.used_bytes == before
        reserved = sum(share.reserved_bytes for share in pool._shares.values())
        assert pool.used_bytes == reserved + sum(drawn.pool_bytes for drawn in pool._sessions.values()) <= 100
        for key, share in pool._shares.items():
            drawn = sum(each.leased_bytes for each in pool._sessions.values() if each.key == key)
            assert share.drawn_bytes == drawn <= share.reserved_bytes
    for session in list(pool._sessions):
        pool.release(session)
    for key in list(pool._shares):
        pool.give_up(key)
    assert pool.used_bytes == 0


def test_a_session_draws_on_its_clients_lease_first() -> None:
    pool, ann, bob = KvPool(100), (DEPLOYMENT, ANN.peer), (DEPLOYMENT, BOB.peer)
    first, second, third = (SessionId(bytes([name]) * 16) for name in range(3))
    pool.set_aside(ann, 60)
    assert reason_of(lambda: pool.reserve(first, 41, bob)) == RefusalReason.KV_MEMORY, "what is leased is not Bob's"
    pool.reserve(first, 40, bob)
    pool.reserve(second, 50, ann)
    with pytest.raises(Refused, match="10 bytes are missing"):
        pool.reserve(third, 20, ann)
    pool.give_up(ann)
    assert pool.free_bytes == 10, "the open session keeps its bytes"
    pool.set_aside(ann, 10)
    pool.release(second)
    assert pool.free_bytes == 50
    assert pool.missing(bob, 60) == 10


def test_a_session_reserves_once() -> None:
    pool = KvPool(10)
    pool.reserve(SessionId(b"s" * 16), 1, (DEPLOYMENT, ANN.peer))
    with pytest.raises(LocalProtocolError):
        pool.reserve(SessionId(b"s" * 16), 1, (DEPLOYMENT, ANN.peer))


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
        (sign_manifest(dataclasses.replace(manifest, dtype="int8"), ANN), bad),
        (sign_manifest(dataclasses.replace(manifest, dtype="int32"), ANN), unsupported),
        (sign_manifest(dataclasses.replace(manifest, blocks=(block, wide)), ANN), bad),
    ]
    for data, reason in cases:
        assert reason_of(lambda data=data: read_span(data, 0, 2)) == reason
