"""What all of a worker draws on, in one value, and what decides about it."""

from __future__ import annotations

from dataclasses import dataclass, field

from protocol.tickets import TicketGate
from worker.admission import SessionQuota, SpanLedger
from worker.duty import Duty
from worker.kv_pool import KvPool
from worker.load import Bubbles, LoadMeter
from worker.quotas import QueueBook
from worker.rights import Rights


@dataclass(frozen=True, slots=True)
class House:
    """What sessions draw on, and what decides about them."""

    gate: TicketGate
    rights: Rights
    spans: SpanLedger
    pool: KvPool
    queues: QueueBook
    duty: Duty
    quota: SessionQuota
    load: LoadMeter = field(default_factory=LoadMeter)
    bubbles: Bubbles = field(default_factory=Bubbles)
