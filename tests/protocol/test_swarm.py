"""SwarmView is a fold: the latest advert of each peer, whatever the interleaving, and nothing that has expired."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.adverts import HeldSpan
from protocol.ids import DeploymentId, PeerId
from protocol.swarm import SwarmView
from tests.helpers.protocol_samples import ADVERT, CLIENT, DEPLOYMENT, NEXT, NOW_MS, OTHER, WORKER

PEERS = (WORKER.peer, NEXT.peer, OTHER.peer)
EVENTS = st.lists(
    st.tuples(st.sampled_from(PEERS), st.integers(1, 50), st.sampled_from([*PEERS, CLIENT.peer])), max_size=12
)


def fold(events: list[tuple[PeerId, int, PeerId]]) -> SwarmView:
    view = SwarmView()
    for peer, life_ms, received_from in events:
        view = view.with_advert(peer, replace(ADVERT, expires_ms=NOW_MS + life_ms), received_from, NOW_MS)
    return view


@settings(max_examples=100, deadline=None, derandomize=True)
@given(EVENTS, st.integers(0, 60))
def test_the_fold(events: list[tuple[PeerId, int, PeerId]], age_ms: int) -> None:
    view = fold(events)
    latest = {peer: (life_ms, received_from) for peer, life_ms, received_from in events}
    told = {peer: (member.advert.expires_ms - NOW_MS, member.received_from) for peer, member in view.members.items()}
    assert told == latest
    now = view.at(NOW_MS + age_ms)
    assert set(now.members) == {peer for peer, (life_ms, _) in latest.items() if life_ms > age_ms}
    assert now.at(NOW_MS + age_ms) is now
    assert [member.peer for member in view.ranked()] == sorted(latest)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(EVENTS)
def test_peers_do_not_touch_each_other(events: list[tuple[PeerId, int, PeerId]]) -> None:
    by_peer = sorted(events, key=lambda event: event[0])
    assert fold(events).ranked() == fold(by_peer).ranked()


def test_a_worker_with_a_slow_clock_stays_for_its_adverts_life() -> None:
    late = replace(ADVERT, issued_ms=NOW_MS - 10_000, expires_ms=NOW_MS - 4_000)
    view = SwarmView().with_advert(WORKER.peer, late, WORKER.peer, NOW_MS)
    assert view.at(NOW_MS + 5999) is view
    assert not view.at(NOW_MS + 6000).members


def test_a_view_does_not_change() -> None:
    empty = SwarmView()
    one = empty.with_advert(WORKER.peer, ADVERT, WORKER.peer, NOW_MS)
    assert (len(empty.members), len(one.members)) == (0, 1)
    with pytest.raises(TypeError):
        one.members[NEXT.peer] = one.members[WORKER.peer]  # type: ignore[index]


def test_holders_are_ranked_and_of_one_deployment() -> None:
    other = DeploymentId(bytes(16))
    spans = (HeldSpan(DEPLOYMENT, 0, 2, 1), HeldSpan(other, 0, 9, 1), HeldSpan(DEPLOYMENT, 4, 6, 1))
    view = SwarmView()
    for peer in PEERS:
        view = view.with_advert(peer, replace(ADVERT, spans=spans), peer, NOW_MS)
    holders = view.holders(DEPLOYMENT)
    assert [member.peer for member, _ in holders] == sorted([*PEERS, *PEERS])
    assert {(span.start, span.end) for _, span in holders} == {(0, 2), (4, 6)}
