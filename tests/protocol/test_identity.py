"""Peer ids, signatures and sealed boxes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nacl.public import SealedBox
from nacl.signing import SigningKey

from protocol.codec import decode, encode
from protocol.errors import RemoteProtocolError
from protocol.ids import PEER_ID_CHARS, peer_id_of, public_key_of
from protocol.sealedbox import seal, unseal
from protocol.signed import Identity, Signed
from tests.helpers.protocol_samples import CLIENT, OTHER, WORKER

ONE_TIME = bytes(range(32))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.binary(min_size=32, max_size=32))
def test_a_peer_id_holds_its_key(key: bytes) -> None:
    peer = peer_id_of(key)
    assert len(peer) == PEER_ID_CHARS
    assert peer.startswith("12D3KooW")
    assert public_key_of(peer) == key


@pytest.mark.parametrize("key", [b"", bytes(31), bytes(33)])
def test_other_keys_have_no_peer_id(key: bytes) -> None:
    with pytest.raises(ValueError):
        peer_id_of(key)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.text(max_size=60)
    | st.text("123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz", min_size=52, max_size=52)
)
def test_any_text_is_a_peer_id_or_refused(text: str) -> None:
    try:
        assert peer_id_of(public_key_of(text)) == text
    except RemoteProtocolError:
        return


@pytest.mark.parametrize(
    "peer", ["", "1" * 52, "z" * 52, "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N", WORKER.peer[:-1] + "0"]
)
def test_what_is_no_ed25519_peer_id_is_refused(peer: str) -> None:
    with pytest.raises(RemoteProtocolError):
        public_key_of(peer)


def test_a_signature_holds_for_its_payload_domain_and_key_only() -> None:
    signed = CLIENT.sign("ticket/1", b"payload")
    assert signed.signer == CLIENT.peer
    assert signed.verify("ticket/1") == b"payload"
    others = [
        (signed, "advert/1"),
        (signed, "ticket/1\0"),
        (Signed(signed.public_key, b"payloae", signed.signature), "ticket/1"),
        (Signed(signed.public_key, signed.payload, bytes(64)), "ticket/1"),
        (Signed(OTHER.sign("x", b"").public_key, signed.payload, signed.signature), "ticket/1"),
        (Signed(bytes(32), signed.payload, signed.signature), "ticket/1"),
        (Signed(b"\xff" * 32, signed.payload, signed.signature), "ticket/1"),
    ]
    for statement, domain in others:
        with pytest.raises(RemoteProtocolError, match="bad signature"):
            statement.verify(domain)


def test_a_signature_has_one_form() -> None:
    """s and s + L sign the same in lax implementations: a second form would be a second digest of one statement."""
    order = (1 << 252) + 27742317777372353535851937790883648493
    signed = CLIENT.sign("advert/1", b"x")
    s = int.from_bytes(signed.signature[32:], "little") + order
    second = Signed(signed.public_key, signed.payload, signed.signature[:32] + s.to_bytes(32, "little"))
    with pytest.raises(RemoteProtocolError):
        second.verify("advert/1")


def test_an_identity_does_not_show_its_secret() -> None:
    shown = repr(CLIENT) + str(CLIENT)
    assert shown.count(CLIENT.peer) == 2
    assert CLIENT.seed.hex() not in shown
    assert not hasattr(CLIENT, "__dict__")
    assert Identity(CLIENT.seed).peer == CLIENT.peer


def test_everyone_puts_peers_in_another_order_and_always_in_the_same() -> None:
    peers = [peer_id_of(SigningKey(bytes([number]) * 32).verify_key.encode()) for number in range(40)]
    orders = [each.ranked(peers) for each in (CLIENT, OTHER, WORKER)]
    assert len({tuple(order) for order in (*orders, sorted(peers))}) == 4
    for each, order in zip((CLIENT, OTHER, WORKER), orders, strict=True):
        assert sorted(order) == sorted(peers)
        assert Identity(each.seed).ranked(reversed(peers)) == order
        assert each.ranked(peers[:9]) == [peer for peer in order if peer in peers[:9]]


def test_a_signed_statement_travels() -> None:
    signed = CLIENT.sign("manifest/1", bytes(300))
    assert decode(Signed, encode(signed)) == signed


def test_only_the_recipient_opens_a_box() -> None:
    box = seal(b"data", WORKER.peer, ONE_TIME)
    assert len(box) == 4 + 48
    assert unseal(box, WORKER) == b"data"
    with pytest.raises(RemoteProtocolError):
        unseal(box, OTHER)


def test_the_box_is_libsodiums() -> None:
    box = SealedBox(SigningKey(WORKER.seed).verify_key.to_curve25519_public_key()).encrypt(b"theirs")
    assert unseal(box, WORKER) == b"theirs"
    ours = seal(b"ours", WORKER.peer, ONE_TIME)
    assert SealedBox(SigningKey(WORKER.seed).to_curve25519_private_key()).decrypt(ours) == b"ours"


def test_every_changed_byte_spoils_a_box() -> None:
    box = seal(b"data", WORKER.peer, ONE_TIME)
    for at in range(len(box)):
        with pytest.raises(RemoteProtocolError):
            unseal(box[:at] + bytes([box[at] ^ 1]) + box[at + 1 :], WORKER)


@pytest.mark.parametrize("size", [0, 1, 47])
def test_a_short_box_is_refused(size: int) -> None:
    with pytest.raises(RemoteProtocolError):
        unseal(bytes(size), WORKER)


@pytest.mark.parametrize("peer", ["", "nobody", peer_id_of(bytes(32)), peer_id_of(b"\x01" + bytes(31))])
def test_nothing_is_sealed_to_a_weak_or_malformed_peer(peer: str) -> None:
    with pytest.raises(RemoteProtocolError):
        seal(b"data", peer, ONE_TIME)  # type: ignore[arg-type]
