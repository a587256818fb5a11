"""Reports: how strategies compared in a client's own requests, as it tells other clients; signed, coarse, bounded.

A report holds ratios only: the cost with a strategy over that with the default, in the same kind of situation, over
several requests each. It names no model, peer or time of a request, and has no room for a text. Its signer is a
pseudonym that follows from the client's identity (`pen_of`), not gossip's author: a client process speaks under an
identity of the moment. What a report says is believed by nobody here: that is for who uses it.

`ReportGate` refuses what is forged, stale, from the future or too soon after the signer's last, and all that comes
faster than a node should receive; it is bounded by that rate. Whom a flood of other signers keeps out is not decided.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Annotated

from protocol import limits
from protocol.codec import decode, encode
from protocol.errors import RemoteProtocolError
from protocol.ids import PeerId
from protocol.schema import Between, Milliseconds, Record, Size
from protocol.signed import Identity, Signed

TOPIC = "sotto/reports/1"
_DOMAIN = "report/1"
KIND_BYTES, RANGES_MAX = 7, 16  # features that make up a kind of situation, and ranges of each
TAG_BYTES = 4
PERCENT = 100


@dataclass(frozen=True, slots=True)
class Comparison(Record):
    """A strategy beside the default in situations of one kind: `kind` has the number of a range for each feature."""

    kind: Annotated[bytes, Size(KIND_BYTES, KIND_BYTES)]
    strategy: Annotated[bytes, Size(TAG_BYTES, TAG_BYTES)]  # by `strategy_tag`
    log_ratio_percent: Annotated[int, Between(-limits.REPORT_LOG_RATIO_MAX, limits.REPORT_LOG_RATIO_MAX)]
    error_percent: Annotated[int, Between(1, limits.REPORT_LOG_RATIO_MAX)]  # one standard error of it
    runs_log2: Annotated[int, Between(2, 16)]  # of whichever of the two ran less often; 2^runs_log2 or more

    def check(self) -> None:
        if any(number >= RANGES_MAX for number in self.kind):
            raise ValueError("a range that no feature has")


@dataclass(frozen=True, slots=True)
class Report(Record):
    """All that one client tells; the next one replaces it."""

    issued_ms: Milliseconds
    comparisons: Annotated[tuple[Comparison, ...], Size(1, limits.REPORT_COMPARISONS_MAX)]

    def check(self) -> None:
        if len({(each.kind, each.strategy) for each in self.comparisons}) != len(self.comparisons):
            raise ValueError("two comparisons of one strategy in one kind of situation")


def strategy_tag(text: str) -> bytes:
    """Four bytes that name a strategy by its text form: no text travels, and a reader knows what it would choose."""
    return blake2b(text.encode(), digest_size=TAG_BYTES, person=b"sotto-strategy").digest()


def pen_of(identity: Identity) -> Identity:
    """The pseudonym under which the owner of `identity` reports. Without that secret nobody can tell whose it is."""
    return Identity(blake2b(identity.seed, digest_size=32, person=b"sotto-pen").digest())


def sign_report(report: Report, pen: Identity) -> bytes:
    """The report as it is gossiped."""
    return encode(pen.sign(_DOMAIN, encode(report)))


def read_report(data: bytes) -> tuple[PeerId, Report]:
    """Signer and report, whatever its time. Raises RemoteProtocolError."""
    if len(data) > limits.REPORT_BYTES_MAX:
        raise RemoteProtocolError(f"a report of {len(data)} bytes; {limits.REPORT_BYTES_MAX} at most")
    signed = decode(Signed, data)
    return signed.signer, decode(Report, signed.verify(_DOMAIN))


@dataclass(slots=True)
class ReportGate:
    """Admits a signer's fresh reports, and so many of all signers."""

    latest: dict[PeerId, int] = field(default_factory=dict)  # signer -> issued_ms, while that is fresh
    _room: float = float(limits.REPORTS_BURST)
    _at_ms: int = 0

    def admit(self, data: bytes, now_ms: int) -> tuple[PeerId, Report]:
        """Raises RemoteProtocolError, and then nothing changed."""
        signer, report = read_report(data)
        oldest_ms = now_ms - limits.REPORT_FRESH_S * 1000
        if report.issued_ms < oldest_ms:
            raise RemoteProtocolError("a stale report")
        if report.issued_ms > now_ms + limits.CLOCK_SKEW_MAX_S * 1000:
            raise RemoteProtocolError("a report from the future: the peer's clock, or this one, is wrong")
        last_ms = self.latest.get(signer)
        if last_ms is not None and report.issued_ms < last_ms + limits.REPORT_INTERVAL_MIN_S * 1000:
            raise RemoteProtocolError("a report too soon after the signer's last, or a replay")
        waited_s = max(0, now_ms - self._at_ms) / 1000
        room = min(float(limits.REPORTS_BURST), self._room + waited_s * limits.REPORTS_RECEIVED_PER_S)
        if room < 1:
            raise RemoteProtocolError("more reports than a node should receive")
        self._room, self._at_ms = room - 1, now_ms
        for stale in [peer for peer, issued_ms in self.latest.items() if issued_ms < oldest_ms]:
            del self.latest[stale]  # its own time refuses a replay
        self.latest[signer] = report.issued_ms
        return signer, report
