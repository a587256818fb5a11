"""Leases as statements: signed by the worker they name, bounded in time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from protocol import limits
from protocol.codec import encode
from protocol.errors import RemoteProtocolError
from protocol.ids import PeerId
from protocol.leases import open_lease, sign_lease
from tests.helpers.protocol_samples import CLIENT, LEASE, NOW_MS, OTHER, WORKER


def test_a_lease_opens_for_whom_the_worker_signed_it() -> None:
    assert open_lease(sign_lease(LEASE, WORKER), WORKER.peer) == LEASE


@pytest.mark.parametrize(
    "data",
    [
        sign_lease(LEASE, OTHER),
        sign_lease(replace(LEASE, worker=OTHER.peer), WORKER),
        sign_lease(replace(LEASE, kv_tokens=1), WORKER)[:-64] + sign_lease(LEASE, WORKER)[-64:],
        encode(WORKER.sign("ticket/1", encode(LEASE))),
        b"",
    ],
    ids=["another signer", "another worker", "changed", "another purpose", "nothing"],
)
def test_what_another_signed_is_no_lease(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        open_lease(data, WORKER.peer)


@pytest.mark.parametrize(
    "change",
    [
        {"end": 0},
        {"expires_ms": NOW_MS},
        {"expires_ms": NOW_MS + limits.LEASE_S_MAX * 1000 + 1},
        {"holder": PeerId("0" * 52)},
        {"owner": PeerId("")},
    ],
)
def test_a_lease_that_contradicts_itself_cannot_exist(change: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        replace(LEASE, **change)


def test_the_largest_lease_fits_its_bound() -> None:
    big = 1 << 52
    largest = replace(
        LEASE, start=255, end=256, weight_bytes=1 << 53, kv_tokens=limits.CONTEXT_TOKENS_MAX, granted_ms=big,
        expires_ms=big + 1, holder=CLIENT.peer,
    )  # fmt: skip
    assert len(sign_lease(largest, WORKER)) <= limits.LEASE_BYTES_MAX
