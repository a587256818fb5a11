"""`sotto bench dataplane`: what a hop costs on the data plane, beside the same bytes over other carriers in one run.

Two real processes on loopback: this one and far_end.py. The planes take turns in short rounds, so that a machine that
is busy for a moment is busy for all of them. `direct` is the data plane through Mesh.open and Mesh.handle, as the
product uses it; `tcp` is bare trio TCP; `noise` is libp2p's Noise session on a socket, no muxer; `libp2p` is a libp2p
stream.

It measures carriers only: no tensors, no engine, and no network but loopback. Nobody hears of it before its end: a bar
that is drawn meanwhile takes more time than a hop.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import trio

from client.tracing import at_percent
from node.p2p.baseline import noise_outbound
from node.p2p.direct_stream import DirectStream
from node.p2p.mesh import Mesh, MeshConfig, open_mesh
from protocol.errors import InputError, TransportError
from protocol.ids import PeerId
from simnet.bench.pipes import CHUNK_BYTES, CLIENT_SEED, DIRECT, STREAM, Pipe, TcpPipe, bulk, echo, echo_message

HOPS = {"8k": 8 << 10, "64k": 64 << 10, "1m": 1 << 20}
CELL_S = 0.1  # one plane, one size, one round
BULK_CHUNKS = 16  # in one bulk message
WARM_UP = 20
READY_S = 60.0


@dataclass
class Samples:
    """What was measured of one plane."""

    hops: dict[str, list[float]] = field(default_factory=dict)  # seconds, by size
    bulk: list[float] = field(default_factory=list)  # MB/s, by message

    def figures(self) -> dict[str, Any]:
        hops = {
            f"hop_{name}": {"p50_us": _us(times, 50), "p99_us": _us(times, 99), "samples": len(times)}
            for name, times in self.hops.items()
        }
        return {**hops, "bulk_mb_s": round(at_percent(sorted(self.bulk), 50), 1)}


@dataclass(frozen=True, slots=True)
class Plane:
    """Two connections to the far end, or two streams: one for hops, one for bulk."""

    name: str
    hops: Pipe
    bulk: Pipe
    samples: Samples = field(default_factory=Samples)


def run(seconds: float) -> dict[str, Any]:
    """Measure for about `seconds`. Raises InputError when the second process does not start."""
    command = [sys.executable, "-m", "simnet.bench.far_end"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            line = child.stdout.readline()
            if not line:
                raise InputError("the second process of the benchmark did not start: run it from an installed sotto")
            return trio.run(_measure, json.loads(line), seconds)
        finally:
            assert child.stdin is not None
            child.stdin.close()
            try:
                child.wait(READY_S)
            except subprocess.TimeoutExpired:
                child.kill()


async def _measure(far: dict[str, Any], seconds: float) -> dict[str, Any]:
    async with open_mesh(MeshConfig(CLIENT_SEED, (), direct=(DIRECT,))) as mesh, _planes(mesh, far) as planes:
        for plane in planes:
            for size in HOPS.values():
                for _ in range(WARM_UP):
                    await echo(plane.hops, echo_message(size))
            await bulk(plane.bulk, BULK_CHUNKS)
        end = time.perf_counter() + seconds
        rounds = 0
        while not rounds or time.perf_counter() < end:
            rounds += 1
            for plane in planes:
                await _round(plane)
        return _summary({plane.name: plane.samples for plane in planes}, rounds)


async def _round(plane: Plane) -> None:
    for name, size in HOPS.items():
        await _hops(plane, name, size)
    end = time.perf_counter() + CELL_S
    while time.perf_counter() < end:
        plane.samples.bulk.append(await _bulk(plane))
    uploading = True

    async def upload() -> None:
        while uploading:
            await bulk(plane.bulk, BULK_CHUNKS)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(upload)
        await _hops(plane, "8k_under_bulk", HOPS["8k"])
        uploading = False


async def _hops(plane: Plane, name: str, size: int) -> None:
    message, times = echo_message(size), plane.samples.hops.setdefault(name, [])
    end = time.perf_counter() + CELL_S
    while (start := time.perf_counter()) < end:
        await echo(plane.hops, message)
        times.append(time.perf_counter() - start)


async def _bulk(plane: Plane) -> float:
    start = time.perf_counter()
    await bulk(plane.bulk, BULK_CHUNKS)
    return BULK_CHUNKS * CHUNK_BYTES / (time.perf_counter() - start) / 1e6


@asynccontextmanager
async def _planes(mesh: Mesh, far: dict[str, Any]) -> AsyncIterator[list[Plane]]:
    peer, addrs = PeerId(far["peer"]), far["addrs"]
    sockets = [await trio.open_tcp_stream("127.0.0.1", far[plane]) for plane in ("tcp", "tcp", "noise", "noise")]
    pipes: dict[str, list[Pipe]] = {
        "direct": [await mesh.open(peer, addrs, DIRECT) for _ in range(2)],
        "tcp": [TcpPipe(tcp) for tcp in sockets[:2]],
        "noise": [await noise_outbound(tcp, CLIENT_SEED, peer) for tcp in sockets[2:]],
        "libp2p": [await mesh.open(peer, addrs, STREAM) for _ in range(2)],
    }
    if not all(isinstance(pipe, DirectStream) for pipe in pipes["direct"]):
        raise TransportError("no direct connection came about, so there is nothing to measure")
    yield [Plane(name, hops, bulk) for name, (hops, bulk) in pipes.items()]
    for tcp in sockets:
        await tcp.aclose()


def _summary(samples: dict[str, Samples], rounds: int) -> dict[str, Any]:
    figures = {name: measured.figures() for name, measured in samples.items()}
    ours, tcp, noise = figures["direct"], figures["tcp"], figures["noise"]
    ratios = {f"hop_{name}_ratio": _ratio(ours[f"hop_{name}"], tcp[f"hop_{name}"]) for name in HOPS}
    return {
        **ratios,
        "bulk_ratio_to_noise": round(ours["bulk_mb_s"] / noise["bulk_mb_s"], 2),
        "bulk_mb_s": ours["bulk_mb_s"],
        "hop_8k_under_bulk_ratio": _ratio(ours["hop_8k_under_bulk"], ours["hop_8k"]),
        "rounds": rounds,
        "figures": figures,
    }


def _ratio(ours: dict[str, float], other: dict[str, float]) -> float:
    return round(ours["p50_us"] / other["p50_us"], 2)


def _us(times: list[float], percent: int) -> float:
    return round(at_percent(sorted(times), percent) * 1e6, 1)
