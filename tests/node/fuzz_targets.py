"""Fuzz targets of a node outside its mesh (see tests/fuzz/targets.py): the local network, the control socket, tokens,
and proofs of membership."""

from __future__ import annotations

import base64
import json
from typing import Any

import trio
from zeroconf import (
    DNSAddress,
    DNSIncoming,
    DNSOutgoing,
    DNSPointer,
    DNSService,
    DNSText,
    ServiceStateChange,
    current_time_millis,
)
from zeroconf._cache import DNSCache

from node.grants import _PREFIX, Token, read_token
from node.lan import ASKED_MAX, HOSTS_MAX, SERVICE, _Seeker
from node.p2p.addresses import parse_bootstrap
from node.private import PrivateTransport
from node.sharing import joined, unjoined
from node.worker_socket import PAUSE_S_MAX, Controls, _serve
from protocol.capabilities import issue_capability
from protocol.errors import InputError, TransportError
from protocol.ids import PeerId
from protocol.membership import PROOF_BYTES, Side, SwarmKey
from tests.fuzz.scripts import Script, run
from tests.fuzz.targets import target
from tests.helpers.protocol_samples import CAPABILITY, CLIENT, NEXT, WORKER

KEY = SwarmKey(b"\7" * 32)

# the local network

_HOST = "sotto-7.local."
_CLASS = 0x8001


def _packet(
    txt: bytes, alias: str = f"{WORKER.peer}.{SERVICE}", hosts: tuple[bytes, ...] = (bytes((192, 0, 2, 7)),)
) -> bytes:
    out = DNSOutgoing(0x8400)
    now = current_time_millis()
    out.add_answer_at_time(DNSPointer(SERVICE, 12, 1, 120, alias), now)
    out.add_answer_at_time(DNSService(alias, 33, _CLASS, 120, 0, 0, 4517, _HOST), now)
    out.add_answer_at_time(DNSText(alias, 16, _CLASS, 120, txt), now)
    for host in hosts:
        out.add_answer_at_time(DNSAddress(_HOST, 1 if len(host) == 4 else 28, _CLASS, 120, host), now)
    packet: bytes = out.packets()[0]
    return packet


def _txt(*pairs: str) -> bytes:
    return b"".join(bytes([len(pair)]) + pair.encode() for pair in pairs)


_OURS = _txt(f"peer={WORKER.peer}", f"swarm={KEY.swarm.hex()}")
_LINK_LOCAL = bytes.fromhex("fe80000000000000000000000000000a")
PACKETS = [
    _packet(_OURS),
    _packet(_OURS, hosts=(_LINK_LOCAL, bytes(15) + b"\1", bytes((127, 0, 0, 1)))),
    _packet(_txt(f"peer={NEXT.peer}", "swarm", "swarm=")),
    _packet(_OURS, f"{WORKER.peer}._other._tcp.local."),
    _packet(_OURS, f"{WORKER.peer}.local."),
]


class _Responder:
    """What of zeroconf's a handler is given: records as they came."""

    def __init__(self, records: list[Any]) -> None:
        self.cache = DNSCache()
        self.cache.async_add_records(records)


@target("packet on the local network", PACKETS)
def packet(data: bytes) -> None:
    """A multicast packet of anybody there: what escapes from the handler ends the thread that looks around."""
    incoming = DNSIncoming(data)
    records = incoming.answers() if incoming.valid else []
    responder = _Responder(records)
    sightings: list[tuple[PeerId, tuple[str, ...]]] = []
    seeker = _Seeker(KEY.swarm, CLIENT.peer, lambda *seen: sightings.append(seen))
    seeker.asked.update(str(number) for number in range(ASKED_MAX))  # none is asked for
    for record in records:
        if isinstance(record, DNSPointer) and record.name.lower() == SERVICE:
            seeker(responder, SERVICE, record.alias, ServiceStateChange.Added)  # type: ignore[arg-type]
    for peer, addrs in sightings:
        assert 0 < len(addrs) <= HOSTS_MAX
        assert {parse_bootstrap(addr)[0] for addr in addrs} == {peer}


# the owner's socket

LINES = [
    b'{"do": "pause", "for_s": 3600}\n',
    b'{"do": "pause"}\n{"do": "resume"}\n',
    b'{"do": "status"}\n',
    b'{"do": "pause", "for_s": 1e999}\n',
    b'{"do": ["pause"], "for_s": NaN}\n',
    b"[" * 3000 + b"\n",
]


class _Caller(Script):
    """As a trio.SocketStream."""

    async def receive_some(self, max_bytes: int) -> bytes:
        return await self.receive(max_bytes)

    async def send_all(self, data: bytes) -> None:
        await self.send(data)

    async def __aenter__(self) -> _Caller:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


@target("control socket", LINES)
def control_socket(data: bytes) -> None:
    pauses: list[float | None] = []
    controls = Controls(pauses.append, lambda: None, lambda: {"state": "open"})

    async def main() -> bytes:
        caller = _Caller(data, CLIENT.peer)
        await _serve(caller, controls, trio.CapacityLimiter(1))  # type: ignore[arg-type]
        return caller.sent

    answers = [json.loads(line) for line in run(main).splitlines()]
    assert all(answer.keys() <= {"state", "error"} for answer in answers)
    assert all(pause is None or 0 < pause <= PAUSE_S_MAX for pause in pauses)


# tokens

_TOKEN = Token(issue_capability(CAPABILITY, CLIENT), "c0ffee", "float32", "f00d", CAPABILITY, CLIENT.peer)


@target("token", [_TOKEN.text.encode()], InputError)
def token(data: bytes) -> None:
    assert read_token(data.decode(errors="replace")).capability == CAPABILITY, "not what the owner signed"


_FIELDS = {"capability": base64.b64encode(_TOKEN.signed).decode(), "key_check": "", "dtype": "int8", "model": ""}


@target("token's fields", [json.dumps(_FIELDS).encode(), b"[" * 5000, b'{"capability": 1}'], InputError)
def token_fields(data: bytes) -> None:
    read = read_token(_PREFIX + base64.urlsafe_b64encode(data).decode().rstrip("="))
    assert read_token(read.text) == read


# private swarms

_PROTOCOL = "/sotto/control/1"


def _proof(side: Side) -> bytes:
    dialler, listener = (NEXT, WORKER) if side is Side.DIAL else (WORKER, NEXT)
    return KEY.proof(dialler.peer, listener.peer, _PROTOCOL, side)


class _Inner:
    """The transport below: this node is WORKER."""

    peer = WORKER.peer

    def __init__(self, stream: Script) -> None:
        self.stream = stream

    async def open(self, *_: object) -> Script:
        return self.stream


@target("proof of who dials", [_proof(Side.DIAL) + b"frames", _proof(Side.ACCEPT)])
def proof_of_dialler(data: bytes) -> None:
    stream = Script(data, NEXT.peer)
    admitted = run(lambda: PrivateTransport(_Inner(stream), KEY)._admit(stream, _PROTOCOL))  # type: ignore[arg-type]
    assert admitted is (data[:PROOF_BYTES] == _proof(Side.DIAL))
    assert bool(stream.sent) is admitted, "a stranger is told nothing"


@target("proof of who listens", [_proof(Side.ACCEPT) + b"frames", _proof(Side.DIAL)], TransportError)
def proof_of_listener(data: bytes) -> None:
    transport = PrivateTransport(_Inner(Script(data, NEXT.peer)), KEY)  # type: ignore[arg-type]
    run(lambda: transport.open(NEXT.peer, (), _PROTOCOL))
    assert data.startswith(_proof(Side.ACCEPT))


# peers' reports on disk


@target("kept reports", [joined([b"one", b"another"])])
def kept_reports(data: bytes) -> None:
    kept = unjoined(data)
    assert data.startswith(joined(kept))
    assert all(kept)
