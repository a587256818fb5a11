"""Golden vectors: today's code gives yesterday's bytes, reads them back, and refuses what is malformed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from protocol import errors
from protocol.adverts import AdvertGate
from protocol.codec import decode_message, encode_message
from protocol.framing import FrameDecoder
from protocol.ids import peer_id_of, public_key_of
from protocol.limits import STEP_FRAME_BYTES_MAX
from protocol.manifest import open_manifest
from protocol.messages import MESSAGES
from protocol.reports import ReportGate
from protocol.sealedbox import unseal
from protocol.signed import Identity
from protocol.tickets import TicketGate
from tests.helpers.protocol_samples import ADVERT, CLIENT, MANIFEST, REPORT, SAMPLES, TICKET, WORKER, body_of
from tests.tools import protocol_vectors

FOLDER = Path(__file__).parents[1] / "vectors"
# (public key, peer id): the key of the peer id specification and one of ours, with the ids that py-libp2p 0.8.1 gives.
PEER_IDS = [
    (
        "1ed1e8fae2c4a144b8be8fd4b47bf3d3b34b871c3cacf6010f0e42d474fce27e",
        "12D3KooWBtg3aaRMjxwedh83aGiUkwSxDwUZkzuJcfaqUmo7R3pq",
    ),
    (
        Identity(bytes(range(32))).sign("any", b"").public_key.hex(),
        "12D3KooWA4Xop1JaT3MHxwYMkCepYsv4iPVopMXwCz5iHYdBfeSB",
    ),
]


def stored(name: str) -> Any:
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", protocol_vectors.FILES)
def test_the_code_gives_the_stored_bytes(name: str) -> None:
    assert protocol_vectors.FILES[name]() == stored(name)


def test_each_message_has_one_vector_that_reads_back() -> None:
    entries = stored("messages.json")["messages"]
    assert [entry["tag"] for entry in entries] == [kind.TAG for kind in MESSAGES]
    for entry, sample in zip(entries, SAMPLES, strict=True):
        assert decode_message(bytes.fromhex(entry["header"])) == sample
        assert encode_message(sample).hex() == entry["header"]
        decoder = FrameDecoder(STEP_FRAME_BYTES_MAX)
        assert list(decoder.feed(bytes.fromhex(entry["frame"]))) == [(sample, body_of(sample))]
        assert decoder.idle


@pytest.mark.parametrize("entry", stored("malformed.json")["headers"], ids=lambda entry: entry["why"])
def test_malformed_headers_are_refused(entry: dict[str, str]) -> None:
    with pytest.raises(getattr(errors, entry["error"])):
        decode_message(bytes.fromhex(entry["bytes"]))


@pytest.mark.parametrize("entry", stored("malformed.json")["streams"], ids=lambda entry: entry["why"])
def test_malformed_streams_are_refused(entry: dict[str, str]) -> None:
    with pytest.raises(getattr(errors, entry["error"])):
        list(FrameDecoder(STEP_FRAME_BYTES_MAX).feed(bytes.fromhex(entry["bytes"])))


def test_signed_and_sealed_statements_open() -> None:
    vectors = stored("statements.json")
    now_ms = vectors["now_ms"]
    assert AdvertGate().admit(bytes.fromhex(vectors["advert"]["signed"]), WORKER.peer, now_ms) == ADVERT
    assert ReportGate().admit(bytes.fromhex(vectors["report"]["signed"]), now_ms) == (CLIENT.peer, REPORT)
    assert open_manifest(bytes.fromhex(vectors["manifest"]["signed"])) == (MANIFEST, CLIENT.peer)
    assert TicketGate(WORKER).admit(bytes.fromhex(vectors["ticket"]["box"]), CLIENT.peer, now_ms) == TICKET
    assert unseal(bytes.fromhex(vectors["sealed"]["box"]), WORKER) == bytes.fromhex(vectors["sealed"]["data"])


@pytest.mark.parametrize(("key", "peer"), PEER_IDS)
def test_peer_ids_are_libp2ps(key: str, peer: str) -> None:
    assert peer_id_of(bytes.fromhex(key)) == peer
    assert public_key_of(peer).hex() == key
