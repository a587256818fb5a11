"""Shared learning, for who wants it: this user's comparisons are told to the swarm, and others' are heard and kept.

What is told is client/metalearning/comparing.py's, made from the history; what is heard goes into a Hearsay, and into
one file, so that the next process has it. Invariant: nothing here fails a request, and nothing is told unless the user
switched sharing on. The file holds signed reports as they came and is read as if strangers had sent it. Any number of
processes of one user may run: each merges before it writes.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from client.metalearning.comparing import Compared, Place, compared, report_of
from client.metalearning.hearsay import PEERS_KEPT, Hearsay
from client.metalearning.record import Record
from node.files import write_atomic
from protocol import limits
from protocol.errors import RemoteProtocolError
from protocol.ids import PeerId
from protocol.ports import Clock, Gossip, GossipMessage
from protocol.reports import TOPIC, Report, ReportGate, read_report, sign_report
from protocol.signed import Identity

log = logging.getLogger("sotto.client")

COMPARED_MAX = 2000  # newest requests of the history
FIRST_S = 3.0  # until gossip has found its neighbours
SAVE_S = 5.0  # so that a flood of reports is no flood of writes
RETRY_S = 60.0  # after a disk that failed: each time is a line in the log
LAST_WORDS_S = 2.0
Kept = tuple[PeerId, Report, bytes]
"""Who signed it, what it says, and its bytes."""
_LENGTH = struct.Struct(">H")
FILE_BYTES_MAX = PEERS_KEPT * (limits.REPORT_BYTES_MAX + _LENGTH.size)


@dataclass(frozen=True, slots=True)
class Sources:
    """`pen` signs what is told (protocol.reports.pen_of). `records` reads the history; it is called in a thread.
    `file` keeps what was heard; None keeps it in memory alone."""

    pen: Identity
    records: Callable[[], Sequence[Record]]
    file: Path | None = None


class Sharing:
    """Made for one client. `start`, then `tell_on` and `keep` while the client lives, then `aclose`."""

    def __init__(self, gossip: Gossip, clock: Clock, sources: Sources) -> None:
        self.hearsay = Hearsay()
        self.own: Mapping[Place, Compared] = {}
        self._gossip, self._clock, self._sources = gossip, clock, sources
        self._gate = ReportGate()
        self._signed: dict[PeerId, bytes] = {}
        self._changed = trio.Event()
        self._saved = True

    async def start(self) -> None:
        """Take up what was kept, and listen from now on. Call once."""
        if self._sources.file is not None:
            self._merge(await trio.to_thread.run_sync(read_kept, self._sources.file, self._now_ms()))
        await self._gossip.subscribe(TOPIC, self._admit)

    async def tell_on(self) -> None:
        """Compare and tell, now and again, until cancelled."""
        pause_s = FIRST_S
        while True:
            self.judge(await trio.to_thread.run_sync(self._compared))
            await trio.sleep(pause_s)
            await self.tell()
            pause_s = limits.REPORT_INTERVAL_S

    async def keep(self) -> None:
        """Save what is heard, until cancelled."""
        pause_s = SAVE_S
        while True:
            if self._saved:  # else there was news during the last save, or it failed
                await self._changed.wait()
            await trio.sleep(pause_s)
            pause_s = SAVE_S if await self._save() else RETRY_S

    async def aclose(self) -> None:
        """Save what was heard last, within LAST_WORDS_S."""
        with trio.CancelScope(deadline=trio.current_time() + LAST_WORDS_S, shield=True):
            await self._save()

    def judge(self, own: Mapping[Place, Compared]) -> None:
        """Tell what own requests showed (comparing.compared) from now on, and hold peers against it."""
        self.own = own
        self.hearsay.judge_by(own)
        self.hearsay.forget(self._now_ms())

    def _compared(self) -> dict[Place, Compared]:
        """Of thousands of requests: called in a thread."""
        return compared(self._sources.records())

    async def tell(self) -> bool:
        """Publish what own requests showed; False when there is nothing to tell."""
        report = report_of(self.own, self._now_ms())
        if report is None:
            return False
        await self._gossip.publish(TOPIC, sign_report(report, self._sources.pen))
        log.info("comparisons told", extra={"count": len(report.comparisons)})
        return True

    def _admit(self, message: GossipMessage) -> bool:
        """Gossip's validator: what the gate refuses is neither heard nor forwarded."""
        try:
            signer, report = self._gate.admit(message.data, self._now_ms())
        except RemoteProtocolError:
            return False
        if self._take(signer, report, message.data):
            self._saved = False
            self._changed.set()
            self._changed = trio.Event()
        return True

    def _take(self, signer: PeerId, report: Report, data: bytes) -> bool:
        """True when it is news. What another process of this user tells is not: it is in the history."""
        if signer == self._sources.pen.peer or not self.hearsay.hear(signer, report):
            return False
        self._signed[signer] = data
        self._signed = {each: kept for each, kept in self._signed.items() if each in self.hearsay}
        return True

    def _merge(self, kept: Sequence[Kept]) -> None:
        for signer, report, data in kept:
            self._take(signer, report, data)
        self.hearsay.forget(self._now_ms())

    async def _save(self) -> bool:
        """Another process may have written meanwhile: what it kept is taken up first. False when the disk failed."""
        if self._saved:
            return True
        self._saved, written = True, False
        try:
            if self._sources.file is not None:
                await self._write(self._sources.file)
            written = True
        except OSError as error:
            log.warning("peers' reports are not kept", extra={"error": str(error)})
        finally:
            self._saved &= written  # False, too, when there was news meanwhile
        return written

    async def _write(self, file: Path) -> None:
        self._merge(await trio.to_thread.run_sync(read_kept, file, self._now_ms()))
        kept = [data for signer, data in sorted(self._signed.items()) if signer in self.hearsay]
        await trio.to_thread.run_sync(partial(write_atomic, file, joined(kept), 0o600))

    def _now_ms(self) -> int:
        return int(self._clock.time() * 1000)


def heeded(file: Path, records: Sequence[Record], now_ms: int) -> Hearsay:
    """What was kept in `file`, as it weighs beside this user's `records`."""
    hearsay = Hearsay(compared(records))
    for signer, report, _ in read_kept(file, now_ms):
        hearsay.hear(signer, report)
    hearsay.forget(now_ms)
    return hearsay


def read_kept(file: Path, now_ms: int) -> list[Kept]:
    """The reports in `file` that are what their signers wrote. Blocks: call it in a thread."""
    kept = list[Kept]()
    for data in unjoined(_read(file)):
        with suppress(RemoteProtocolError):
            signer, report = read_report(data)
            if report.issued_ms <= now_ms + limits.CLOCK_SKEW_MAX_S * 1000:
                kept.append((signer, report, data))
    return kept


def unjoined(data: bytes) -> list[bytes]:
    """What `joined` put together, as far as it can be read; at most as many as are kept."""
    found, at = list[bytes](), 0
    while at + _LENGTH.size <= len(data) and len(found) < PEERS_KEPT:
        (length,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size
        if not 0 < length <= len(data) - at:
            break
        found.append(data[at : at + length])
        at += length
    return found


def joined(kept: Sequence[bytes]) -> bytes:
    """The content of the file."""
    return b"".join(_LENGTH.pack(len(data)) + data for data in kept)


def _read(file: Path) -> bytes:
    try:
        with file.open("rb") as opened:
            return opened.read(FILE_BYTES_MAX)
    except FileNotFoundError:
        return b""
    except OSError as error:
        log.warning("peers' reports that were kept cannot be read", extra={"error": str(error)})
        return b""
