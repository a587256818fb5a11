"""Spans from a worker's own disk, read as if a stranger had sent them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.codec import encode
from protocol.errors import Refused, RemoteProtocolError
from protocol.ids import DeploymentId
from tests.helpers.workers import identity, make_manifest
from worker.saved import SavedSpan, read_saved

SIGNED, MANIFEST, _ = make_manifest(identity("owner"), 3)
DEPLOYMENT = MANIFEST.deployment
SAVED = encode(SavedSpan(SIGNED, 1, 3))


def test_what_was_saved_is_read_again() -> None:
    request = read_saved(DEPLOYMENT, SAVED)
    assert (request.owner, request.spec.manifest) == (identity("owner").peer, MANIFEST)
    assert (request.spec.start, request.spec.end) == (1, 3)
    assert encode(SavedSpan.of(request)) == SAVED


@pytest.mark.parametrize("span", [(0, 4), (2, 2), (2, 1)])
def test_a_span_that_is_none_is_refused(span: tuple[int, int]) -> None:
    with pytest.raises(Refused):
        read_saved(DEPLOYMENT, encode(SavedSpan(SIGNED, *span)))


def test_a_span_under_another_name_is_refused() -> None:
    with pytest.raises(RemoteProtocolError, match="another deployment"):
        read_saved(DeploymentId(b"X" * 16), SAVED)


@given(st.integers(0, len(SAVED) - 1), st.binary(max_size=8), st.integers(0, 8))
def test_no_damage_passes(at: int, put: bytes, cut: int) -> None:
    damaged = SAVED[:at] + put + SAVED[at + cut :]
    if damaged != SAVED:
        try:
            request = read_saved(DEPLOYMENT, damaged)
        except (Refused, RemoteProtocolError):
            return
        assert request.spec.manifest == MANIFEST, "only the range is not signed"


@given(st.binary(max_size=200))
def test_no_bytes_do_worse_than_be_refused(data: bytes) -> None:
    with pytest.raises((Refused, RemoteProtocolError)):
        read_saved(DEPLOYMENT, data)
