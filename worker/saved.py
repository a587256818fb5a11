"""A loaded span as a worker remembers it over restarts, and reads it again: as if a stranger had sent it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from protocol import limits
from protocol.codec import decode
from protocol.errors import RemoteProtocolError
from protocol.ids import DeploymentId
from protocol.messages import Block
from protocol.schema import Record, Size
from worker.spans import SpanRequest, read_span


@dataclass(frozen=True, slots=True)
class SavedSpan(Record):
    """Blocks [start, end) of the deployment in the signed `manifest`."""

    manifest: Annotated[bytes, Size(1, limits.MANIFEST_BYTES_MAX)]
    start: Block
    end: Block

    @classmethod
    def of(cls, request: SpanRequest) -> SavedSpan:
        return cls(request.signed, request.spec.start, request.spec.end)


def read_saved(deployment: DeploymentId, data: bytes) -> SpanRequest:
    """What was saved for `deployment`. Raises Refused or RemoteProtocolError unless it holds."""
    saved = decode(SavedSpan, data)
    request = read_span(saved.manifest, saved.start, saved.end)
    if request.deployment != deployment:
        raise RemoteProtocolError("a span saved under another deployment's name")
    return request
