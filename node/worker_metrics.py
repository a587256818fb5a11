"""What a worker counts, as Prometheus metrics (metrics.py)."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from node.metrics import SECONDS
from protocol.ids import PeerId
from protocol.messages import RefusalReason
from worker.observer import WorkerObserver


class WorkerMetrics(WorkerObserver):
    """One worker's."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self._kv_total = 1
        self._running = Gauge("vllm:num_requests_running", "Sessions attached or open.", registry=registry)
        self._waiting = Gauge("vllm:num_requests_waiting", "Steps that wait or run.", registry=registry)
        self._kv_usage = Gauge("vllm:kv_cache_usage_perc", "Share of KV memory reserved, 0 to 1.", registry=registry)
        self._prompt = Counter("vllm:prompt_tokens", "Positions computed in prefill.", registry=registry)
        self._generated = Counter("vllm:generation_tokens", "Positions computed in decode.", registry=registry)
        self._step = Histogram(
            "sotto_step_compute_seconds", "Compute per step.", ["phase"], registry=registry, buckets=SECONDS
        )
        self._prefill_step, self._decode_step = self._step.labels("prefill"), self._step.labels("decode")
        self._busy = Counter("sotto_engine_busy_seconds", "Time that the engine computed.", registry=registry)
        self._bubble = Counter(
            "sotto_engine_bubble_seconds", "Time that it did not, though a session was open.", registry=registry
        )
        self._repeated = Counter("sotto_steps_repeated", "Steps answered from the record.", registry=registry)
        self._prefix_asked = Counter(
            "vllm:prefix_cache_queries", "Tokens of pages that sessions named.", registry=registry
        )
        self._prefix_held = Counter("vllm:prefix_cache_hits", "Of these, tokens that were kept.", registry=registry)
        self._dropped = Counter("sotto_outputs_dropped", "Returned copies dropped.", registry=registry)
        self._failed = Counter("sotto_sessions_failed", "Sessions failed.", ["reason"], registry=registry)
        self._preempted = Counter("vllm:num_preemptions", "Sessions whose memory went to others.", registry=registry)
        self._refused = Counter("sotto_requests_refused", "Requests refused.", ["reason"], registry=registry)
        self._bytes = Counter("sotto_network_bytes", "Bytes moved.", ["protocol", "direction"], registry=registry)
        self._weights = Gauge("sotto_weight_bytes", "Bytes of weights reserved.", registry=registry)
        self._kv = Gauge("sotto_kv_bytes", "Bytes of KV reserved.", registry=registry)
        self._violations = Counter(
            "sotto_protocol_violations", "Rules broken by peers.", ["protocol"], registry=registry
        )
        self._adverts = Counter("sotto_adverts_refused", "Adverts that did not hold.", registry=registry)
        self._strangers = Counter(
            "sotto_strangers_refused", "Streams of peers outside the private swarm.", ["protocol"], registry=registry
        )

    def kv_total(self, kv_bytes: int) -> None:
        """What `vllm:kv_cache_usage_perc` is a share of."""
        self._kv_total = max(1, kv_bytes)

    def step_computed(self, positions: int, compute_s: float, prefill: bool) -> None:
        (self._prompt if prefill else self._generated).inc(positions)
        (self._prefill_step if prefill else self._decode_step).observe(compute_s)

    def engine_used(self, busy_s: float, bubble_s: float) -> None:
        self._busy.inc(busy_s)
        self._bubble.inc(bubble_s)

    def step_repeated(self) -> None:
        self._repeated.inc()

    def prefix_asked(self, tokens: int, held: int) -> None:
        self._prefix_asked.inc(tokens)
        self._prefix_held.inc(held)

    def output_dropped(self) -> None:
        self._dropped.inc()

    def queue_changed(self, steps: int) -> None:
        self._waiting.set(steps)

    def sessions_changed(self, sessions: int) -> None:
        self._running.set(sessions)

    def session_failed(self, reason: str) -> None:
        self._failed.labels(reason).inc()
        if reason == RefusalReason.PREEMPTED:
            self._preempted.inc()

    def request_refused(self, reason: str) -> None:
        self._refused.labels(reason).inc()

    def bytes_moved(self, protocol: str, received: int, sent: int) -> None:
        self._bytes.labels(protocol, "received").inc(received)
        self._bytes.labels(protocol, "sent").inc(sent)

    def memory_changed(self, weight_bytes: int, kv_bytes: int) -> None:
        self._weights.set(weight_bytes)
        self._kv.set(kv_bytes)
        self._kv_usage.set(kv_bytes / self._kv_total)

    def violation(self, peer: PeerId, protocol: str) -> None:
        # Not by peer: strangers choose their ids, and each label value costs memory for ever.
        self._violations.labels(protocol).inc()

    def advert_refused(self, peer: PeerId) -> None:
        self._adverts.inc()

    def stranger_refused(self, peer: PeerId, protocol: str) -> None:
        self._strangers.labels(protocol).inc()
