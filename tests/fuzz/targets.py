"""One fuzz target for each parser of untrusted bytes.

A target takes any bytes and returns, or raises one of the errors that it declares; anything else is a finding. To add
one, write a function and put `@target(name, corpus, errors...)` above it: the tests and `make fuzz` find it. Parsers
of a room that needs more than bytes have theirs beside its tests; tests/fuzz/every.py names all.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save
from torch import zeros

from client.metalearning.comparing import heard
from client.metalearning.hearsay import Hearsay
from node.joining import Leads
from node.p2p.addresses import dialable, parse_bootstrap, parse_listen
from node.p2p.yamux_wire import Flag, Frame, Kind, Parser, Violation
from protocol.adverts import _DOMAIN as ADVERT_DOMAIN
from protocol.adverts import AdvertGate, sign_advert
from protocol.capabilities import _DOMAIN as CAPABILITY_DOMAIN
from protocol.capabilities import CapabilityGate, Claim, Right, issue_capability
from protocol.codec import decode, decode_message, encode, encode_message
from protocol.errors import InputError, Refused, RemoteProtocolError
from protocol.framing import FrameDecoder, encode_frame
from protocol.invites import PREFIX as INVITE_PREFIX
from protocol.invites import _checksum, make_invite, parse_invite, print_invite
from protocol.leases import _DOMAIN as LEASE_DOMAIN
from protocol.leases import open_lease, sign_lease
from protocol.limits import LEASE_S_MAX
from protocol.manifest import _DOMAIN as MANIFEST_DOMAIN
from protocol.manifest import BlockEntry, ConfigPair, TensorEntry
from protocol.membership import NONCE_BYTES, SwarmKey, swarm_of
from protocol.messages import FRAME_BYTES_MAX, SHARD, ShardAsk, ShardOffer, ShardPiece
from protocol.pieces import PieceList
from protocol.pieces import _digest as digest_of
from protocol.reports import _DOMAIN as REPORT_DOMAIN
from protocol.reports import ReportGate, sign_report
from protocol.sealedbox import seal, unseal
from protocol.signed import Signed
from protocol.tensors import TensorHeader
from protocol.tickets import _DOMAIN as TICKET_DOMAIN
from protocol.tickets import TicketGate, issue_ticket
from tests.helpers.protocol_samples import (
    ADVERT,
    CAPABILITY,
    CLIENT,
    DEPLOYMENT,
    DIGEST,
    INVITE,
    LEASE,
    MANIFEST,
    NEXT,
    NOW_MS,
    REPORT,
    SAMPLES,
    TICKET,
    WORKER,
    body_of,
)
from tests.helpers.workers import make_manifest
from worker.shards import read_shard
from worker.spans import read_span

VECTORS = Path(__file__).parents[1] / "vectors"


@dataclass(frozen=True)
class Target:
    run: Callable[[bytes], None]
    corpus: tuple[bytes, ...]
    errors: tuple[type[Exception], ...]

    def __call__(self, data: bytes) -> bool:
        """True when the bytes were taken, False when they were refused as they should be."""
        try:
            self.run(data)
        except self.errors:
            return False
        return True


TARGETS: dict[str, Target] = {}


def target(
    name: str, corpus: Sequence[bytes], *errors: type[Exception]
) -> Callable[[Callable[[bytes], None]], Callable[[bytes], None]]:
    """Register a function as the target `name`."""

    def register(run: Callable[[bytes], None]) -> Callable[[bytes], None]:
        assert name not in TARGETS
        TARGETS[name] = Target(run, tuple(corpus), errors)
        return run

    return register


def vectors(name: str, key: str) -> list[bytes]:
    """The bytes under `key` in one of the golden files."""
    return [bytes.fromhex(item["bytes"]) for item in json.loads((VECTORS / name).read_text())[key]]


# messages, alone and in frames

MESSAGES = [encode_message(sample) for sample in SAMPLES] + vectors("malformed.json", "headers")
FRAMES = [encode_frame(sample, body_of(sample)) for sample in SAMPLES] + vectors("malformed.json", "streams")
STREAM = b"".join(FRAMES[: len(SAMPLES)])


@target("message", MESSAGES, RemoteProtocolError)
def message(data: bytes) -> None:
    assert encode_message(decode_message(data)) == data


def _frames(protocol: str) -> Callable[[bytes], None]:
    bound = FRAME_BYTES_MAX[protocol]

    def outcome(parts: list[bytes]) -> tuple[list[bytes], bool]:
        decoder, frames = FrameDecoder(bound), []
        try:
            for part in parts:
                for frame in decoder.feed(part):
                    frames.append(encode_frame(*frame))
        except RemoteProtocolError:
            return frames, False
        return frames, True

    def run(data: bytes) -> None:
        whole = outcome([data])
        step = 1 + sum(data[:4]) % 7
        assert outcome([data[at : at + step] for at in range(0, len(data), step)]) == whole
        assert data.startswith(b"".join(whole[0]))

    return run


for _protocol in FRAME_BYTES_MAX:
    target(f"frames {_protocol}", [*FRAMES, STREAM])(_frames(_protocol))


# signed statements: as they come, and with good signatures over whatever they say


@target("signed", [encode(CLIENT.sign("x", b"payload"))], RemoteProtocolError)
def signed(data: bytes) -> None:
    assert decode(Signed, data).verify("x") == b"payload", "a signature that the key's owner did not make"


ADVERTS = [sign_advert(ADVERT, WORKER)]


@target("advert", ADVERTS, RemoteProtocolError)
def advert(data: bytes) -> None:
    assert AdvertGate().admit(data, WORKER.peer, NOW_MS) == ADVERT, "an advert that the worker did not sign"


@target("advert payload", [encode(ADVERT)], RemoteProtocolError)
def advert_payload(data: bytes) -> None:
    said = AdvertGate().admit(encode(WORKER.sign(ADVERT_DOMAIN, data)), WORKER.peer, NOW_MS)
    dialable(said.addrs)


@target("report", [sign_report(REPORT, CLIENT)], RemoteProtocolError)
def report(data: bytes) -> None:
    assert ReportGate().admit(data, NOW_MS) == (CLIENT.peer, REPORT), "a report that its signer did not sign"


@target("report payload", [encode(REPORT)], RemoteProtocolError)
def report_payload(data: bytes) -> None:
    signer, said = ReportGate().admit(encode(CLIENT.sign(REPORT_DOMAIN, data)), NOW_MS)
    hearsay = Hearsay()
    assert hearsay.hear(signer, said)
    for each in said.comparisons:
        if (known := heard(each)) is not None:
            word = hearsay.word(known[0])
            assert word is None or math.isfinite(word.log_ratio + word.deviation)


@target("ticket", [issue_ticket(TICKET, CLIENT)], RemoteProtocolError)
def ticket(data: bytes) -> None:
    assert TicketGate(WORKER).admit(data, CLIENT.peer, NOW_MS) == TICKET, "a ticket that the client did not sign"


@target("ticket payload", [encode(TICKET)], RemoteProtocolError)
def ticket_payload(data: bytes) -> None:
    box = seal(encode(CLIENT.sign(TICKET_DOMAIN, data)), WORKER.peer, bytes(32))
    said = TicketGate(WORKER).admit(box, CLIENT.peer, NOW_MS)
    dialable(said.successor_addrs)


CLAIM = Claim(NEXT.peer, Right.USE, DEPLOYMENT, CLIENT.peer)


@target("capability", [issue_capability(CAPABILITY, CLIENT)], RemoteProtocolError)
def capability(data: bytes) -> None:
    CapabilityGate().admit(CLAIM, data, NOW_MS)
    assert data == issue_capability(CAPABILITY, CLIENT), "a capability that the owner did not sign"


@target("capability payload", [encode(CAPABILITY)], RemoteProtocolError)
def capability_payload(data: bytes) -> None:
    CapabilityGate().admit(CLAIM, encode(CLIENT.sign(CAPABILITY_DOMAIN, data)), NOW_MS)


@target("sealed box", [seal(b"sotto", WORKER.peer, bytes(32)), issue_ticket(TICKET, CLIENT)], RemoteProtocolError)
def sealed_box(data: bytes) -> None:
    unseal(data, WORKER)


SPAN, _MANIFEST, _ = make_manifest(CLIENT, 2)


@target("manifest", [SPAN], Refused)
def manifest(data: bytes) -> None:
    read_span(data, 0, 2)
    assert data == SPAN, "a manifest that its owner did not sign"


@target("manifest payload", [encode(_MANIFEST), encode(MANIFEST)], Refused)
def manifest_payload(data: bytes) -> None:
    request = read_span(encode(CLIENT.sign(MANIFEST_DOMAIN, data)), 0, 2)
    assert request.weight_bytes > 0
    assert request.kv_token_bytes > 0
    assert len(request.shards) <= 2


@target("lease", [sign_lease(LEASE, WORKER)], RemoteProtocolError)
def lease(data: bytes) -> None:
    assert open_lease(data, WORKER.peer) == LEASE, "a lease that the worker did not sign"


@target("lease payload", [encode(LEASE)], RemoteProtocolError)
def lease_payload(data: bytes) -> None:
    said = open_lease(encode(WORKER.sign(LEASE_DOMAIN, data)), WORKER.peer)
    assert 0 <= said.start < said.end
    assert 0 < said.expires_ms - said.granted_ms <= 1000 * LEASE_S_MAX


# membership of private swarms

SECRET = SwarmKey(b"\7" * 32)
INVITES = [print_invite(INVITE).encode(), print_invite(make_invite(SECRET, INVITE.peers)).encode()]


@target("invite", INVITES, InputError)
def invite(data: bytes) -> None:
    text = data.decode(errors="replace")
    read = parse_invite(text)
    assert print_invite(read) == "".join(text.split())
    assert read in (INVITE, make_invite(SECRET, INVITE.peers)), "the checksum found no slip"


@target("invite's record", [encode(INVITE), encode(make_invite(SECRET, INVITE.peers))], InputError)
def invite_record(data: bytes) -> None:
    body = len(data).to_bytes(2, "big") + data if len(data) < 1 << 16 else b""
    word = INVITE_PREFIX + base64.urlsafe_b64encode(body + _checksum(body)).decode().rstrip("=")
    read = parse_invite(word)
    assert swarm_of(read.key) == read.swarm
    Leads(read.addrs)


_SEALED = SECRET.seal(ADVERTS[0], "adverts", WORKER.peer, bytes(NONCE_BYTES))


@target("sealed gossip", [_SEALED], RemoteProtocolError)
def sealed_gossip(data: bytes) -> None:
    assert SECRET.unseal(data, "adverts", WORKER.peer) == ADVERTS[0], "what no member sealed"
    assert data == _SEALED


# shards in pieces

_BYTES = bytes(range(256)) * 2
PIECES = PieceList.of_bytes(_BYTES)
SHARD_STREAMS = [
    encode_frame(ShardOffer(PIECES.digest, len(_BYTES), (), b""), PIECES.hashes)
    + encode_frame(ShardPiece(PIECES.digest, 0), _BYTES),
    encode_frame(ShardAsk(PIECES.digest, b"")) + encode_frame(ShardPiece(PIECES.digest, 0), b"short"),
]


@target("shard stream", SHARD_STREAMS, RemoteProtocolError)
def shard_stream(data: bytes) -> None:
    """Offers whose list is read, and pieces that are held against the last list."""
    pieces = PIECES
    for message, body in FrameDecoder(FRAME_BYTES_MAX[SHARD]).feed(data):
        match message:
            case ShardOffer(digest, shard_bytes):
                pieces = PieceList.open(digest, shard_bytes, body)
            case ShardPiece(_, index):
                assert not pieces.holds(index, body) or body == _BYTES


@target("piece list", [(2 << 20).to_bytes(8, "big") + 2 * PIECES.hashes], RemoteProtocolError)
def piece_list(data: bytes) -> None:
    """Any size and any list, under the digest that fits them."""
    shard_bytes, hashes = int.from_bytes(data[:8], "big"), data[8:]
    pieces = PieceList.open(digest_of(shard_bytes, hashes), shard_bytes, hashes)
    assert sum(pieces.place(index)[1] for index in range(pieces.count)) == shard_bytes
    assert not pieces.holds(pieces.count, b"")
    assert not pieces.holds(pieces.count - 1, data)


# files

_TENSORS = {"down": zeros(2, 4), "up": zeros(4, 2)}
_SHARD = save(_TENSORS)
_ENTRY = BlockEntry(
    digest=DIGEST,
    shard_bytes=len(_SHARD),
    config=(ConfigPair("family", "llama"),),
    tensors=tuple(TensorEntry(name, TensorHeader("float32", tuple(t.shape))) for name, t in _TENSORS.items()),
)
_FOLDER = tempfile.TemporaryDirectory(prefix="sotto-fuzz-")


@target("shard file", [_SHARD, save({**_TENSORS, "more": zeros(1)})], Refused)
def shard_file(data: bytes) -> None:
    data = data.ljust(_ENTRY.weight_bytes, b"\0")
    file = Path(_FOLDER.name) / "shard"
    file.write_bytes(data)
    tensors = read_shard(file, dataclasses.replace(_ENTRY, shard_bytes=len(data)))
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {"down": (2, 4), "up": (4, 2)}


# the muxer's wire, and addresses


class _Notes:
    """Frames and their bodies, however they were cut."""

    def __init__(self) -> None:
        self.events: list[tuple[object, bytes]] = []

    def on_frame(self, frame: Frame) -> None:
        self.events.append((frame, b""))

    def on_body(self, frame: Frame, part: memoryview) -> None:
        kind, body = self.events.pop()
        self.events.append((kind, body + part))

    def on_body_end(self, frame: Frame) -> None:
        self.events.append(("end", b""))


YAMUX = [
    Frame(Kind.DATA, Flag.SYN, 1, 5).header() + b"hello" + Frame(Kind.WINDOW, Flag.FIN, 1, 0).header(),
    Frame(Kind.PING, Flag.SYN, 0, 7).header() + Frame(Kind.GO_AWAY, Flag.NONE, 0, 0).header(),
    Frame(Kind.WINDOW, Flag.SYN, 3, 262144).header() + Frame(Kind.DATA, Flag.FIN | Flag.RST, 3, 2).header() + b"xy",
]


@target("yamux wire", YAMUX)
def yamux_wire(data: bytes) -> None:
    def outcome(step: int) -> tuple[list[tuple[object, bytes]], bool]:
        notes = _Notes()
        parser = Parser(notes)
        try:
            for at in range(0, len(data), step):
                parser.feed(data[at : at + step])
        except Violation:
            return notes.events, False
        return notes.events, True

    assert outcome(max(1, len(data))) == outcome(1 + sum(data[:3]) % 5)


ADDRESSES = [
    b"/ip4/192.0.2.7/tcp/4001",
    b"/ip6/2001:db8::1/tcp/4001",
    b"/dns4/example.org/tcp/443",
    b"/ip4/192.0.2.7/tcp/4001/p2p/" + WORKER.peer.encode(),
    b"/ip4/192.0.2.7/tcp/4001/p2p/%s/p2p-circuit/p2p/%s" % (WORKER.peer.encode(), WORKER.peer.encode()),
    b"/ip4/192.0.2.7/udp/4001/quic-v1/webtransport",
    b"/ip6zone/x/ip6/fe80::1/tcp/1",
    b"/unix/a/b",
    b"/ip4/192.0.2.7/tcp/4001/p2p-circuit",
]


@target("addresses of peers", ADDRESSES)
def peers_addresses(data: bytes) -> None:
    dialable(data.decode(errors="replace").split("\n"))


@target("bootstrap address", ADDRESSES, InputError)
def bootstrap_address(data: bytes) -> None:
    parse_bootstrap(data.decode(errors="replace"))


@target("listening address", ADDRESSES, InputError)
def listening_address(data: bytes) -> None:
    parse_listen(data.decode(errors="replace"))
