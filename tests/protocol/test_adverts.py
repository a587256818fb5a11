"""Adverts: what the gate refuses, that a refusal changes nothing, and that it forgets only what cannot be replayed."""

from __future__ import annotations

from dataclasses import replace
from hashlib import blake2b

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import limits
from protocol.adverts import (
    Advert,
    AdvertGate,
    AdvertRefused,
    HeldSpan,
    Rtt,
    Speed,
    advert_interval_s,
    believed_until_ms,
    peer_tag,
    sign_advert,
)
from protocol.codec import decode, encode
from protocol.errors import RemoteProtocolError
from protocol.ids import DeploymentId
from protocol.signed import Identity, Signed
from tests.helpers.protocol_samples import ADVERT, CLIENT, MANIFEST, NOW_MS, OTHER, WORKER

SKEW_MS = int(limits.CLOCK_SKEW_MAX_S * 1000)
LIFE_MS = int(limits.ADVERT_LIFE_MAX_S * 1000)


def admit(gate: AdvertGate, advert: Advert, now_ms: int = NOW_MS, identity: Identity = WORKER) -> Advert:
    return gate.admit(sign_advert(advert, identity), identity.peer, now_ms)


def test_a_good_advert_is_believed() -> None:
    gate = AdvertGate()
    assert admit(gate, ADVERT) == ADVERT
    assert admit(gate, replace(ADVERT, sequence=ADVERT.sequence + 1)).sequence == ADVERT.sequence + 1


@pytest.mark.parametrize("back", [0, 1, 1000])
def test_a_replay_is_refused(back: int) -> None:
    gate = AdvertGate()
    admit(gate, ADVERT)
    with pytest.raises(RemoteProtocolError, match="replay"):
        admit(gate, replace(ADVERT, sequence=ADVERT.sequence - back))


def test_sequences_are_kept_for_each_peer() -> None:
    gate = AdvertGate()
    admit(gate, ADVERT)
    admit(gate, replace(ADVERT, sequence=0), identity=OTHER)


@pytest.mark.parametrize(
    ("issued", "expires", "why"),
    [
        (-SKEW_MS - 6000, -SKEW_MS, "expired"),
        (-SKEW_MS - 6000, -SKEW_MS - 1, "expired"),
        (SKEW_MS + 1, SKEW_MS + 6000, "future"),
    ],
)
def test_a_wrong_time_is_refused(issued: int, expires: int, why: str) -> None:
    gate = AdvertGate()
    with pytest.raises(RemoteProtocolError, match=why):
        admit(gate, replace(ADVERT, issued_ms=NOW_MS + issued, expires_ms=NOW_MS + expires))
    assert gate.latest == {}


@pytest.mark.parametrize(
    ("issued", "expires"), [(-6000, 1), (-SKEW_MS - 6000, 1 - SKEW_MS), (SKEW_MS, SKEW_MS + 6000), (0, LIFE_MS)]
)
def test_a_tolerable_time_is_not(issued: int, expires: int) -> None:
    admit(AdvertGate(), replace(ADVERT, issued_ms=NOW_MS + issued, expires_ms=NOW_MS + expires))


@pytest.mark.parametrize(
    "change",
    [
        {"expires_ms": NOW_MS},
        {"expires_ms": NOW_MS - 1},
        {"expires_ms": NOW_MS + LIFE_MS + 1},
        {"memory_free_bytes": ADVERT.memory_bytes + 1},
        {"kv_free_bytes": ADVERT.memory_bytes + 1},
        {"sequence": -1},
        {"device": ""},
        {"addrs": ("a" * 129,)},
    ],
)
def test_an_advert_that_contradicts_itself_cannot_exist(change: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        replace(ADVERT, **change)


def test_numbers_that_would_mislead_placement_cannot_exist() -> None:
    for make in (
        lambda: Speed("float32", 0.0, 1.0),
        lambda: Speed("float32", 1.0, -1.0),
        lambda: Speed("float32", float("inf"), 1.0),
        lambda: Rtt(bytes(8), -0.5),
        lambda: HeldSpan(MANIFEST.deployment, 4, 4, 1),
    ):
        with pytest.raises(ValueError):
            make()


def test_forged_adverts_are_refused() -> None:
    gate, data = AdvertGate(), sign_advert(ADVERT, WORKER)
    signed = decode(Signed, data)
    forged = [
        encode(CLIENT.sign("advert/1", signed.payload)),  # signed by another than the author
        encode(Signed(signed.public_key, signed.payload, bytes(64))),
        encode(Signed(signed.public_key, encode(replace(ADVERT, memory_bytes=1 << 50)), signed.signature)),
        encode(WORKER.sign("ticket/1", signed.payload)),  # a signature for another purpose
        encode(WORKER.sign("advert/1", encode(MANIFEST))),  # another record
        signed.payload,
        b"",
    ]
    for wrong in forged:
        with pytest.raises(RemoteProtocolError):
            gate.admit(wrong, WORKER.peer, NOW_MS)
    with pytest.raises(RemoteProtocolError, match="another than its author"):
        gate.admit(data, CLIENT.peer, NOW_MS)
    assert gate.latest == {}


def test_every_changed_byte_is_refused() -> None:
    gate, data = AdvertGate(), sign_advert(ADVERT, WORKER)
    for at in range(len(data)):
        with pytest.raises(RemoteProtocolError):
            gate.admit(data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :], WORKER.peer, NOW_MS)
    assert gate.latest == {}


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.binary(max_size=200))
def test_any_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        AdvertGate().admit(data, WORKER.peer, NOW_MS)


def full_advert(addrs: tuple[str, ...]) -> Advert:
    def fill(size: int, number: int) -> bytes:
        return blake2b(bytes([number]), digest_size=size).digest()

    return replace(
        ADVERT,
        addrs=addrs,
        memory_bytes=1 << 40,
        memory_free_bytes=1 << 39,
        kv_free_bytes=1 << 38,
        disk_free_bytes=1 << 40,
        speeds=tuple(Speed(dtype, 3350.75, 989_000.5) for dtype in ("float32", "bfloat16", "float16", "int8")),
        spans=tuple(HeldSpan(DeploymentId(fill(16, n)), 128, 256, 98_765) for n in range(limits.ADVERT_SPANS_MAX)),
        rtts=tuple(Rtt(fill(8, n), 123.456 * n) for n in range(limits.ADVERT_RTTS_MAX)),
        device="cuda:0",
    )


def test_sixteen_rtts_and_eight_spans_fit() -> None:
    v4, v6 = "/ip4/203.0.113.112/tcp/40123", "/ip6/2001:0db8:85a3:0000:0000:8a2e:0370:7334/tcp/40123"
    assert len(sign_advert(full_advert((v4, v4, v6, v6)), WORKER)) <= limits.ADVERT_BYTES_MAX


def test_what_does_not_fit_is_neither_sent_nor_read() -> None:
    large = full_advert(("/dns4/" + "a" * 120,) * 4)
    with pytest.raises(ValueError, match="at most"):
        sign_advert(large, WORKER)
    with pytest.raises(RemoteProtocolError, match="at most"):
        AdvertGate().admit(encode(WORKER.sign("advert/1", encode(large))), WORKER.peer, NOW_MS)


def test_the_gate_is_bounded_and_lets_expired_peers_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PEERS_MAX", 3)
    gate = AdvertGate()
    identities = [Identity(bytes([50 + number]) * 32) for number in range(5)]
    for number, identity in enumerate(identities[:3]):
        admit(gate, replace(ADVERT, expires_ms=NOW_MS + 1000 * (number + 1)), identity=identity)
    with pytest.raises(RemoteProtocolError, match="too many peers"):
        admit(gate, ADVERT, identity=identities[3])
    assert set(gate.latest) == {identity.peer for identity in identities[:3]}
    admit(gate, replace(ADVERT, sequence=ADVERT.sequence + 1), identity=identities[2])  # who is known is still heard
    with pytest.raises(RemoteProtocolError, match="too many peers"):  # the last of the first could still be replayed
        admit(gate, ADVERT, now_ms=NOW_MS + 1000, identity=identities[3])
    admit(gate, ADVERT, now_ms=NOW_MS + 1000 + SKEW_MS, identity=identities[3])
    assert len(gate.latest) == 3
    assert identities[0].peer not in gate.latest


def test_a_peer_is_not_forgotten_while_an_older_advert_of_its_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long-lived advert followed by a short-lived one: forgetting at the second's end would let the first return."""
    monkeypatch.setattr(limits, "PEERS_MAX", 1)
    gate = AdvertGate()
    long = replace(ADVERT, expires_ms=NOW_MS + 60_000)
    admit(gate, long)
    admit(gate, replace(ADVERT, sequence=ADVERT.sequence + 1, expires_ms=NOW_MS + 10))
    later_ms = NOW_MS + SKEW_MS + 20
    with pytest.raises(RemoteProtocolError, match="too many peers"):
        admit(gate, replace(ADVERT, expires_ms=NOW_MS + 90_000), now_ms=later_ms, identity=OTHER)
    with pytest.raises(RemoteProtocolError, match="replay"):
        admit(gate, long, now_ms=later_ms)


def test_a_worker_whose_clock_was_ahead_is_heard_again_when_its_last_advert_has_expired() -> None:
    """Its clock was an hour ahead and was set right; then it restarted, and its sequence with it."""
    gate, life_ms = AdvertGate(), 6000
    ahead = replace(ADVERT, sequence=NOW_MS + 3_600_000, issued_ms=NOW_MS, expires_ms=NOW_MS + life_ms)
    admit(gate, ahead)

    def restarted(now_ms: int) -> Advert:
        advert = replace(ADVERT, sequence=now_ms, issued_ms=now_ms, expires_ms=now_ms + life_ms)
        return admit(gate, advert, now_ms)

    over_ms = ahead.expires_ms + SKEW_MS
    with pytest.raises(RemoteProtocolError, match="replay"):
        restarted(over_ms - 1)
    assert restarted(over_ms).sequence == over_ms
    with pytest.raises(RemoteProtocolError, match="expired"):  # what it said before does not return
        admit(gate, ahead, over_ms)
    with pytest.raises(RemoteProtocolError, match="replay"):
        restarted(over_ms)
    assert restarted(over_ms + 2000).sequence == over_ms + 2000


def refusal(gate: AdvertGate, sequence: int, now_ms: int, identity: Identity = WORKER) -> str:
    """Why a good advert is refused; "" when it is not."""
    before = (dict(gate.latest), gate._room, gate._at_ms)
    try:
        admit(gate, replace(ADVERT, sequence=sequence, expires_ms=NOW_MS + LIFE_MS), now_ms, identity)
    except AdvertRefused as error:
        assert (gate.latest, gate._room, gate._at_ms) == before
        return error.reason
    return ""


def test_an_author_that_floods_is_heard_at_the_pace_of_an_honest_one() -> None:
    gate = AdvertGate()
    per_second = [
        [refusal(gate, 100 * second + n, NOW_MS + 1000 * second + n) for n in range(100)] for second in range(5)
    ]
    assert [answers.count("") for answers in per_second] == [limits.ADVERTS_BURST, 1, 1, 1, 1]
    assert {why for answers in per_second for why in answers} == {"", "rate"}
    assert refusal(gate, 0, NOW_MS + 5000, OTHER) == "", "others are heard beside it"


def test_a_worker_that_says_all_it_may_is_always_heard() -> None:
    """One advert a second for as long as it likes, each up to half a second late."""
    gate = AdvertGate()
    late_ms = (0, 480, 130, 500, 20, 350)
    assert not any(refusal(gate, n, NOW_MS + 1000 * n + late_ms[n % len(late_ms)]) for n in range(60))


def test_a_clock_that_is_set_back_shuts_nobody_out() -> None:
    gate = AdvertGate()
    assert [refusal(gate, n, NOW_MS) for n in range(4)] == ["", "", "", "rate"]
    gate._room, gate._at_ms = 0.0, NOW_MS
    assert refusal(gate, 0, NOW_MS, OTHER) == "crowd"
    assert refusal(gate, 5, NOW_MS - SKEW_MS) == ""
    assert refusal(gate, 0, NOW_MS - SKEW_MS, OTHER) == ""


def test_new_authors_are_rationed_and_known_ones_heard_meanwhile() -> None:
    gate = AdvertGate()
    assert refusal(gate, 0, NOW_MS) == ""
    gate._room = 2.0
    invented = [Identity(bytes([50 + number]) * 32) for number in range(10)]
    assert [refusal(gate, 0, NOW_MS, each) for each in invented] == ["", ""] + ["crowd"] * 8
    assert refusal(gate, 1, NOW_MS) == ""
    second = [refusal(gate, 0, NOW_MS + 100 * number, each) for number, each in enumerate(invented[2:])]
    assert second.count("") == 3, "five a second"


def test_a_newcomer_hears_a_swarm_of_a_thousand_in_its_first_minute() -> None:
    assert limits.ADVERT_AUTHORS_BURST >= 1000
    gate = AdvertGate()
    workers = [Identity(number.to_bytes(32, "big")) for number in range(1000)]
    heard = [refusal(gate, 0, NOW_MS + 60 * number, each) for number, each in enumerate(workers)]
    assert heard == [""] * 1000


@pytest.mark.parametrize(
    ("clock_s", "lives_s"),
    [(0, 6), (-6, 6), (-29, 6), (29, 6), (-33, 3)],  # at -33 its life was over 27 s ago
)
def test_an_advert_lives_by_the_receivers_clock_whatever_its_authors_says(clock_s: int, lives_s: int) -> None:
    issued_ms = NOW_MS + 1000 * clock_s
    told = replace(ADVERT, issued_ms=issued_ms, expires_ms=issued_ms + 6000)
    assert admit(AdvertGate(), told) == told
    assert believed_until_ms(told, NOW_MS) == NOW_MS + 1000 * lives_s


@pytest.mark.parametrize("peers", [0, 1, 10, 11, 300, 500, 6001, limits.PEERS_MAX])
def test_the_interval_keeps_every_node_below_five_a_second_until_its_ceiling(peers: int) -> None:
    interval_s = advert_interval_s(peers)
    assert peers / interval_s <= limits.ADVERTS_RECEIVED_PER_S or interval_s == limits.ADVERT_INTERVAL_MAX_S
    assert (interval_s == limits.ADVERT_INTERVAL_MAX_S) == (peers >= 300)
    assert interval_s >= limits.ADVERT_INTERVAL_MIN_S
    life_ms = int(limits.ADVERT_LIFE_INTERVALS * interval_s * 1000)
    assert replace(ADVERT, expires_ms=NOW_MS + life_ms).expires_ms == NOW_MS + life_ms  # its life is a legal one


def test_peer_tags_are_short_and_differ() -> None:
    tags = {peer_tag(identity.peer) for identity in (WORKER, CLIENT, OTHER)}
    assert len(tags) == 3
    assert {len(tag) for tag in tags} == {8}
