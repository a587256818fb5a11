"""Capabilities: each reason to refuse one, and revocation within a bounded memory."""

from __future__ import annotations

from dataclasses import replace

import pytest

from protocol import limits
from protocol.capabilities import Capability, CapabilityGate, Claim, Right, issue_capability, rights_of
from protocol.errors import RemoteProtocolError
from protocol.ids import DeploymentId
from tests.helpers.protocol_samples import CAPABILITY, CLIENT, DEPLOYMENT, NEXT, NOW_MS, OTHER

LIFE_MS = round(limits.CAPABILITY_LIFE_MAX_S * 1000)
CLAIM = Claim(NEXT.peer, Right.USE, DEPLOYMENT, CLIENT.peer)


def test_the_owner_needs_none_and_the_holder_shows_one() -> None:
    gate = CapabilityGate()
    gate.admit(replace(CLAIM, peer=CLIENT.peer), b"", NOW_MS)
    gate.admit(CLAIM, issue_capability(CAPABILITY, CLIENT), NOW_MS)


@pytest.mark.parametrize(
    ("claim", "capability", "why"),
    [
        (CLAIM, replace(CAPABILITY, holder=OTHER.peer), "another peer"),
        (CLAIM, replace(CAPABILITY, deployment=DeploymentId(bytes(16))), "another deployment"),
        (replace(CLAIM, right=Right.MANAGE), CAPABILITY, "right to manage"),
        (CLAIM, replace(CAPABILITY, expires_ms=NOW_MS), "expired"),
        (CLAIM, replace(CAPABILITY, expires_ms=NOW_MS + LIFE_MS + 1), "lives too long"),
    ],
)
def test_a_capability_that_does_not_cover_the_claim_is_refused(claim: Claim, capability: Capability, why: str) -> None:
    with pytest.raises(RemoteProtocolError, match=why):
        CapabilityGate().admit(claim, issue_capability(capability, CLIENT), NOW_MS)


def test_what_the_owner_did_not_sign_is_refused() -> None:
    for data, why in (
        (b"", "no capability"),
        (issue_capability(CAPABILITY, NEXT), "did not sign"),
        (issue_capability(CAPABILITY, CLIENT)[:-1] + b"\0", "signature"),
        (b"rubbish", "msgpack"),
    ):
        with pytest.raises(RemoteProtocolError, match=why):
            CapabilityGate().admit(CLAIM, data, NOW_MS)


def test_a_revoked_capability_is_refused_until_it_has_expired() -> None:
    gate, data = CapabilityGate(), issue_capability(CAPABILITY, CLIENT)
    gate.revoke(OTHER.peer, CAPABILITY.serial, NOW_MS)
    gate.admit(CLAIM, data, NOW_MS)  # another owner's word about it counts for nothing
    gate.revoke(CLIENT.peer, CAPABILITY.serial, NOW_MS)
    with pytest.raises(RemoteProtocolError, match="revoked"):
        gate.admit(CLAIM, data, NOW_MS)
    assert CAPABILITY.expires_ms <= NOW_MS + LIFE_MS, "so it is dead before the revocation is forgotten"
    gate.revoke(OTHER.peer, bytes(16), NOW_MS + LIFE_MS + 1)
    assert (CLIENT.peer, CAPABILITY.serial) not in gate.revoked


def test_revocations_are_bounded_per_owner() -> None:
    gate = CapabilityGate()
    for number in range(limits.REVOKED_PER_OWNER_MAX):
        gate.revoke(CLIENT.peer, number.to_bytes(16, "big"), NOW_MS)
    with pytest.raises(RemoteProtocolError, match="more capabilities revoked"):
        gate.revoke(CLIENT.peer, bytes(14) + b"\xff\xff", NOW_MS + 1)
    gate.revoke(OTHER.peer, bytes(16), NOW_MS)
    assert rights_of([Right.USE, Right.FETCH, Right.USE]) == ("fetch", "use")


def test_nobody_can_make_a_worker_forget_what_others_revoked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "REVOKED_MAX", 8)
    gate = CapabilityGate()
    gate.revoke(CLIENT.peer, CAPABILITY.serial, NOW_MS)
    for number in range(100):
        gate.revoke(OTHER.peer, number.to_bytes(16, "big"), NOW_MS)
    assert len(gate.revoked) == 8
    assert (CLIENT.peer, CAPABILITY.serial) in gate.revoked
    gate.revoke(CLIENT.peer, CAPABILITY.serial, NOW_MS)
    assert len(gate.revoked) == 8, "the same again is nothing new"


def test_the_largest_capability_fits_its_bound() -> None:
    largest = replace(CAPABILITY, rights=rights_of(Right), expires_ms=1 << 53)
    assert len(issue_capability(largest, CLIENT)) <= limits.CAPABILITY_BYTES_MAX
