"""Tickets: each reason to refuse one, and that looking at one leaves nothing behind."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import limits
from protocol.codec import encode
from protocol.errors import RemoteProtocolError
from protocol.ids import PeerId
from protocol.sealedbox import seal
from protocol.signed import Signed
from protocol.tickets import Ticket, TicketGate, issue_ticket
from tests.helpers.protocol_samples import ADVERT, CLIENT, NEXT, NOW_MS, OTHER, TICKET, WORKER

LIFE_MS = int((limits.TICKET_LIFE_MAX_S + limits.CLOCK_SKEW_MAX_S) * 1000)
ONE_TIME = bytes(32)


def test_a_good_ticket_is_admitted_and_not_remembered() -> None:
    """What is remembered of tickets, strangers can fill: whether one was used is for its session to know."""
    gate, box = TicketGate(WORKER), issue_ticket(TICKET, CLIENT)
    for _ in range(2):
        assert gate.admit(box, CLIENT.peer, NOW_MS) == TICKET
    with pytest.raises(FrozenInstanceError):
        gate.identity = OTHER  # type: ignore[misc]


def test_the_same_ticket_gives_the_same_box_and_another_another() -> None:
    box = issue_ticket(TICKET, CLIENT)
    assert issue_ticket(TICKET, CLIENT) == box
    other = issue_ticket(replace(TICKET, nonce=bytes(16)), CLIENT)
    assert other[:32] != box[:32]  # another one-time key, not only other data under the same


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"client": OTHER.peer}, "another than its client"),
        ({"predecessor": OTHER.peer}, "than its predecessor"),
        ({"expires_ms": NOW_MS}, "expired"),
        ({"expires_ms": NOW_MS - 1}, "expired"),
        ({"expires_ms": NOW_MS + LIFE_MS + 1}, "lives too long"),
    ],
)
def test_a_ticket_that_does_not_hold_is_refused(change: dict[str, object], why: str) -> None:
    gate = TicketGate(WORKER)
    with pytest.raises(RemoteProtocolError, match=why):
        gate.admit(issue_ticket(replace(TICKET, **change), CLIENT), CLIENT.peer, NOW_MS)


def test_a_ticket_for_another_worker_is_refused() -> None:
    with pytest.raises(RemoteProtocolError, match="not for this peer"):
        TicketGate(NEXT).admit(issue_ticket(TICKET, CLIENT), CLIENT.peer, NOW_MS)
    resealed = seal(
        encode(CLIENT.sign("ticket/1", encode(TICKET))), NEXT.peer, ONE_TIME
    )  # what WORKER could do with it
    with pytest.raises(RemoteProtocolError, match="for another worker"):
        TicketGate(NEXT).admit(resealed, CLIENT.peer, NOW_MS)


def test_a_ticket_brought_by_another_than_the_predecessor_is_refused_and_stays_good() -> None:
    gate, box = TicketGate(WORKER), issue_ticket(TICKET, CLIENT)
    with pytest.raises(RemoteProtocolError, match="than its predecessor"):
        gate.admit(box, OTHER.peer, NOW_MS)
    gate.admit(box, CLIENT.peer, NOW_MS)


def test_forged_and_malformed_boxes_are_refused() -> None:
    payload = encode(TICKET)
    signed = CLIENT.sign("ticket/1", payload)
    contents = [
        encode(Signed(signed.public_key, payload, bytes(64))),
        encode(OTHER.sign("ticket/1", payload)),
        encode(CLIENT.sign("advert/1", payload)),
        encode(CLIENT.sign("ticket/1", encode(ADVERT))),
        payload,
        b"",
    ]
    for content in contents:
        with pytest.raises(RemoteProtocolError):
            TicketGate(WORKER).admit(seal(content, WORKER.peer, ONE_TIME), CLIENT.peer, NOW_MS)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.binary(max_size=120))
def test_any_bytes_are_refused(box: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        TicketGate(WORKER).admit(box, CLIENT.peer, NOW_MS)


@pytest.mark.parametrize(
    "change",
    [
        {"end": 0},
        {"returns": "float64"},
        {"nonce": bytes(15)},
        {"kv_tokens": 0},
        {"successor": PeerId("somebody")},
        {"predecessor": PeerId("")},
        {"client": PeerId("0" * 52)},
    ],
)
def test_a_ticket_that_contradicts_itself_cannot_exist(change: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        replace(TICKET, **change)


def test_the_largest_ticket_fits_into_its_field() -> None:
    largest = replace(
        TICKET,
        epoch=1 << 31,
        successor_addrs=("/dns4/" + "a" * (limits.ADDR_CHARS_MAX - 6),) * limits.ADDRS_MAX,
        end=limits.BLOCKS_MAX,
        kv_tokens=limits.CONTEXT_TOKENS_MAX,
        capability=bytes(limits.CAPABILITY_BYTES_MAX),
    )
    assert len(issue_ticket(largest, CLIENT)) <= limits.TICKET_BYTES_MAX


def test_a_ticket_is_a_record_like_any_other() -> None:
    assert Ticket.TAG == 0  # it has no tag: it never travels outside a box
