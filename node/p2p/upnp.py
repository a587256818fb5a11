"""Asking the home router to forward a port: UPnP through miniupnpc, always in a thread (it blocks for seconds).

Invariants: only this node's own listening port is forwarded; a forwarding lapses after LEASE_S unless it is renewed, so
that a killed node leaves nothing open. What a router claims is hearsay: peers dial back before an address is believed.
"""

from __future__ import annotations

import ipaddress
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import miniupnpc
import trio

log = logging.getLogger(__name__)
T = TypeVar("T")

DISCOVER_MS = 1000  # per kind of router that is asked for, four in all
GATEWAY_S = 15.0  # everything that is asked of a router at a time
LEASE_S = 3600
RENEW_S = LEASE_S / 3
PORTS_TRIED = 3  # somebody else in the house may have the first
DESCRIPTORS_MAX = 1000  # miniupnpc waits with select(), which writes outside its set from descriptor 1024 on


@dataclass(frozen=True, slots=True)
class Mapping:
    """`external_ip` may be private: then another router stands before this one."""

    external_ip: str
    external_port: int
    port: int

    @property
    def addr(self) -> str:
        return f"/ip{ipaddress.ip_address(self.external_ip).version}/{self.external_ip}/tcp/{self.external_port}"


async def find_gateway() -> str | None:
    """The external address of the router that speaks UPnP here; None when none answers."""

    def look() -> str | None:
        gateway = _gateway()
        return None if gateway is None else str(gateway.externalipaddress())

    return await _in_thread(look)


async def map_port(port: int) -> Mapping | None:
    """Have the router forward a port to `port` here for LEASE_S; None when there is no router that does."""

    def ask(external: int) -> Mapping | None:
        gateway = _gateway()
        if gateway is None:
            return None
        gateway.addportmapping(external, "TCP", gateway.lanaddr, port, "sotto", "", LEASE_S)
        return Mapping(str(ipaddress.ip_address(gateway.externalipaddress())), external, port)

    for external in range(port, min(port + PORTS_TRIED, 65536)):
        if (mapping := await _in_thread(partial(ask, external))) is not None:
            return mapping
    return None


async def unmap_port(mapping: Mapping) -> None:
    def ask() -> None:
        gateway = _gateway()
        if gateway is not None:
            gateway.deleteportmapping(mapping.external_port, "TCP")

    await _in_thread(ask)


def _gateway() -> Any:
    """The router, asked anew: miniupnpc keeps sockets and answers per object. None when there is none."""
    gateway = miniupnpc.UPnP()
    gateway.discoverdelay = DISCOVER_MS
    if not gateway.discover():
        return None
    gateway.selectigd()
    return gateway


async def _in_thread(function: Callable[[], T | None]) -> T | None:
    """None after GATEWAY_S: the thread is left alone, it ends by itself."""

    def guarded() -> T | None:
        try:
            with open(os.devnull, "rb") as probe:
                if probe.fileno() >= DESCRIPTORS_MAX:
                    log.warning("the router is not asked: this process has too many connections")
                    return None
            return function()
        except Exception as error:  # the library raises bare Exception, and a router may answer anything
            log.debug("the router does not answer: %r", error)
            return None

    with trio.move_on_after(GATEWAY_S):
        return await trio.to_thread.run_sync(guarded, abandon_on_cancel=True)  # type: ignore[call-arg]  # old stubs
    return None
