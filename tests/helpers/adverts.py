"""Adverts and views made by hand."""

from __future__ import annotations

from dataclasses import replace

from protocol.adverts import Advert, HeldSpan, Rtt, Speed
from protocol.ids import PeerId
from protocol.signed import Identity
from protocol.swarm import SwarmView

MIB = 1 << 20


def peer(number: int) -> PeerId:
    """A real peer id, the same on every run."""
    return Identity(number.to_bytes(32, "big")).peer


def advert(
    memory_mib: float = 64,
    kv_mib: float = 64,
    read_gb_s: float = 10.0,
    rtts_ms: tuple[float, ...] = (),
    spans: tuple[HeldSpan, ...] = (),
    *,
    accepting: bool = True,
    relayed: bool = False,
    load_percent: int = 0,
    disk_mib: float = 1 << 20,
) -> Advert:
    """A worker that gives so much for weights and for KV, all free, with arithmetic that never bounds."""
    weights, kv = int(memory_mib * MIB), int(kv_mib * MIB)
    return Advert(
        sequence=1,
        issued_ms=1_000,
        expires_ms=100_000,
        addrs=("/ip4/10.0.0.1/tcp/4001",),
        memory_bytes=weights + kv,
        memory_free_bytes=weights,
        kv_free_bytes=kv,
        disk_free_bytes=int(disk_mib * MIB),
        speeds=(Speed("float32", float(read_gb_s), 1e6),) if read_gb_s else (),
        spans=spans,
        rtts=tuple(Rtt(bytes([i]) * 8, rtt) for i, rtt in enumerate(rtts_ms)),
        device="cpu",
        version="test",
        accepting=accepting,
        relayed=relayed,
        load_percent=load_percent,
    )


def view(*adverts: Advert) -> SwarmView:
    """Worker i is `peer(i)`."""
    swarm = SwarmView()
    for number, each in enumerate(adverts):
        swarm = swarm.with_advert(peer(number), replace(each), peer(number), each.issued_ms)
    return swarm
