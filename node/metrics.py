"""Prometheus metrics of a worker and of a client, on loopback unless told otherwise.

vLLM's names (`vllm:`) where vLLM has the metric and Petals' health names where Petals has it, so that existing
dashboards work; `sotto_` for the rest. Each node has a registry of its own: no global state.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from protocol.errors import InputError
from protocol.ids import PeerId
from protocol.messages import RefusalReason
from protocol.swarm import SwarmView

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


def parse_metrics_address(text: str) -> tuple[str, int] | None:
    """'HOST:PORT' or 'off'. Raises InputError."""
    if text == "off":
        return None
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise InputError(f"{text!r} is no address for metrics: write HOST:PORT, or off")
    return host, int(port)


@contextmanager
def serve_metrics(address: tuple[str, int] | None, registry: CollectorRegistry) -> Iterator[str]:
    """Serve /metrics within the block; gives its URL, "" when `address` is None. Raises InputError (port in use)."""
    if address is None:
        yield ""
        return
    try:
        server, thread = start_http_server(address[1], address[0], registry)
    except OSError as error:
        raise InputError(
            f"cannot serve metrics on {address[0]}:{address[1]} ({error.strerror}): give --metrics HOST:PORT or off"
        ) from None
    try:
        yield f"http://{address[0]}:{server.server_port}/metrics"
    finally:
        with contextlib.ExitStack() as stack:
            stack.callback(server.server_close)
            stack.callback(thread.join)
            stack.callback(server.shutdown)


class WorkerMetrics:
    """Implements worker.observer.WorkerObserver."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self._kv_total = 1
        self._running = Gauge("vllm:num_requests_running", "Sessions attached or open.", registry=registry)
        self._waiting = Gauge("vllm:num_requests_waiting", "Steps that wait or run.", registry=registry)
        self._kv_usage = Gauge("vllm:kv_cache_usage_perc", "Share of KV memory reserved, 0 to 1.", registry=registry)
        self._prompt = Counter("vllm:prompt_tokens", "Positions computed in prefill.", registry=registry)
        self._generated = Counter("vllm:generation_tokens", "Positions computed in decode.", registry=registry)
        self._step = Histogram(
            "sotto_step_compute_seconds", "Compute per step.", ["phase"], registry=registry, buckets=_SECONDS
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


class ClientMetrics:
    """Implements client.observer.ClientObserver."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self._running = Gauge("vllm:num_requests_running", "Requests under way.", registry=registry)
        self._prompt = Counter("vllm:prompt_tokens", "Prompt tokens.", registry=registry)
        self._generated = Counter("vllm:generation_tokens", "Generated tokens.", registry=registry)
        self._succeeded = Counter("vllm:request_success", "Requests finished.", ["finished_reason"], registry=registry)
        self._first = Histogram("vllm:time_to_first_token_seconds", "", registry=registry, buckets=_SECONDS)
        self._next = Histogram("vllm:inter_token_latency_seconds", "", registry=registry, buckets=_SECONDS)
        self._e2e = Histogram("vllm:e2e_request_latency_seconds", "", registry=registry, buckets=_SECONDS)
        self._failed = Counter("sotto_requests_failed", "Requests failed.", ["kind"], registry=registry)
        self._step = Histogram(
            "sotto_hop_compute_seconds", "Per step, as hops say.", registry=registry, buckets=_SECONDS
        )
        self._dropped = Counter("sotto_outputs_dropped", "Outputs nobody waited for.", registry=registry)
        self._lost = Counter("sotto_hops_lost", "Workers lost in use.", registry=registry)
        self._violations = Counter("sotto_protocol_violations", "Rules broken by workers.", registry=registry)
        self._adverts = Counter("sotto_adverts_refused", "Adverts that did not hold.", ["reason"], registry=registry)
        self._uploaded = Counter("sotto_shard_bytes_uploaded", "Bytes of sealed shards sent.", registry=registry)
        self._servers = Gauge("servers_num", "Workers in the swarm (Petals' health name).", registry=registry)

    def watch(self, view: Callable[[], SwarmView]) -> None:
        """Count the swarm's workers whenever somebody scrapes."""
        self._servers.set_function(lambda: len(view().members))

    def request_started(self, prompt_tokens: int) -> None:
        self._running.inc()
        self._prompt.inc(prompt_tokens)

    def first_token(self, seconds: float) -> None:
        self._first.observe(seconds)

    def next_token(self, seconds: float) -> None:
        self._next.observe(seconds)

    def request_finished(self, finish_reason: str, generated_tokens: int, seconds: float) -> None:
        self._running.dec()
        self._generated.inc(generated_tokens)
        self._succeeded.labels(finish_reason).inc()
        self._e2e.observe(seconds)

    def request_failed(self, kind: str, generated_tokens: int) -> None:
        self._running.dec()
        self._generated.inc(generated_tokens)
        self._failed.labels(kind).inc()

    def step_computed(self, peer: PeerId, seconds: float) -> None:
        self._step.observe(seconds)

    def output_dropped(self, peer: PeerId) -> None:
        self._dropped.inc()

    def hop_lost(self, peer: PeerId) -> None:
        self._lost.inc()

    def violation(self, peer: PeerId) -> None:
        self._violations.inc()

    def advert_refused(self, reason: str) -> None:
        self._adverts.labels(reason).inc()

    def uploaded(self, peer: PeerId, nbytes: int) -> None:
        self._uploaded.inc(nbytes)
