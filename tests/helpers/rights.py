"""Rights that clients show to workers, and the reasons for which they are refused."""

from __future__ import annotations

from protocol.capabilities import Capability, Right, issue_capability, rights_of
from protocol.ids import PeerId
from protocol.messages import Message, Refusal
from simnet.runtime import VirtualClock
from tests.helpers.workers import DEPLOYMENT, HandClient

SERIAL = b"c" * 16


def capability(
    client: HandClient, holder: PeerId, *rights: Right, life_s: float = 3600, serial: bytes = SERIAL
) -> bytes:
    """To fetch shards, unless `rights` say something else."""
    expires_ms = int((VirtualClock().time() + life_s) * 1000)
    record = Capability(serial, DEPLOYMENT, holder, rights_of(rights or [Right.FETCH]), expires_ms)
    return issue_capability(record, client.identity)


def reason(message: Message) -> str:
    assert isinstance(message, Refusal), message
    return message.reason
