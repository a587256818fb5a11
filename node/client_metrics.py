"""What a client counts, as Prometheus metrics (metrics.py)."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from client.observer import ClientObserver
from node.metrics import SECONDS
from protocol.ids import PeerId
from protocol.swarm import SwarmView


class ClientMetrics(ClientObserver):
    """One client's."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self._running = Gauge("vllm:num_requests_running", "Requests under way.", registry=registry)
        self._prompt = Counter("vllm:prompt_tokens", "Prompt tokens.", registry=registry)
        self._generated = Counter("vllm:generation_tokens", "Generated tokens.", registry=registry)
        self._succeeded = Counter("vllm:request_success", "Requests finished.", ["finished_reason"], registry=registry)
        self._first = Histogram("vllm:time_to_first_token_seconds", "", registry=registry, buckets=SECONDS)
        self._next = Histogram("vllm:inter_token_latency_seconds", "", registry=registry, buckets=SECONDS)
        self._e2e = Histogram("vllm:e2e_request_latency_seconds", "", registry=registry, buckets=SECONDS)
        self._failed = Counter("sotto_requests_failed", "Requests failed.", ["kind"], registry=registry)
        self._step = Histogram(
            "sotto_hop_compute_seconds", "Per step, as hops say.", registry=registry, buckets=SECONDS
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
