"""Prometheus metrics of a node, on loopback unless told otherwise: where they are served.

worker_metrics.py and client_metrics.py name them: as vLLM (`vllm:`) where vLLM has the metric and as Petals' health
where Petals has it, so that existing dashboards work; `sotto_` for the rest. Each node has a registry of its own: no
global state. A worker's process loads nothing of a client's, hence three files.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, start_http_server

from protocol.errors import InputError

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # of histograms


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
