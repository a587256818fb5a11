"""The engine: loads spans, keeps KV, computes steps. Synchronous; one thread of its own calls it (node/).

Invariant: a refused step has changed nothing, but for one that ran out of memory: its session must be closed. A refused
load leaves its deployment unloaded. It trusts its caller for what the
service checks (positions, reservations, who may ask) and nobody for what is inside a shard or a tensor. It knows no
peers and no clock but the one that times a position.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models.errors import ModelError
from protocol import limits
from protocol.errors import LocalProtocolError, Refused
from protocol.ids import DeploymentId, SessionId, ShardDigest
from protocol.messages import Operation, RefusalReason
from protocol.ports import LoadedSpan, SpanSpec, StepResult, StepWork
from worker.payloads import DTYPES, to_payload, to_tensor
from worker.runner import MATRICES, Caches, FloatBlocks, IntegerBlocks, build_float_blocks
from worker.shards import read_shard
from worker.spans import INTEGER_DTYPE, block_config, check_block

log = logging.getLogger("sotto.worker")
ANSWER_BYTES_MAX = limits.STEP_BYTES_MAX


@dataclass(slots=True)
class _Span:
    spec: SpanSpec
    blocks: FloatBlocks | IntegerBlocks


@dataclass(slots=True)
class _Session:
    span: _Span
    caches: Caches | None  # integer spans keep no KV


class Engine:
    """`shard_path` says where the store keeps a shard; `device` is torch's name, "cpu" or "cuda"."""

    def __init__(self, shard_path: Callable[[ShardDigest], Path], device: str = "cpu") -> None:
        self._shard_path = shard_path
        self._device = torch.device(device)
        self._spans: dict[DeploymentId, _Span] = {}
        self._sessions: dict[SessionId, _Session] = {}

    def load(self, span: SpanSpec) -> LoadedSpan:
        """Read, check, build and time the span; a loaded span of the deployment is replaced.

        Raises Refused (BAD_SHARD, UNSUPPORTED, MEMORY), LocalProtocolError while a session of the deployment is open.
        """
        self.unload(span.manifest.deployment)
        entries = span.manifest.blocks[span.start : span.end]
        configs = [block_config(entry) for entry in entries]
        for entry, config in zip(entries, configs, strict=True):
            check_block(span.manifest, entry, config)

        def read(index: int) -> dict[str, Tensor]:
            return read_shard(self._shard_path(entries[index].digest), entries[index])

        dtype = DTYPES[span.manifest.dtype]
        blocks: FloatBlocks | IntegerBlocks
        with self._refusals(RefusalReason.BAD_SHARD):
            if span.manifest.dtype == INTEGER_DTYPE:
                if self._device.type != "cpu":
                    raise Refused(RefusalReason.UNSUPPORTED, "integer maps need a worker on a CPU")
                blocks = IntegerBlocks(configs, [read(index) for index in range(len(configs))])
            else:
                blocks = build_float_blocks(configs, read, dtype, self._device)
            block_time_us = blocks.time_position()
        self._spans[span.manifest.deployment] = _Span(span, blocks)
        weight_bytes = dtype.itemsize * sum(config.num_parameters for config in configs)
        log.info("span loaded", extra={"start": span.start, "end": span.end, "block_time_us": block_time_us})
        return LoadedSpan(weight_bytes, block_time_us)

    def unload(self, deployment: DeploymentId) -> None:
        """Free the span. Idempotent. Raises LocalProtocolError while a session of it is open."""
        span = self._spans.get(deployment)
        if any(session.span is span for session in self._sessions.values()):
            raise LocalProtocolError("a span with open sessions cannot be unloaded")
        self._spans.pop(deployment, None)

    def open(self, session: SessionId, deployment: DeploymentId, kv_tokens: int) -> None:
        """A session over the loaded span. KV memory is taken as it fills, up to `kv_tokens`."""
        span = self._spans.get(deployment)
        if span is None or session in self._sessions:
            raise LocalProtocolError("sessions open once, over a loaded span")
        with self._refusals(RefusalReason.KV_MEMORY):
            caches = Caches(span.blocks, kv_tokens) if isinstance(span.blocks, FloatBlocks) else None
        self._sessions[session] = _Session(span, caches)

    def step(self, work: StepWork) -> StepResult:
        """Compute one step; see StepWork. The answer is in the deployment's dtype.

        Raises Refused: BAD_STEP (wrong width, unknown matrix, too large an answer), UNSUPPORTED (dtypes), MEMORY.
        """
        session = self._sessions.get(work.session)
        if session is None:
            raise LocalProtocolError("a step of a session that is not open")
        started = time.perf_counter()
        with self._refusals(RefusalReason.BAD_STEP), torch.inference_mode():
            match work.operation:
                case Operation.SPAN:
                    result = self._span(session, work)
                case Operation.LINEAR:
                    result = self._linear(session, work)
            tail = result[-work.forward_tail :] if work.forward_tail else result
            forward = to_payload(tail)
            returned = None if work.returns == "none" else to_payload(result.to(DTYPES[work.returns]))
        return StepResult(forward, returned, round(1e6 * (time.perf_counter() - started)))

    def close(self, session: SessionId) -> None:
        """Free the session's KV. Idempotent."""
        self._sessions.pop(session, None)

    def _span(self, session: _Session, work: StepWork) -> Tensor:
        blocks, caches = session.span.blocks, session.caches
        if not isinstance(blocks, FloatBlocks) or caches is None:
            raise Refused(RefusalReason.UNSUPPORTED, "integer blocks take linear steps only")
        x = self._input(work, blocks.width)
        if work.position > caches.length or work.position + len(x) > caches.kv_tokens:
            raise LocalProtocolError(
                f"a step at {work.position} with {caches.length} of {caches.kv_tokens} tokens held"
            )
        _check_answer(len(x), blocks.width, _widest(blocks.dtype, work.returns))
        if not x.is_floating_point():
            raise Refused(RefusalReason.UNSUPPORTED, f"a pass in {work.payload.header.dtype}")
        return blocks.forward(x.to(blocks.dtype), caches, work.position)

    def _linear(self, session: _Session, work: StepWork) -> Tensor:
        spec, blocks = session.span.spec, session.span.blocks
        if not spec.start <= work.block < spec.end or work.matrix not in MATRICES:
            raise Refused(RefusalReason.BAD_STEP, f"no matrix {work.matrix!r} of block {work.block} here")
        block = work.block - spec.start
        out_features, in_features = blocks.shape(block, work.matrix)
        x = self._input(work, in_features)
        _check_answer(len(x), out_features, blocks.dtype.itemsize)
        if not ((x.is_floating_point() and blocks.dtype.is_floating_point) or x.dtype == blocks.dtype):
            raise Refused(RefusalReason.UNSUPPORTED, f"a linear step of {x.dtype} with weights of {blocks.dtype}")
        return blocks.linear(block, work.matrix, x)

    def _input(self, work: StepWork, width: int) -> Tensor:
        shape = work.payload.header.shape
        if len(shape) != 2 or shape[0] < 1 or shape[1] != width:
            raise Refused(RefusalReason.BAD_STEP, f"a step of {list(shape)} where the width is {width}")
        return to_tensor(work.payload).to(self._device)

    @contextmanager
    def _refusals(self, reason: str) -> Iterator[None]:
        """Translate what models and torch raise: a model that does not fit is the peer's to hear of, not a bug."""
        try:
            yield
        except ModelError as error:
            raise Refused(reason, str(error)) from None
        except (MemoryError, RuntimeError) as error:
            # torch has a class for this on CUDA and only a text on the CPU
            if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
                raise Refused(RefusalReason.MEMORY, "the machine has less memory free than its owner gave") from None
            raise


def _check_answer(rows: int, width: int, itemsize: int) -> None:
    if rows * width * itemsize > ANSWER_BYTES_MAX:
        raise Refused(RefusalReason.BAD_STEP, f"an answer of {rows} x {width} numbers is larger than a frame")


def _widest(dtype: torch.dtype, returns: str) -> int:
    """Bytes of one number in the larger of the two answers."""
    return dtype.itemsize if returns == "none" else max(dtype.itemsize, DTYPES[returns].itemsize)
