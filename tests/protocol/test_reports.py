"""Reports: what the gate refuses, that a refusal changes nothing, and that it is bounded whatever is sent."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import limits
from protocol.codec import encode
from protocol.errors import RemoteProtocolError
from protocol.reports import RANGES_MAX, TAG_BYTES, Comparison, Report, ReportGate, pen_of, sign_report, strategy_tag
from protocol.signed import Identity, Signed
from tests.helpers.protocol_samples import ADVERT, CLIENT, NOW_MS, OTHER, REPORT, WORKER


def later(seconds: float) -> Report:
    return replace(REPORT, issued_ms=NOW_MS + int(seconds * 1000))


def test_a_report_is_admitted_once() -> None:
    gate, data = ReportGate(), sign_report(REPORT, CLIENT)
    assert gate.admit(data, NOW_MS) == (CLIENT.peer, REPORT)
    with pytest.raises(RemoteProtocolError, match="replay"):
        gate.admit(data, NOW_MS)
    gate.admit(sign_report(REPORT, OTHER), NOW_MS)


def test_who_speaks_too_soon_is_not_heard() -> None:
    gate = ReportGate()
    gate.admit(sign_report(REPORT, CLIENT), NOW_MS)
    soon = limits.REPORT_INTERVAL_MIN_S
    with pytest.raises(RemoteProtocolError, match="too soon"):
        gate.admit(sign_report(later(soon - 1), CLIENT), NOW_MS + 1000 * soon)
    gate.admit(sign_report(later(soon), CLIENT), NOW_MS + 1000 * soon)


def test_stale_reports_and_those_from_the_future_are_refused() -> None:
    gate = ReportGate()
    for seconds, why in ((limits.CLOCK_SKEW_MAX_S + 1, "future"), (-limits.REPORT_FRESH_S - 1, "stale")):
        with pytest.raises(RemoteProtocolError, match=why):
            gate.admit(sign_report(later(seconds), CLIENT), NOW_MS)
    assert gate.latest == {}


def test_what_was_not_signed_so_is_refused() -> None:
    gate, signed = ReportGate(), CLIENT.sign("report/1", encode(REPORT))
    for wrong in (
        encode(Signed(OTHER.sign("report/1", b"").public_key, signed.payload, signed.signature)),
        encode(CLIENT.sign("advert/1", signed.payload)),
        encode(CLIENT.sign("report/1", encode(ADVERT))),
        signed.payload,
        b"\0" * (limits.REPORT_BYTES_MAX + 1),
    ):
        with pytest.raises(RemoteProtocolError):
            gate.admit(wrong, NOW_MS)
    assert gate.latest == {}


def test_however_many_sign_no_more_come_in_than_a_node_should_receive() -> None:
    gate, admitted = ReportGate(), 0
    for number in range(400):  # of as many signers, ten a second
        now_ms = NOW_MS + 100 * number
        with suppress(RemoteProtocolError):
            gate.admit(sign_report(replace(REPORT, issued_ms=now_ms), Identity(number.to_bytes(32, "big"))), now_ms)
            admitted += 1
    assert limits.REPORTS_BURST < admitted <= limits.REPORTS_BURST + 40 * limits.REPORTS_RECEIVED_PER_S
    far = NOW_MS + 1000 * (limits.REPORT_FRESH_S + 100)
    gate.admit(sign_report(replace(REPORT, issued_ms=far), WORKER), far)
    assert set(gate.latest) == {WORKER.peer}, "a signer is remembered as long as its report is fresh"


def test_the_largest_report_fits() -> None:
    largest = tuple(
        Comparison(
            bytes([RANGES_MAX - 1]) * 6 + bytes([number % RANGES_MAX]), bytes([number]) * TAG_BYTES, -300, 300, 16
        )
        for number in range(limits.REPORT_COMPARISONS_MAX)
    )
    data = sign_report(Report(NOW_MS, largest), CLIENT)
    assert len(data) <= limits.REPORT_BYTES_MAX
    assert ReportGate().admit(data, NOW_MS)[1].comparisons == largest


def test_malformed_reports_are_refused() -> None:
    (first, *_) = REPORT.comparisons
    with pytest.raises(ValueError, match="two comparisons"):
        Report(NOW_MS, (first, replace(first, log_ratio_percent=5)))
    with pytest.raises(ValueError, match="no feature"):
        replace(first, kind=b"\xff" * 7)
    with pytest.raises(ValueError, match="length"):
        Report(NOW_MS, ())


@given(st.binary(max_size=300))
def test_any_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        ReportGate().admit(data, NOW_MS)


def test_a_pen_is_the_same_each_time_and_nobody_elses() -> None:
    assert pen_of(CLIENT).peer == pen_of(CLIENT).peer
    assert len({pen_of(CLIENT).peer, pen_of(OTHER).peer, CLIENT.peer, OTHER.peer}) == 4
    assert strategy_tag("default") != strategy_tag("wire=int8")
