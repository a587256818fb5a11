"""Metrics and logs: the names people know, on loopback, and nothing that anybody said."""

from __future__ import annotations

import io
import json
import logging
import socket
import urllib.request
from collections.abc import Iterator

import pytest
import trio
from prometheus_client import generate_latest

from client.observer import ClientObserver
from node.client_metrics import ClientMetrics
from node.logs import EVENTS_MAX, LINES_MAX, JsonFormatter, Repeats, configure
from node.metrics import parse_metrics_address, serve_metrics
from node.serving import serve
from node.worker_metrics import WorkerMetrics
from protocol.errors import InputError
from protocol.ids import PeerId
from protocol.messages import CONTROL, RefusalReason
from protocol.ports import Stream
from tests.helpers.adverts import advert, view
from worker.observer import WorkerObserver

STRANGER = PeerId("12D3KooWK99VoVxNE7XzyBwXEzW7xhK7Gpv85r9F3V3fyKSUKPH5")


def worker_metrics() -> str:
    metrics = WorkerMetrics()
    observer: WorkerObserver = metrics  # the port that the worker speaks
    metrics.kv_total(1000)
    observer.step_computed(7, 0.01, True)
    observer.step_computed(1, 0.001, False)
    observer.engine_used(1.5, 0.5)
    observer.step_repeated()
    observer.prefix_asked(640, 512)
    observer.output_dropped()
    observer.queue_changed(3)
    observer.sessions_changed(2)
    observer.session_failed(RefusalReason.HOP_LOST)
    observer.session_failed(RefusalReason.PREEMPTED)
    observer.request_refused(RefusalReason.MEMORY)
    observer.bytes_moved(CONTROL, 10, 20)
    observer.memory_changed(500, 250)
    observer.violation(STRANGER, CONTROL)
    observer.advert_refused(STRANGER)
    return generate_latest(metrics.registry).decode()


def client_metrics() -> str:
    metrics = ClientMetrics()
    observer: ClientObserver = metrics
    metrics.watch(lambda: view(advert(), advert()))
    observer.request_started(5)
    observer.first_token(0.2)
    observer.next_token(0.01)
    observer.request_finished("stop", 2, 0.3)
    observer.request_started(5)
    observer.request_failed("HopLost", 1)
    observer.step_computed(STRANGER, 0.01)
    observer.output_dropped(STRANGER)
    observer.hop_lost(STRANGER)
    observer.violation(STRANGER)
    observer.advert_refused("forged")
    observer.uploaded(STRANGER, 100)
    return generate_latest(metrics.registry).decode()


@pytest.mark.parametrize(
    ("text", "samples"),
    [
        (
            worker_metrics(),
            [
                "vllm:num_requests_running 2.0",
                "vllm:num_requests_waiting 3.0",
                "vllm:kv_cache_usage_perc 0.25",
                "vllm:prompt_tokens_total 7.0",
                "vllm:generation_tokens_total 1.0",
                "sotto_engine_busy_seconds_total 1.5",
                "sotto_engine_bubble_seconds_total 0.5",
                "vllm:prefix_cache_queries_total 640.0",
                "vllm:prefix_cache_hits_total 512.0",
                'sotto_sessions_failed_total{reason="hop_lost"} 1.0',
                "vllm:num_preemptions_total 1.0",
                'sotto_requests_refused_total{reason="memory"} 1.0',
                'sotto_network_bytes_total{direction="sent",protocol="/sotto/control/1"} 20.0',
                "sotto_weight_bytes 500.0",
            ],
        ),
        (
            client_metrics(),
            [
                "servers_num 2.0",
                "vllm:num_requests_running 0.0",
                'vllm:request_success_total{finished_reason="stop"} 1.0',
                "vllm:time_to_first_token_seconds_count 1.0",
                "vllm:inter_token_latency_seconds_count 1.0",
                "vllm:e2e_request_latency_seconds_count 1.0",
                "sotto_shard_bytes_uploaded_total 100.0",
            ],
        ),
    ],
    ids=["worker", "client"],
)
def test_names_and_values(text: str, samples: list[str]) -> None:
    assert set(samples) <= set(text.splitlines())
    assert STRANGER not in text  # strangers choose their ids, and each label value costs memory for ever


@pytest.mark.parametrize(("metrics", "observer"), [(WorkerMetrics, WorkerObserver), (ClientMetrics, ClientObserver)])
def test_all_that_is_told_is_counted(metrics: type, observer: type) -> None:
    assert {name for name in vars(observer) if not name.startswith("_")} <= set(vars(metrics))


def test_served_where_asked_and_gone_afterwards() -> None:
    metrics = WorkerMetrics()
    with serve_metrics(("127.0.0.1", 0), metrics.registry) as url:
        assert url.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(url, timeout=5) as reply:
            assert b"vllm:num_requests_running" in reply.read()
        port = int(url.split(":")[2].split("/")[0])
        with pytest.raises(InputError, match=f"127.0.0.1:{port}"), serve_metrics(("127.0.0.1", port), metrics.registry):
            pass
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0
    with serve_metrics(None, metrics.registry) as url:
        assert url == ""


def test_metrics_addresses() -> None:
    assert parse_metrics_address("127.0.0.1:9517") == ("127.0.0.1", 9517)
    assert parse_metrics_address("off") is None
    for nonsense in ("9517", ":9517", "host:", "host:99999", "host:x"):
        with pytest.raises(InputError, match="HOST:PORT"):
            parse_metrics_address(nonsense)


def test_a_log_line_has_ids_and_places_but_nothing_that_was_said() -> None:
    secret, stream = "the user's own words", io.StringIO()
    logger = logging.Logger("sotto.test")
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    logger.addHandler(handler)
    try:
        raise ValueError(secret)
    except ValueError:
        logger.exception("a step failed", extra={"session": "ab12", "positions": 3})
    line = json.loads(stream.getvalue())
    assert (line["event"], line["level"], line["session"], line["positions"]) == ("a step failed", "error", "ab12", 3)
    assert line["exception"] == "ValueError"
    assert "test_telemetry.py" in line["traceback"][-1]
    assert secret not in stream.getvalue()


def test_what_a_handler_raised_is_not_quoted() -> None:
    secret, written = "the user's own words", io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(JsonFormatter())

    class Far:
        remote = STRANGER

        async def reset(self) -> None:
            pass

    async def fails(_: Stream) -> None:
        raise ValueError(secret)

    logger = logging.getLogger("node.serving")
    logger.addHandler(handler)
    try:
        trio.run(serve, Far(), CONTROL, fails)
    finally:
        logger.removeHandler(handler)
    line = json.loads(written.getvalue())
    assert (line["exception"], STRANGER in line["event"]) == ("ValueError", True)
    assert secret not in written.getvalue()


@pytest.fixture
def _unchanged() -> Iterator[None]:
    """Logging as it is, put back afterwards."""
    root, named = logging.getLogger(), [logging.getLogger(name) for name in ("sotto", "node")]
    handlers, levels = root.handlers[:], [each.level for each in (root, *named)]
    yield
    root.handlers[:] = handlers
    for each, level in zip((root, *named), levels, strict=True):
        each.setLevel(level)


@pytest.mark.usefixtures("_unchanged")
@pytest.mark.parametrize("level", ["debug", "error"])
def test_the_level_is_of_all_that_is_ours(level: str) -> None:
    configure(level)
    for name in ("sotto.worker", "node.p2p.mesh", "node.serving"):
        assert logging.getLogger(name).getEffectiveLevel() == getattr(logging, level.upper())
    assert logging.getLogger("a library").getEffectiveLevel() == logging.WARNING


@pytest.mark.parametrize("level", ["verbose", "", "20", "notset"])
def test_what_is_no_level_is_said(level: str) -> None:
    with pytest.raises(InputError, match="debug, info, warning or error"):
        configure(level)


def test_a_flood_of_one_event_is_counted_not_written() -> None:
    repeats, written = Repeats(), []

    def log(event: str, at: float) -> None:
        record = logging.makeLogRecord({"name": "sotto.test", "msg": event, "created": at})
        if repeats.filter(record):
            written.append((event, at, getattr(record, "left_out", 0)))

    for hundredth in range(0, 2500):
        log("violation", hundredth / 100)
    log("another", 12.0)
    assert len(written) == 3 * LINES_MAX + 1
    assert [left_out for _, _, left_out in written if left_out] == [1000 - LINES_MAX] * 2
    for number in range(10_000):
        log(f"text of a library {number}", 13.0)
    assert len(repeats._events) <= EVENTS_MAX
