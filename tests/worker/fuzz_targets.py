"""Fuzz targets of a worker (see tests/fuzz/targets.py): what lies on its disk, and shards that others bring."""

from __future__ import annotations

import json

from protocol.channel import Channel
from protocol.codec import encode
from protocol.errors import Refused, RemoteProtocolError, TransportError
from protocol.framing import encode_frame
from protocol.manifest import _DOMAIN as MANIFEST_DOMAIN
from protocol.messages import SHARD, PiecesWanted, Refusal, ShardPiece
from protocol.pieces import PieceList
from simnet.runtime import VirtualClock
from simnet.store import MemoryStore
from tests.fuzz.scripts import Script, run
from tests.fuzz.targets import target
from tests.helpers.protocol_samples import CLIENT, NEXT, NOW_MS
from tests.helpers.workers import make_manifest
from worker.fetch import Fetch, FetchPorts, Wait
from worker.piece_plan import Giver
from worker.rights import _read
from worker.saved import SavedSpan, read_saved
from worker.service import _together

_SIGNED, _MANIFEST, _ = make_manifest(CLIENT, 3)
_SPANS = [encode(SavedSpan(_SIGNED, *ends)) for ends in ((0, 3), (1, 2))]


@target("saved span", _SPANS, Refused, RemoteProtocolError)
def saved_span(data: bytes) -> None:
    request = read_saved(_MANIFEST.deployment, data)
    assert request.spec.manifest == _MANIFEST, "a manifest that its owner did not sign"
    assert encode(SavedSpan.of(request)) == data


@target("saved span, signed", [encode(_MANIFEST)], Refused, RemoteProtocolError)
def saved_span_signed(data: bytes) -> None:
    read_saved(_MANIFEST.deployment, encode(SavedSpan(encode(CLIENT.sign(MANIFEST_DOMAIN, data)), 0, 2)))


_REVOKED = json.dumps([[CLIENT.peer, "07" * 16, NOW_MS], [NEXT.peer, "08" * 16, NOW_MS]]).encode()
_CHARACTERS = json.dumps([[list(CLIENT.peer), "07" * 16, NOW_MS]]).encode()


@target("revoked", [_REVOKED, _CHARACTERS, b"[" * 5000], ValueError, TypeError, RecursionError, RemoteProtocolError)
def revoked(data: bytes) -> None:
    assert all(len(serial) == 16 for _, serial in _read(data))


_BYTES = bytes(range(256)) * 8
PIECES = PieceList.of_bytes(_BYTES)
GIVEN = [
    encode_frame(ShardPiece(PIECES.digest, 0), _BYTES),
    encode_frame(ShardPiece(PIECES.digest, 1), _BYTES),
    encode_frame(ShardPiece(PIECES.digest, 0), b"x") + encode_frame(ShardPiece(PIECES.digest, 0), _BYTES),
    encode_frame(Refusal("missing_shards", "")),
    encode_frame(PiecesWanted(PIECES.digest, 0, 1)),
]


@target("shard fetch", GIVEN, RemoteProtocolError, TransportError)
def shard_fetch(data: bytes) -> None:
    """A giver says anything when it is asked for the only piece."""

    async def main() -> None:
        store = MemoryStore()
        fetch = Fetch(PIECES, FetchPorts(store, VirtualClock(), _together, frozenset))
        try:
            await fetch.give(Channel(Script(data, NEXT.peer), SHARD), Giver(NEXT.peer), Wait(lambda now: None))
        finally:
            held = await store.size(PIECES.digest)
            assert held in (None, len(_BYTES))
            assert held is None or await store.read(PIECES, 0) == _BYTES
            assert fetch.present_bytes in (0, len(_BYTES))

    run(main)
