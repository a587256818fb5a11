"""Bytes over open streams, reported as they grow: session streams live for hours, and no metric waits for them.

Invariant: each byte is reported once. It counts; it neither reads nor writes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from protocol.channel import Channel
from worker.observer import WorkerObserver


@dataclass(slots=True)
class Meter:
    observer: WorkerObserver
    _open: dict[Channel, tuple[str, int, int]] = field(default_factory=dict)  # protocol, received and sent as reported

    @contextmanager
    def on(self, channel: Channel, protocol: str) -> Iterator[None]:
        """Count `channel` until the block ends."""
        self._open[channel] = (protocol, 0, 0)
        try:
            yield
        finally:
            self._report(channel)
            del self._open[channel]

    @property
    def channels(self) -> tuple[Channel, ...]:
        return tuple(self._open)

    def report(self) -> None:
        """Tell the observer what was moved since the last time."""
        for channel in self._open:
            self._report(channel)

    def _report(self, channel: Channel) -> None:
        protocol, received, sent = self._open[channel]
        self._open[channel] = (protocol, channel.received_bytes, channel.sent_bytes)
        if (received, sent) != (channel.received_bytes, channel.sent_bytes):
            self.observer.bytes_moved(protocol, channel.received_bytes - received, channel.sent_bytes - sent)
