"""Invites: what is printed is read back, and any other text says what is wrong with it."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import limits
from protocol.errors import InputError
from protocol.ids import peer_id_of
from protocol.invites import PREFIX, Invite, InvitePeer, is_invite, make_invite, parse_invite, print_invite
from protocol.membership import PUBLIC_SWARM, SwarmKey
from tests.helpers.protocol_samples import INVITE, records

KEY = SwarmKey(bytes(range(32)))
PRIVATE = make_invite(KEY, INVITE.peers)
TEXT = print_invite(PRIVATE)


@given(records(Invite))
def test_what_is_printed_is_read_back(invite: Invite) -> None:
    text = print_invite(invite)
    assert parse_invite(text) == invite
    assert text.isascii()
    assert len(text) <= limits.INVITE_CHARS_MAX


def test_it_leads_to_its_peers_and_carries_the_key() -> None:
    peer = PRIVATE.peers[0].peer
    assert PRIVATE.addrs == (
        f"/ip4/192.0.2.7/tcp/4001/p2p/{peer}",
        f"/dns4/worker.example/tcp/4001/p2p/{peer}",
    )
    assert PRIVATE.key is not None
    assert PRIVATE.key.secret == KEY.secret
    assert INVITE.key is None
    assert KEY.secret.hex() not in repr(PRIVATE)
    assert repr(KEY.secret) not in repr(PRIVATE)


def test_the_largest_fits() -> None:
    peers = tuple(InvitePeer(bytes([i]) * 32, ("x" * limits.ADDR_CHARS_MAX,) * limits.ADDRS_MAX) for i in range(4))
    assert len(peers) == limits.INVITE_PEERS_MAX
    assert parse_invite(print_invite(make_invite(KEY, peers))).peers[3].peer == peer_id_of(b"\3" * 32)
    with pytest.raises(ValueError, match="peers"):
        make_invite(KEY, peers * 2)


def test_white_space_of_terminals_and_mails_is_ignored() -> None:
    assert parse_invite(f"  {TEXT[:30]}\r\n  {TEXT[30:]}\n") == PRIVATE


@pytest.mark.parametrize("cut", range(len(PREFIX), len(TEXT)))
def test_a_cut_invite_is_noticed(cut: int) -> None:
    with pytest.raises(InputError, match="copy it again"):
        parse_invite(TEXT[:cut])


@pytest.mark.parametrize("place", range(len(PREFIX), len(TEXT)))
def test_a_mistyped_character_is_noticed(place: int) -> None:
    for letter in "A_9z!é":
        if letter != TEXT[place]:
            with pytest.raises(InputError, match="copy it again"):
                parse_invite(TEXT[:place] + letter + TEXT[place + 1 :])


@given(st.one_of(st.text(max_size=200), st.text("ABCZabcz019-_=", max_size=200).map(lambda text: PREFIX + text)))
def test_any_other_text_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        parse_invite(text)


@given(st.binary(max_size=200))
def test_a_checksum_makes_no_record_valid(record: bytes) -> None:
    """Who makes tokens by hand gets the checksum right."""
    with pytest.raises(InputError):
        parse_invite(_wrapped(record))


def test_a_swarm_that_is_not_the_keys_is_refused() -> None:
    with pytest.raises(ValueError, match="not the one"):
        Invite(PUBLIC_SWARM, KEY.secret, INVITE.peers)
    with pytest.raises(ValueError, match="not the one"):
        Invite(KEY.swarm, b"", INVITE.peers)
    with pytest.raises(ValueError, match="32 bytes"):
        Invite(KEY.swarm, KEY.secret[:16], INVITE.peers)


def test_there_is_one_text_for_each_invite() -> None:
    for again in (TEXT + "=", TEXT + "==", TEXT + "A", TEXT + "AAAA", PREFIX + TEXT[len(PREFIX) :].swapcase()):
        with pytest.raises(InputError):
            parse_invite(again)


def test_too_long_is_refused_before_it_is_decoded() -> None:
    with pytest.raises(InputError, match="at most 4096"):
        parse_invite(PREFIX + "A" * (1 << 20))


def test_an_invite_is_told_from_an_address() -> None:
    assert is_invite(TEXT)
    assert is_invite(" sotto2later")
    assert not is_invite("/ip4/192.0.2.7/tcp/4001")
    with pytest.raises(InputError, match="update"):
        parse_invite("sotto2later")


def _wrapped(record: bytes) -> str:
    from hashlib import blake2b

    data = len(record).to_bytes(2, "big") + record
    check = blake2b(data, digest_size=4, person=b"sotto-invite").digest()
    return PREFIX + base64.urlsafe_b64encode(data + check).decode().rstrip("=")
