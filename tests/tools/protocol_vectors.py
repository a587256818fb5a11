"""Builds the golden vectors of the protocol from fixed seeds. `python -m tests.tools.protocol_vectors FOLDER` writes
them anew: do that only with a new protocol version, for the vectors are what other implementations are held to."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

import msgpack

from protocol.adverts import TOPIC, sign_advert
from protocol.capabilities import issue_capability
from protocol.codec import encode, encode_message
from protocol.directory import shard_key
from protocol.framing import encode_frame
from protocol.invites import make_invite, print_invite
from protocol.leases import sign_lease
from protocol.manifest import sign_manifest
from protocol.membership import NONCE_BYTES, Side, SwarmKey
from protocol.messages import CONTROL
from protocol.reports import sign_report
from protocol.sealedbox import seal
from protocol.tickets import issue_ticket
from tests.helpers.protocol_samples import (
    ADVERT,
    CAPABILITY,
    CLIENT,
    DIGEST,
    INVITE,
    LEASE,
    MANIFEST,
    NOW_MS,
    REPORT,
    SAMPLES,
    TICKET,
    WORKER,
    body_of,
)

Json = dict[str, Any]


def messages() -> Json:
    """One instance of each message: its header, and the whole frame with a body."""
    return {
        "messages": [
            {
                "name": type(message).__name__,
                "tag": message.TAG,
                "fields": repr(message),
                "header": encode_message(message).hex(),
                "body": body_of(message).hex(),
                "frame": encode_frame(message, body_of(message)).hex(),
            }
            for message in SAMPLES
        ]
    }


def statements() -> Json:
    """Signed and sealed statements. Seeds are Ed25519 secret seeds; boxes are opened with the worker's."""
    return {
        "client": {"seed": CLIENT.seed.hex(), "peer": CLIENT.peer},
        "worker": {"seed": WORKER.seed.hex(), "peer": WORKER.peer},
        "now_ms": NOW_MS,
        "advert": {"payload": encode(ADVERT).hex(), "signed": sign_advert(ADVERT, WORKER).hex()},
        "report": {"payload": encode(REPORT).hex(), "signed": sign_report(REPORT, CLIENT).hex()},
        "ticket": {"payload": encode(TICKET).hex(), "box": issue_ticket(TICKET, CLIENT).hex()},
        "capability": {"payload": encode(CAPABILITY).hex(), "signed": issue_capability(CAPABILITY, CLIENT).hex()},
        "lease": {"payload": encode(LEASE).hex(), "signed": sign_lease(LEASE, WORKER).hex()},
        "manifest": {"payload": encode(MANIFEST).hex(), "signed": sign_manifest(MANIFEST, CLIENT).hex()},
        "sealed": {
            "data": b"sotto".hex(),
            "one_time": bytes(32).hex(),
            "box": seal(b"sotto", WORKER.peer, bytes(32)).hex(),
        },
    }


def membership() -> Json:
    """What follows from a private swarm's key, and invites to that swarm and to the public one."""
    key, nonce = SwarmKey(bytes(range(32))), bytes(range(NONCE_BYTES))
    return {
        "secret": key.secret.hex(),
        "swarm": key.swarm.hex(),
        "topic": {"name": TOPIC, "derived": key.topic(TOPIC)},
        "provider_record": {
            "shard": DIGEST.hex(),
            "public": shard_key(DIGEST).hex(),
            "derived": key.record_key(shard_key(DIGEST)).hex(),
        },
        "proofs": [
            {
                "dialler": CLIENT.peer,
                "listener": WORKER.peer,
                "protocol": CONTROL,
                "side": side.value,
                "proof": key.proof(CLIENT.peer, WORKER.peer, CONTROL, side).hex(),
            }
            for side in Side
        ],
        "sealed": {
            "topic": TOPIC,
            "author": WORKER.peer,
            "nonce": nonce.hex(),
            "data": b"sotto".hex(),
            "box": key.seal(b"sotto", TOPIC, WORKER.peer, nonce).hex(),
        },
        "invites": [
            {"record": encode(invite).hex(), "text": print_invite(invite)}
            for invite in (make_invite(None, INVITE.peers), make_invite(key, INVITE.peers))
        ],
    }


def malformed() -> Json:
    """Headers that every implementation refuses, and streams that it must not read on."""
    return {
        "headers": [{"why": why, "bytes": data.hex(), "error": "RemoteProtocolError"} for why, data in _headers()],
        "streams": [{"why": why, "bytes": data.hex(), "error": "RemoteProtocolError"} for why, data in _streams()],
    }


def _headers() -> list[tuple[str, bytes]]:
    ping, pack = encode_message(SAMPLES[1]), msgpack.packb
    return [
        ("empty", b""),
        ("not an array", pack(10)),
        ("an empty array", pack([])),
        ("tag is not an integer", pack(["10", bytes(8)])),
        ("tag is a boolean", pack([True, bytes(8)])),
        ("unknown tag", pack([99, bytes(8)])),
        ("a field is missing", pack([10])),
        ("a field too many", pack([10, bytes(8), 0])),
        ("truncated", ping[:-1]),
        ("trailing byte", ping + b"\0"),
        ("binary as string", pack([10, "12345678"])),
        ("string as binary", pack([1, b"memory", ""])),
        ("tag is not minimal: uint 8 for 10", b"\x92\xcc\x0a" + ping[2:]),
        ("integer is not minimal: uint 64 for 5", b"\x92\x15\xcf" + (5).to_bytes(8, "big")),
        ("signed form of a positive integer", b"\x92\x15\xd0\x05"),
        ("negative count", b"\x92\x15\xff"),
        ("array is not minimal: array 16 of two", b"\xdc\x00\x02" + ping[1:]),
        ("binary is not minimal: bin 16 of eight", b"\x92\x0a\xc5\x00\x08" + bytes(8)),
        ("float for an integer", b"\x92\x15\xcb" + struct.pack(">d", 5.0)),
        ("a map", b"\x92\x0a\x81\x01\x02"),
        ("an empty map", b"\x92\x0a\x80"),
        ("an extension type", b"\x92\x0a\xd7\x05" + bytes(8)),
        ("an empty extension type", b"\x92\x0a\xc7\x00\x05"),
        ("a timestamp", b"\x92\x0a\xd7\xff" + bytes(8)),
        ("nil", b"\x92\x0a\xc0"),
        ("the unused byte", b"\x92\x0a\xc1"),
        ("string is not UTF-8", b"\x93\x01\xa6memory\xa1\xff"),
        ("an array of 2^32 - 1 announced", b"\xdd\xff\xff\xff\xff"),
        ("binary of 2^32 - 1 announced", b"\x92\x0a\xc6\xff\xff\xff\xff"),
        ("nested too deep", b"\x91" * 5000),
        ("empty span", pack([12, b"m", 4, 4, 0, 1, b""])),
        ("unknown reason", pack([1, "bored", ""])),
        ("unknown dtype", pack([35, bytes(16), 0, 7, 0, ["float64", [1, 8]]])),
        ("a dimension of zero", pack([35, bytes(16), 0, 7, 0, ["float32", [0, 8]]])),
        ("five dimensions", pack([35, bytes(16), 0, 7, 0, ["float32", [1, 1, 1, 1, 1]]])),
    ]


def _streams() -> list[tuple[str, bytes]]:
    lengths, ping = struct.Struct(">II").pack, encode_message(SAMPLES[1])
    return [
        ("longer than any frame, refused at its eighth byte", lengths(0xFFFFFFFF, 10)),
        ("header longer than the frame", lengths(14, 11)),
        ("no room for the header's length", lengths(3, 0)),
        ("header of no bytes", lengths(4, 0)),
        ("a body where none belongs, refused before it comes", lengths(4 + len(ping) + 9, len(ping)) + ping),
    ]


FILES = {
    "messages.json": messages,
    "statements.json": statements,
    "membership.json": membership,
    "malformed.json": malformed,
}

if __name__ == "__main__":
    for name, build in FILES.items():
        Path(sys.argv[1], name).write_text(json.dumps(build(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
