"""An engine without arithmetic: every answer is a hash of all that it depends on, so a lost, repeated or misordered
step changes the answer; time comes from a cost model, on the virtual clock.

State changes at the call, in the order of calls; the cost is slept afterwards. So a cancelled call abandons its result
while the engine stays busy, as the port promises, and the same seed gives the same run.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from hashlib import shake_128

import numpy as np
import numpy.typing as npt
import trio

from protocol import limits
from protocol.errors import LocalProtocolError, Refused
from protocol.ids import DeploymentId, PeerId, SessionId
from protocol.messages import Operation, RefusalReason
from protocol.ports import LoadedSpan, SessionSpec, SpanSpec, StepResult, StepWork
from protocol.tensors import Payload, TensorHeader

Rows = npt.NDArray[np.float32]
_EMPTY = bytes(16)


@dataclass(frozen=True, slots=True)
class CostModel:
    """Virtual seconds."""

    load_s: float = 0.1
    step_s: float = 0.001
    block_position_s: float = 0.0001


@dataclass(slots=True)
class _Session:
    span: SpanSpec
    spec: SessionSpec
    kv: list[list[bytes]]  # per block, the digest after each position
    began: bool = False


@dataclass(slots=True)
class ToyCompute:
    """Satisfies protocol.ports.Compute. Only float32 [T, d] steps of Operation.SPAN have a meaning here."""

    cost: CostModel = field(default_factory=CostModel)
    spans: dict[DeploymentId, SpanSpec] = field(default_factory=dict)
    sessions: dict[SessionId, _Session] = field(default_factory=dict)
    pages: dict[tuple[DeploymentId, PeerId, bytes], list[list[bytes]]] = field(default_factory=dict)
    steps: int = 0
    positions: int = 0
    _busy_until: float = 0.0
    _busy_s: float = 0.0  # with steps

    async def load(self, span: SpanSpec) -> LoadedSpan:
        self.spans[span.manifest.deployment] = span
        await self._charge(self.cost.load_s)
        weight_bytes = span.manifest.span_bytes(span.start, span.end)
        return LoadedSpan(weight_bytes, round(1e6 * self.cost.block_position_s))

    async def unload(self, deployment: DeploymentId) -> None:
        if any(session.span.manifest.deployment == deployment for session in self.sessions.values()):
            raise LocalProtocolError("a span with open sessions cannot be unloaded")
        self.spans.pop(deployment, None)
        await self._charge(0.0)

    async def open(self, session: SessionId, spec: SessionSpec) -> int:
        if session in self.sessions or spec.deployment not in self.spans:
            raise LocalProtocolError("sessions open once, over a loaded span")
        span = self.spans[spec.deployment]
        kv: list[list[bytes]] = [[] for _ in range(span.start, span.end)]
        for key in spec.page_keys[: (spec.kv_tokens - 1) // limits.PAGE_TOKENS]:
            page = self.pages.get((spec.deployment, spec.tenant, key))
            if page is None:
                break
            for block, digests in zip(kv, page, strict=True):
                block.extend(digests)
        self.sessions[session] = _Session(span, spec, kv)
        held = len(kv[0])
        await self._charge(0.0)
        return held

    async def step(self, work: StepWork) -> StepResult:
        session = self.sessions.get(work.session)
        if session is None:
            raise LocalProtocolError("a step of a session that is not open")
        rows = _rows(work)
        if work.position + len(rows) > session.spec.kv_tokens:
            raise LocalProtocolError("a step beyond the reservation")
        if session.began and work.position < len(session.kv[0]):  # the keys stand for what was there
            kept = session.spec.page_keys[: work.position // limits.PAGE_TOKENS]
            session.spec = replace(session.spec, page_keys=kept)
        session.began = True
        out = rows
        for block, kv in zip(range(session.span.start, session.span.end), session.kv, strict=True):
            out = apply_block(block, kv, work.position, out)
        if not work.keeps:
            session.spec = replace(session.spec, page_keys=())
        self._keep(session, session.spec.page_keys)
        self.steps += 1
        self.positions += len(rows)
        cost_s = self.cost.step_s + self.cost.block_position_s * len(session.kv) * len(rows)
        self._busy_s += cost_s
        busy_s = self._busy_s
        await self._charge(cost_s)
        returned = None if work.returns == "none" else _payload(out)
        return StepResult(_payload(out[-work.forward_tail :]), returned, round(1e6 * cost_s), busy_s=busy_s)

    async def close(self, session: SessionId, page_keys: tuple[bytes, ...] = ()) -> None:
        gone = self.sessions.pop(session, None)
        if gone is not None:
            self._keep(gone, page_keys)
        await self._charge(0.0)

    def _keep(self, session: _Session, keys: tuple[bytes, ...]) -> None:
        """Full pages stay for ever: there is no memory here that could be short."""
        spec, size = session.spec, limits.PAGE_TOKENS
        for index, key in enumerate(keys[: len(session.kv[0]) // size]):
            page = [block[index * size : (index + 1) * size] for block in session.kv]
            self.pages[spec.deployment, spec.tenant, key] = page

    async def _charge(self, seconds: float) -> None:
        self._busy_until = max(trio.current_time(), self._busy_until) + seconds
        await trio.sleep_until(self._busy_until)


def toy_answer(blocks: Iterable[int], rows: Rows) -> Rows:
    """What `blocks` make of a whole sequence [T, d] from position 0: the reference for any cut of it into steps."""
    for block in blocks:
        rows = apply_block(block, [], 0, rows)
    return rows


def apply_block(block: int, kv: list[bytes], position: int, rows: Rows) -> Rows:
    """Truncate `kv` to `position`, append `rows` [T, d], answer [T, d] in [-1, 1)."""
    if position > len(kv):
        raise LocalProtocolError(f"a step at position {position} with {len(kv)} tokens held")
    del kv[position:]
    out = np.empty_like(rows)
    for index, row in enumerate(rows):
        state = shake_128(b"%d/%d/" % (block, position + index))
        state.update(kv[-1] if kv else _EMPTY)
        state.update(row.tobytes())
        kv.append(state.digest(16))
        state.update(b"out")
        words = np.frombuffer(state.digest(2 * len(row)), "<i2")
        out[index] = words.astype(np.float32) / np.float32(1 << 15)
    return out


def _rows(work: StepWork) -> Rows:
    header = work.payload.header
    if work.operation is not Operation.SPAN or header.dtype != "float32":
        raise Refused(RefusalReason.UNSUPPORTED, "this engine takes float32 passes only")
    return np.frombuffer(work.payload.data, "<f4").reshape(header.shape)


def _payload(rows: Rows) -> Payload:
    return Payload(TensorHeader("float32", rows.shape), rows.astype("<f4").tobytes())
