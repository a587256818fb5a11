"""One tree of errors: the class says what the caller should do.

  InputError            what the user gave cannot be used: tell the user what to change
  LocalProtocolError    our own bug: loud, never retried
  RemoteProtocolError   the peer broke the protocol: penalise it, never retry there
  Refused(reason)       the peer said no, politely: try another
  TransportError        the network failed: back off, retry
  RouteUnavailable      no set of peers covers what is needed now

Adapters translate foreign exceptions into these at the edge.
"""

from __future__ import annotations


class SottoError(Exception):
    """Root of the tree."""


class InputError(SottoError):
    """What the user gave cannot be used; the message says what to change."""


class LocalProtocolError(SottoError):
    """This program broke a rule of its own: a bug, never retried as if it were the network."""


class RemoteProtocolError(SottoError):
    """The peer sent what the protocol forbids: penalise it, never retry there."""


class TransportError(SottoError):
    """The network failed; retrying later, or elsewhere, may work."""


class RouteUnavailable(SottoError):
    """No set of live peers covers the blocks, or the memory, that is needed."""


class Refused(SottoError):
    """The peer declined. `reason` is one of messages.RefusalReason's values; `detail` is for people."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail
