"""The state machine of reachability, by its table."""

from __future__ import annotations

import pytest

from node.p2p.reach import VERDICT_LIFE_S, VERDICTS_MAX, Reach, ReachState
from protocol.ids import PeerId

LAN, OUTSIDE, CIRCUIT = "/ip4/10.0.0.2/tcp/4517", "/ip4/11.0.0.1/tcp/4517", "/ip4/11.0.0.9/tcp/1/p2p/R/p2p-circuit"
PEERS = [PeerId(f"peer {index}") for index in range(40)]


def reach_after(*verdicts):
    """`verdicts`: (address or None, whether the peer is outside), one per peer."""
    reach = Reach()
    for index, (addr, outside) in enumerate(verdicts):
        reach.heard(PEERS[index], addr, outside, float(index))
    return reach


@pytest.mark.parametrize(
    ("verdicts", "state"),
    [
        ([], ReachState.UNKNOWN),
        ([(LAN, False)], ReachState.PUBLIC),
        ([(OUTSIDE, True)], ReachState.PUBLIC),
        ([(None, False)], ReachState.UNREACHABLE),
        ([(OUTSIDE, True), (None, True)], ReachState.UNREACHABLE),  # a tie is no majority
        ([(OUTSIDE, True), (OUTSIDE, True), (None, True)], ReachState.PUBLIC),
        ([(LAN, False), (LAN, False), (None, True)], ReachState.UNREACHABLE),  # the house is not the internet
        ([(None, False), (None, False), (OUTSIDE, True)], ReachState.PUBLIC),
    ],
)
def test_verdicts_give_the_state(verdicts, state):
    assert reach_after(*verdicts).state is state


def test_a_hidden_node_is_relayed_once_a_relay_was_found():
    reach = reach_after((None, True))
    reach.relay_through((CIRCUIT,))
    assert reach.state is ReachState.RELAYED
    assert reach.addrs((LAN,), 4) == (LAN, CIRCUIT)
    reach.relay_through(())
    assert reach.state is ReachState.UNREACHABLE


def test_a_mapped_port_is_believed_when_others_dialled_it():
    reach = reach_after((None, True))
    reach.map_to(OUTSIDE)
    assert reach.state is ReachState.UNKNOWN, "what was said before the mapping is void"
    assert reach.addrs((LAN,), 4) == (OUTSIDE, LAN)
    reach.heard(PEERS[0], OUTSIDE, True, 1.0)
    assert reach.state is ReachState.MAPPED
    reach.map_to(None)
    assert reach.state is ReachState.UNKNOWN


def test_a_forwarded_port_is_announced_first_as_others_see_it():
    assert reach_after((OUTSIDE, True)).addrs((LAN,), 4) == (OUTSIDE, LAN)
    assert reach_after((LAN, False)).addrs((OUTSIDE, LAN), 4) == (OUTSIDE, LAN), "known addresses keep their order"


def test_one_address_is_announced_that_others_say_and_only_by_a_majority():
    lies = [(f"/ip4/10.0.0.{index}/tcp/80", True) for index in range(5)]
    assert reach_after(*lies).addrs((LAN,), 4) == (LAN,)
    assert reach_after((OUTSIDE, True), (LAN, True)).addrs((LAN,), 4) == (LAN,), "half is no majority"
    assert reach_after((OUTSIDE, True), (None, True), (LAN, True)).confirmed is None
    honest = [(OUTSIDE, True)] * 3
    assert reach_after(*lies[:2], *honest).addrs((LAN,), 4) == (OUTSIDE, LAN)
    assert reach_after(*lies[:2], *[(LAN, True)] * 3).addrs((LAN,), 4) == (LAN,)


def test_a_node_that_can_announce_no_address_at_which_it_was_dialled_needs_a_relay():
    other = "/ip4/11.0.0.2/tcp/4517"
    reach = reach_after((OUTSIDE, True), (other, True))
    reach.own = lambda: (LAN,)
    assert (reach.confirmed, reach.state) == (None, ReachState.UNREACHABLE)
    reach.relay_through((CIRCUIT,))
    assert reach.state is ReachState.RELAYED
    assert reach.addrs((LAN,), 4) == (LAN, CIRCUIT)
    reach.heard(PEERS[2], OUTSIDE, True, 2.0)
    assert reach.state is ReachState.PUBLIC
    assert reach.addrs((LAN,), 4) == (OUTSIDE, LAN)


def test_half_of_the_peers_suffice_for_an_address_that_is_announced_anyway():
    reach = reach_after((OUTSIDE, True), ("/ip4/11.0.0.2/tcp/4517", True))
    reach.own = lambda: (LAN, OUTSIDE)
    assert reach.state is ReachState.PUBLIC
    reach.own = lambda: (LAN,)
    reach.map_to(OUTSIDE)
    reach.heard(PEERS[0], OUTSIDE, True, 1.0)
    reach.heard(PEERS[1], LAN, True, 1.0)
    assert reach.state is ReachState.MAPPED


def test_what_others_say_leaves_room_for_what_the_node_knows():
    direct = tuple(f"/ip4/10.0.0.{index}/tcp/1" for index in range(4))
    reach = reach_after((OUTSIDE, True))
    assert reach.addrs(direct, 4) == (OUTSIDE, *direct[:3])
    assert reach.addrs(direct, 1) == direct[:1]
    assert reach.addrs((), 1) == (OUTSIDE,)
    reach.map_to("/ip4/11.0.0.1/tcp/9")
    reach.heard(PEERS[0], None, True, 1.0)
    reach.relay_through((CIRCUIT, CIRCUIT + "2", CIRCUIT + "3"))
    assert reach.addrs(direct, 4) == (direct[0], CIRCUIT, CIRCUIT + "2", CIRCUIT + "3")


def test_a_circuit_keeps_its_place_in_a_full_list():
    reach = reach_after((None, True))
    reach.relay_through((CIRCUIT,))
    assert reach.addrs(tuple(f"/ip4/10.0.0.{i}/tcp/1" for i in range(9)), 4)[-1] == CIRCUIT
    assert len(reach.addrs(("a", "b", "c", "d", "e"), 4)) == 4


def test_no_listener_is_no_reachability():
    reach = Reach()
    reach.shut()
    assert reach.state is ReachState.UNREACHABLE


def test_a_peer_has_one_verdict_and_it_is_forgotten():
    reach = reach_after((None, True))
    reach.heard(PEERS[0], OUTSIDE, True, 1.0)
    assert reach.state is ReachState.PUBLIC
    reach.heard(PEERS[1], None, True, 2.0 + VERDICT_LIFE_S)
    assert (reach.verdicts, reach.state) == (1, ReachState.UNREACHABLE)
    for peer in PEERS:
        reach.heard(peer, None, True, 3.0 + VERDICT_LIFE_S)
    assert reach.verdicts == VERDICTS_MAX


def test_what_was_said_of_addresses_of_before_is_void():
    told = []
    reach = reach_after((LAN, False), (LAN, False))
    reach.on_change = lambda: told.append((reach.state, reach.verdicts))
    reach.moved()
    assert told == [(ReachState.UNKNOWN, 0)]


def test_every_change_is_told_and_nothing_else():
    told = []
    reach = Reach(on_change=lambda: told.append(reach.state))
    reach.heard(PEERS[0], None, True, 0.0)
    reach.heard(PEERS[1], None, True, 0.0)
    reach.relay_through((CIRCUIT,))
    reach.relay_through((CIRCUIT,))
    assert told == [ReachState.UNREACHABLE, ReachState.RELAYED]
