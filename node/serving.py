"""Streams that a node was asked for, served under the port's contract, over whatever network they come.

Invariant: what a handler raises costs its stream, never the node; a stream is always closed or reset.
"""

from __future__ import annotations

import logging
from typing import Protocol

from node.logs import places
from protocol.errors import TransportError
from protocol.ports import Stream, StreamHandler

log = logging.getLogger(__name__)


class Resettable(Stream, Protocol):
    async def reset(self) -> None:
        """Close both directions at once, unless it is closed; the peer sees an error, not an end. Never raises."""


async def serve(stream: Resettable, protocol: str, handler: StreamHandler) -> None:
    """Run a handler under the port's contract: its return closes the stream, whatever it raises costs the stream."""
    try:
        await handler(stream)
        await stream.aclose()
    except TransportError as error:
        log.debug("%s with %s ended: %s", protocol, stream.remote, error)
    except Exception as error:  # the port's contract: it costs this stream, never the node
        # Its text may quote what a user sent, and a client's log is a terminal.
        raised = {"exception": type(error).__name__, "traceback": places(error.__traceback__)}
        log.warning("the handler of %s failed for %s", protocol, stream.remote, extra=raised)
    finally:
        await stream.reset()  # unless it is closed: a handler that was cut short must not look finished
