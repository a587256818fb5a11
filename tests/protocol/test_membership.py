"""What follows from a private swarm's key: names, proofs, boxes; and what a stranger cannot do with any of it."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.adverts import TOPIC
from protocol.errors import InputError, RemoteProtocolError
from protocol.invites import parse_invite
from protocol.limits import ADVERT_BYTES_MAX, GOSSIP_BYTES_MAX
from protocol.membership import NONCE_BYTES, PROOF_BYTES, PUBLIC_SWARM, SEAL_BYTES, Side, SwarmKey, swarm_of
from protocol.messages import CONTROL, LINK, SESSION, SHARD
from tests.helpers.protocol_samples import CLIENT, NEXT, WORKER

KEY, OTHER = SwarmKey(bytes(range(32))), SwarmKey(bytes(range(1, 33)))
NONCE = bytes(NONCE_BYTES)


def test_names_are_fixed_by_the_key_and_tell_nothing_of_another_swarms() -> None:
    again = SwarmKey(bytes(range(32)))
    assert (again.swarm, again.topic(TOPIC)) == (KEY.swarm, KEY.topic(TOPIC))
    assert len({KEY.swarm, OTHER.swarm, PUBLIC_SWARM}) == 3
    assert len({KEY.topic(TOPIC), OTHER.topic(TOPIC), KEY.topic("another"), TOPIC}) == 4
    assert (swarm_of(KEY), swarm_of(None)) == (KEY.swarm, PUBLIC_SWARM)


def test_a_proof_holds_for_one_pair_protocol_side_and_swarm() -> None:
    """Replayed elsewhere, sent back, or turned round, it is another one's."""
    peers = (CLIENT.peer, WORKER.peer, NEXT.peer)
    uses = list(product((KEY, OTHER), peers, peers, (CONTROL, SHARD, SESSION, LINK), Side))
    proofs = {key.proof(dialler, listener, protocol, side) for key, dialler, listener, protocol, side in uses}
    assert len(proofs) == len(uses)
    assert {len(proof) for proof in proofs} == {PROOF_BYTES}


def test_only_the_whole_proof_is_believed() -> None:
    proof = KEY.proof(CLIENT.peer, WORKER.peer, CONTROL, Side.DIAL)
    assert KEY.believes(proof, proof)
    for shown in (b"", proof[:-1], proof + b"\0", bytes(PROOF_BYTES), proof[:-1] + bytes([proof[-1] ^ 1])):
        assert not KEY.believes(shown, proof)


@given(st.binary(max_size=200))
def test_a_box_opens_for_its_members_topic_and_author_alone(data: bytes) -> None:
    box = KEY.seal(data, TOPIC, WORKER.peer, NONCE)
    assert len(box) == len(data) + SEAL_BYTES
    assert KEY.unseal(box, TOPIC, WORKER.peer) == data
    for key, topic, author in ((OTHER, TOPIC, WORKER.peer), (KEY, "x", WORKER.peer), (KEY, TOPIC, NEXT.peer)):
        with pytest.raises(RemoteProtocolError):
            key.unseal(box, topic, author)


@given(st.binary(max_size=120), st.integers(0, 119), st.integers(1, 255))
def test_what_no_member_sealed_does_not_open(noise: bytes, place: int, flip: int) -> None:
    with pytest.raises(RemoteProtocolError):
        KEY.unseal(noise, TOPIC, WORKER.peer)
    box = bytearray(KEY.seal(b"an advert", TOPIC, WORKER.peer, NONCE))
    box[place % len(box)] ^= flip
    with pytest.raises(RemoteProtocolError):
        KEY.unseal(bytes(box), TOPIC, WORKER.peer)


def test_the_largest_advert_fits_sealed() -> None:
    assert len(KEY.seal(bytes(ADVERT_BYTES_MAX), TOPIC, WORKER.peer, NONCE)) <= GOSSIP_BYTES_MAX


def test_the_key_is_not_shown_and_has_one_size() -> None:
    assert KEY.secret.hex() not in repr(KEY)
    assert KEY.swarm.hex() in repr(KEY)
    for size in (0, 31, 33):
        with pytest.raises(InputError, match="32 bytes"):
            SwarmKey(bytes(size))


def test_vectors() -> None:
    file = Path(__file__).parents[1] / "vectors" / "membership.json"
    stored = json.loads(file.read_text(encoding="utf-8"))
    key = SwarmKey(bytes.fromhex(stored["secret"]))
    assert (key.swarm.hex(), key.topic(stored["topic"]["name"])) == (stored["swarm"], stored["topic"]["derived"])
    for entry in stored["proofs"]:
        proof = key.proof(entry["dialler"], entry["listener"], entry["protocol"], Side(entry["side"]))
        assert proof.hex() == entry["proof"]
    sealed = stored["sealed"]
    assert key.unseal(bytes.fromhex(sealed["box"]), sealed["topic"], sealed["author"]).hex() == sealed["data"]
    public, private = (parse_invite(entry["text"]) for entry in stored["invites"])
    assert public.key is None
    assert private.swarm == key.swarm
