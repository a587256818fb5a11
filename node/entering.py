"""The way into a swarm: the mesh as members see it; and, for a client, a first peer to talk to."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from node.entry import Entry
from node.joining import Leads, join, join_found
from node.lan import SWITCH, allowed, on_lan
from node.p2p.mesh import Mesh
from node.private import OnStranger, PrivateGossip, PrivateTransport
from protocol.errors import InputError, TransportError
from protocol.membership import PUBLIC_SWARM, SwarmKey
from protocol.ports import Gossip, Transport

LAN_SEARCH_S = 4.0  # an answer takes a tenth of a second, but the first question may be lost


def member_ports(
    mesh: Mesh, key: SwarmKey | None, on_stranger: OnStranger = lambda *_: None
) -> tuple[Transport, Gossip]:
    """The mesh as members of the swarm see it: itself, or their part of it."""
    if key is None:
        return mesh, mesh
    return PrivateTransport(mesh, key, on_stranger), PrivateGossip(mesh, key, mesh.peer, os.urandom)


@asynccontextmanager
async def in_touch(mesh: Mesh, leads: Leads, entry: Entry) -> AsyncIterator[None]:
    """Connected to one of `leads`, which are those of `entry`, or, when there are none, to a peer of the local network.
    Raises InputError (nobody there), TransportError (no lead answers)."""
    if leads:
        try:
            await join(mesh, leads)
        except TransportError as error:
            if not entry.invited:
                raise
            raise TransportError(
                f"{error}, so the invite's nodes are down, or have moved and a member must print a new one with "
                "'sotto invite'"
            ) from error
        yield
        return
    if not allowed():
        raise InputError(
            f"no swarm named, and ${SWITCH} says not to look around: give --bootstrap ADDRESS or INVITE, "
            "or start workers with 'sotto sim up'"
        )
    async with on_lan(PUBLIC_SWARM, None, leads.sighted) as lan:
        with trio.move_on_after(0 if lan.trouble else LAN_SEARCH_S):
            await join_found(mesh, leads)
        if not mesh.connected():
            why = f" ({lan.trouble})" if lan.trouble else ""
            raise InputError(
                f"no swarm named, and none is on the local network{why}: give --bootstrap ADDRESS or INVITE "
                "('sotto invite' prints one), or start workers with 'sotto sim up'"
            )
        yield
