"""The engine: loads spans, keeps KV, computes steps in batches. Synchronous; one thread of its own calls it (node/).

Steps are submitted, and `advance` runs one forward over the rows that the scheduler takes from all of them. Invariant:
each submitted step hears of its end exactly once. A refused step has changed nothing, but for one that ran out of
memory: its session must be closed. A refused load leaves its deployment unloaded. It trusts its caller for what the
service checks (positions, reservations, who may ask) and nobody for what is inside a shard or a tensor. It knows no
peers and no clock but the one that times its work.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from models.errors import ModelError
from models.precision import MATRICES, compute_dtype
from protocol import limits
from protocol.errors import LocalProtocolError, Refused
from protocol.ids import DeploymentId, PeerId, SessionId, ShardDigest
from protocol.messages import Operation, RefusalReason
from protocol.ports import LoadedSpan, SessionSpec, SpanSpec, StepResult, StepWork
from worker.kv_pages import KvBudget
from worker.payloads import DTYPES, answer_dtype, tensor_dtype, to_payload, to_rows
from worker.row_times import RowTimes
from worker.runner import FloatBlocks, IntegerBlocks, Part, build_float_blocks, tile_rows_left
from worker.scheduler import Scheduler
from worker.shards import read_shard
from worker.span_kv import SessionKv, SpanKv
from worker.spans import INTEGER_DTYPE, block_config, check_block, loaded_bytes

log = logging.getLogger("sotto.worker")
ANSWER_BYTES_MAX = limits.STEP_BYTES_MAX
KV_BYTES_DEFAULT = 1 << 30
ALL = 1 << 30  # more than any number of sessions, or of rows
GIVEN_BACK_BYTES = 16 << 20  # of free KV between two forwards: 1 or 2 ms, where all at once takes 0.2 s a GiB


@dataclass(slots=True)
class _Span:
    spec: SpanSpec
    blocks: FloatBlocks | IntegerBlocks
    kv: SpanKv | None  # integer spans keep none
    times: RowTimes = field(default_factory=RowTimes)


@dataclass(slots=True)
class _Session:
    span: _Span
    spec: SessionSpec
    kv: SessionKv | None
    step: _Step | None = None  # the one under way


Done = Callable[[StepResult | Exception], None]
_Party = tuple[DeploymentId, PeerId, int]  # sessions that are divided into micro-batches together


@dataclass(slots=True, eq=False)
class _Step:
    """A step under way: what the scheduler asks of a job, and what has been computed of it.

    What has not been computed is there as it travelled: that is what the worker has counted of a step that waits.
    """

    work: StepWork
    session: _Session
    rows_asked: int
    done: Done
    beside_max: int
    waits_since: float
    rows: list[Tensor] = field(default_factory=list)
    rows_done: int = 0
    compute_s: float = 0.0

    @property
    def deployment(self) -> DeploymentId:
        return self.session.span.spec.manifest.deployment

    @property
    def client(self) -> PeerId:
        return self.session.spec.client

    @property
    def alone(self) -> bool:
        return self.session.spec.alone or self.session.spec.deterministic

    @property
    def own_product(self) -> bool:
        return self.work.operation == Operation.LINEAR

    @property
    def rows_left(self) -> int:
        return self.rows_asked - self.rows_done

    @property
    def rows_at_once(self) -> int:
        blocks, work = self.session.span.blocks, self.work
        if work.operation == Operation.LINEAR:
            return blocks.linear_rows_at_once(work.block - self.session.span.spec.start, work.matrix)
        assert isinstance(blocks, FloatBlocks)
        if self.session.spec.deterministic:
            return tile_rows_left(work.position + self.rows_done)
        return blocks.rows_at_once(work.position + self.rows_asked)

    @property
    def rows_in_time(self) -> int:
        return ALL if self.is_fixed else self.session.span.times.rows(self.kind)

    @property
    def is_fixed(self) -> bool:
        """Whether others' work must not show in how its rows are cut, as that may show in their bits."""
        return self.alone and self.session.span.blocks.dtype.is_floating_point

    @property
    def kind(self) -> Hashable:
        """Rows of one kind take about the same time."""
        work = self.work
        if work.operation == Operation.LINEAR:
            return work.block, work.matrix
        return (work.position + self.rows_asked).bit_length()  # the tokens to attend to, to within a factor of two

    @property
    def answer_bytes(self) -> int:
        """As it is computed, before it is made what travels."""
        blocks, work = self.session.span.blocks, self.work
        if work.operation == Operation.LINEAR:
            width = blocks.shape(work.block - self.session.span.spec.start, work.matrix)[0]
        else:
            assert isinstance(blocks, FloatBlocks)
            width = blocks.width
        return self.rows_asked * width * blocks.dtype.itemsize

    def begun_bytes(self, count: int) -> int:
        """Of KV, that the next `count` rows take for the first time."""
        if self.session.kv is None or self.work.operation == Operation.LINEAR:
            return 0
        return self.session.kv.begun_bytes(self.work.position + self.rows_done, count)

    def take(self, count: int) -> Tensor:
        """The next `count` rows, as the blocks compute them: [count, d]."""
        blocks = self.session.span.blocks
        return to_rows(self.work.payload, self.rows_done, self.rows_done + count).to(blocks.device, blocks.dtype)


class Engine:
    """`shard_path` says where the store keeps a shard; `device` is torch's name, "cpu" or "cuda". KV, of sessions and
    kept for later, takes at most `kv_bytes`."""

    def __init__(
        self, shard_path: Callable[[ShardDigest], Path], device: str = "cpu", kv_bytes: int = KV_BYTES_DEFAULT
    ) -> None:
        self._shard_path = shard_path
        self._device = torch.device(device)
        self.kv_budget = KvBudget(kv_bytes)
        self._spans: dict[DeploymentId, _Span] = {}
        self._sessions: dict[SessionId, _Session] = {}
        self._parties: Counter[_Party] = Counter()  # how many sessions each has
        self._scheduler: Scheduler[_Step] = Scheduler()
        self._leaving: list[SpanKv] = []  # of spans that are gone, until their memory is given back
        self._ended_s = 0.0  # when the last forward ended
        self._busy_s = 0.0  # the sum of all forwards

    def load(self, span: SpanSpec, stopping: Callable[[], bool] = lambda: False) -> LoadedSpan:
        """Read, check, build and time the span; a loaded span of the deployment is replaced. It takes minutes where a
        span is large: before each shard it looks whether its caller is `stopping`.

        Raises Refused (BAD_SHARD, DISK, UNSUPPORTED, MEMORY, STOPPING), LocalProtocolError while a session of the
        deployment is open.
        """
        self.unload(span.manifest.deployment)
        entries = span.manifest.blocks[span.start : span.end]
        configs = [block_config(entry) for entry in entries]
        for entry, config in zip(entries, configs, strict=True):
            check_block(span.manifest, entry, config)

        def read(index: int) -> dict[str, Tensor]:
            if stopping():
                raise Refused(RefusalReason.STOPPING, "the worker is stopping")
            return read_shard(self._shard_path(entries[index].digest), entries[index])

        blocks: FloatBlocks | IntegerBlocks
        with _Refusals(RefusalReason.BAD_SHARD):
            if span.manifest.dtype == INTEGER_DTYPE:
                if self._device.type != "cpu":
                    raise Refused(RefusalReason.UNSUPPORTED, "integer maps need a worker on a CPU")
                blocks = IntegerBlocks([_copied(read(index)) for index in range(len(configs))])
            else:
                dtype = DTYPES[compute_dtype(span.manifest.dtype)]
                blocks = build_float_blocks(configs, read, dtype, self._device)
            block_time_us = blocks.time_position()
        kv = SpanKv(configs, dtype, self._device, self.kv_budget) if isinstance(blocks, FloatBlocks) else None
        self._spans[span.manifest.deployment] = _Span(span, blocks, kv)
        log.info("span loaded", extra={"start": span.start, "end": span.end, "block_time_us": block_time_us})
        return LoadedSpan(loaded_bytes(span.manifest.dtype, configs), block_time_us)

    def unload(self, deployment: DeploymentId) -> None:
        """Free the span. Idempotent. Raises LocalProtocolError while a session of it is open."""
        span = self._spans.get(deployment)
        if any(session.span is span for session in self._sessions.values()):
            raise LocalProtocolError("a span with open sessions cannot be unloaded")
        self._spans.pop(deployment, None)
        self._scheduler.forget(deployment)
        if span is not None and span.kv is not None:
            span.kv.close()
            self._leaving.append(span.kv)

    def open(self, session: SessionId, spec: SessionSpec) -> int:
        """A session over the loaded span. Gives how many of its first tokens are there already. Raises Refused."""
        span = self._spans.get(spec.deployment)
        if span is None or session in self._sessions:
            raise LocalProtocolError("sessions open once, over a loaded span")
        with _Refusals(RefusalReason.KV_MEMORY):
            kv = span.kv.open(spec.tenant, spec.kv_tokens, spec.page_keys) if span.kv else None
        self._sessions[session] = _Session(span, spec, kv)
        self._parties[_party(spec)] += 1
        return kv.held if kv else 0

    def submit(self, work: StepWork, done: Done, asked_s: float | None = None) -> None:
        """Queue one step; `done` is called with its result, or its error, in some later `advance` or `close`.

        `asked_s` (time.perf_counter) is when it was asked for, if that is not now: it waited while a forward ran.

        Raises Refused: BAD_STEP (wrong width, unknown matrix, too large an answer), UNSUPPORTED (dtypes).
        """
        session = self._sessions.get(work.session)
        if session is None or session.step is not None:
            raise LocalProtocolError("a step of a session that is not open, or has one under way")
        if work.operation == Operation.LINEAR:
            self._check_linear(session, work)
        else:
            self._check_pass(session, work)
        if session.kv is not None and not work.keeps:
            session.kv.forget_keys()
        now = time.perf_counter()
        waited_s = 0.0 if asked_s is None else max(0.0, self._ended_s - asked_s)
        rows, beside_max = work.payload.header.shape[0], self._beside_max(session)
        session.step = _Step(work, session, rows, done, beside_max, waits_since=now - waited_s)
        self._scheduler.add(session.step)

    @property
    def idle(self) -> bool:
        """True when no step is under way, and there is nothing to tidy up."""
        return self._scheduler.idle and not self._leaving and not any(kv.book.stale for kv in self._kvs())

    def advance(self) -> None:
        """Run one forward, if there is anything to do; give some of the free KV back."""
        chosen_s = -time.perf_counter()
        taken = self._scheduler.take()
        chosen_s += time.perf_counter()
        # At least as much as is taken now, so that memory never exceeds the budget by more than one forward's pages.
        self._give_back(max(GIVEN_BACK_BYTES, sum(step.begun_bytes(count) for step, count in taken)))
        if not taken:
            return
        started = time.perf_counter()
        passes = [(step, count) for step, count in taken if step.work.operation == Operation.SPAN]
        for step, count in taken:
            if step.work.operation == Operation.LINEAR:
                self._compute([(step, count)])
        if passes:
            self._compute(passes)
        # Choosing takes the longer the more steps wait; what is given back may have been anybody's.
        self._scheduler.charge(taken[0][0].deployment, chosen_s + time.perf_counter() - started)

    def step(self, work: StepWork) -> StepResult:
        """Compute one step, and whatever is under way beside it. Raises what `submit` raises, and Refused(MEMORY)."""
        ended: list[StepResult | Exception] = []
        self.submit(work, ended.append)
        while not ended:
            self.advance()
        if isinstance(ended[0], Exception):
            raise ended[0]
        return ended[0]

    def close(self, session: SessionId, page_keys: tuple[bytes, ...] = ()) -> None:
        """Free the session's KV, but for full pages that `page_keys` name; a step of it that is under way is dropped.
        Idempotent."""
        gone = self._sessions.pop(session, None)
        if gone is None:
            return
        self._parties[_party(gone.spec)] -= 1
        self._parties += Counter()  # drops zeros
        if gone.step is not None:
            self._scheduler.remove(gone.step)
            gone.step.done(Refused(RefusalReason.UNKNOWN_SESSION, "the session was closed"))
        if gone.kv is not None:
            gone.kv.close(page_keys)

    def _beside_max(self, session: _Session) -> int:
        spec = session.spec
        if spec.micro_batches == 1:
            return ALL
        sessions = self._parties[_party(spec)]
        return -(-sessions // max(1, min(spec.micro_batches, sessions // spec.micro_batch_min)))

    def _kvs(self) -> list[SpanKv]:
        return [*self._leaving, *(span.kv for span in self._spans.values() if span.kv is not None)]

    def _give_back(self, wanted_bytes: int) -> None:
        for kv in self._kvs():
            if wanted_bytes > 0 and kv.book.stale:
                wanted_bytes -= kv.give_back(wanted_bytes)
        self._leaving = [kv for kv in self._leaving if kv.book.stale]

    def _compute(self, taken: list[tuple[_Step, int]]) -> None:
        started = time.perf_counter()
        try:
            with _Refusals(RefusalReason.BAD_STEP):
                rows = self._forward(taken)
                if self._device.type == "cuda":  # else the time is that of starting the kernels
                    torch.cuda.synchronize(self._device)
        except Exception as error:  # it is the steps' failure, whatever it is: the engine serves the others on
            self._busy_s += time.perf_counter() - started
            if len(taken) > 1:  # one of them may have been too much for the memory: each by itself
                if not isinstance(error, Refused):  # a bug of ours, which costs nobody's step but must not go unseen
                    log.exception("a batch of %d steps failed", len(taken))
                for each in taken:
                    self._compute([each])
            else:
                self._fail(taken[0][0], error)
            return
        self._ended_s, start = time.perf_counter(), 0
        took_s = self._ended_s - started
        self._busy_s += took_s
        _learn(taken, took_s)
        company = sum(count == step.rows_left for step, count in taken) > 1
        for step, count in taken:
            part = rows[start : start + count]
            step.rows_done += count
            step.compute_s += took_s
            start += count
            try:
                with _Refusals(RefusalReason.BAD_STEP):
                    # What waits for the rest of its step does not keep others' rows.
                    step.rows.append(part.clone() if step.rows_left and count < len(rows) else part)
                    if not step.rows_left:
                        self._finish(step, company)
            except Exception as error:  # an answer takes memory too, and a part of one
                self._fail(step, error)

    def _forward(self, taken: list[tuple[_Step, int]]) -> Tensor:
        first = taken[0][0]
        blocks = first.session.span.blocks
        if first.work.operation == Operation.LINEAR:
            block = first.work.block - first.session.span.spec.start
            return blocks.linear(block, first.work.matrix, first.take(taken[0][1]))
        assert isinstance(blocks, FloatBlocks)
        xs = [step.take(count) for step, count in taken]
        parts = [Part(_kv(step), step.work.position + step.rows_done, count) for step, count in taken]
        if first.session.spec.deterministic:
            return blocks.forward_tile(xs[0], parts[0])
        return blocks.forward(xs[0] if len(xs) == 1 else torch.cat(xs), parts)

    def _finish(self, step: _Step, company: bool) -> None:
        step.session.step = None
        work = step.work
        result = step.rows[0] if len(step.rows) == 1 else torch.cat(step.rows)
        tail = result[-work.forward_tail :] if work.forward_tail else result
        span = work.operation == Operation.SPAN
        forward = to_payload(tail, answer_dtype(work.payload.header.dtype, tail.dtype) if span else None)
        returned = None if work.returns == "none" else to_payload(result, work.returns)
        queue_s = max(0.0, self._ended_s - step.waits_since - step.compute_s)
        compute_us, queue_us = round(1e6 * step.compute_s), round(1e6 * queue_s)
        step.done(StepResult(forward, returned, compute_us, queue_us, company, self._busy_s))

    def _fail(self, step: _Step, error: Exception) -> None:
        step.session.step = None
        self._scheduler.remove(step)
        step.done(error)

    def _check_pass(self, session: _Session, work: StepWork) -> None:
        blocks, kv = session.span.blocks, session.kv
        if not isinstance(blocks, FloatBlocks) or kv is None:
            raise Refused(RefusalReason.UNSUPPORTED, "integer blocks take linear steps only")
        rows = _checked_rows(work, blocks.width)
        if work.position > kv.length or work.position + rows > kv.kv_tokens:
            raise LocalProtocolError(f"a step at {work.position} with {kv.length} of {kv.kv_tokens} tokens held")
        _check_answer(rows, blocks.width, _widest(blocks.dtype, work.returns))
        wire = work.payload.header.dtype
        if not tensor_dtype(wire).is_floating_point:
            raise Refused(RefusalReason.UNSUPPORTED, f"a pass in {wire}")

    def _check_linear(self, session: _Session, work: StepWork) -> None:
        spec, blocks = session.span.spec, session.span.blocks
        if not spec.start <= work.block < spec.end or work.matrix not in MATRICES:
            raise Refused(RefusalReason.BAD_STEP, f"no matrix {work.matrix!r} of block {work.block} here")
        out_features, in_features = blocks.shape(work.block - spec.start, work.matrix)
        _check_answer(_checked_rows(work, in_features), out_features, blocks.dtype.itemsize)
        dtype = tensor_dtype(work.payload.header.dtype)
        if not ((dtype.is_floating_point and blocks.dtype.is_floating_point) or dtype == blocks.dtype):
            raise Refused(RefusalReason.UNSUPPORTED, f"a linear step of {dtype} with weights of {blocks.dtype}")


class _Refusals:
    """Translates what models and torch raise: a model that does not fit is the peer's to hear of, not a bug."""

    __slots__ = ("_reason",)

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if isinstance(error, ModelError):
            raise Refused(self._reason, str(error)) from None
        # torch has a class for this on CUDA and only a text on the CPU
        missing = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
        if missing or isinstance(error, MemoryError | torch.OutOfMemoryError):
            raise Refused(RefusalReason.MEMORY, "the machine has less memory free than its owner gave") from None


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def _learn(taken: list[tuple[_Step, int]], took_s: float) -> None:
    """How long their rows took, together."""
    first = taken[0][0]
    if first.is_fixed:
        return  # a tile takes as long with one row as with all
    rows: dict[Hashable, int] = {}
    for step, count in taken:
        rows[step.kind] = rows.get(step.kind, 0) + count
    first.session.span.times.ran(rows, took_s)


def _checked_rows(work: StepWork, width: int) -> int:
    """How many there are."""
    shape = work.payload.header.shape
    if len(shape) != 2 or shape[0] < 1 or shape[1] != width:
        raise Refused(RefusalReason.BAD_STEP, f"a step of {list(shape)} where the width is {width}")
    return shape[0]


def _check_answer(rows: int, width: int, itemsize: int) -> None:
    if rows * width * itemsize > ANSWER_BYTES_MAX:
        raise Refused(RefusalReason.BAD_STEP, f"an answer of {rows} x {width} numbers is larger than a frame")


def _widest(dtype: torch.dtype, returns: str) -> int:
    """Bytes of one number in the larger of the two answers."""
    return dtype.itemsize if returns == "none" else max(dtype.itemsize, DTYPES[returns].itemsize)


def _party(spec: SessionSpec) -> _Party:
    return spec.deployment, spec.client, spec.micro_batches


def _kv(step: _Step) -> SessionKv:
    assert step.session.kv is not None
    return step.session.kv
