"""The client's composition root: a node with a client (client.py) on it, and the tasks that both need.

Each process runs under an identity of the moment and shows capabilities that the user's own identity, which owns the
deployments, issued to it: so any number of clients work with one data folder. A client that uses somebody else's
deployment runs under the user's own identity instead, which is the one that the capability names.

The only root that meets keys. Everything that is started ends with the block it was started in.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial

import trio

from client.driver import Driver
from client.ports import ClientPorts, Credentials, Introduce, none_needed, to_nobody
from node.choosing import REPLAYED_MAX
from node.client import Client, ClientOptions
from node.client_metrics import ClientMetrics
from node.clock import SystemClock
from node.entering import in_touch, member_ports
from node.entry import read_entry
from node.grants import OwnCredentials
from node.groups import ungrouped
from node.identity import load_identity
from node.joining import Leads, stay_joined
from node.lifetime import only_user_of
from node.metrics import serve_metrics
from node.p2p.mesh import MeshConfig, open_mesh
from protocol.errors import InputError
from protocol.ids import DeploymentId
from protocol.scopes import trusted_scopes
from protocol.signed import Identity


@asynccontextmanager
async def open_client(options: ClientOptions) -> AsyncIterator[Client]:
    """A client of this user, joined to the swarm. Raises InputError (bad address, no right), TransportError (nobody
    answers)."""
    folder = options.data_dir / "client"
    owner, token = load_identity(folder), options.capability
    if token is None:
        process = Identity(os.urandom(32))
        credentials = OwnCredentials(owner, process.peer, lambda: int(time.time() * 1000))
        async with _joined(options, _Who(owner, process, credentials, credentials.introduce)) as client:
            yield client
        return
    if token.capability.holder != owner.peer:
        raise InputError(
            f"the capability is for another peer than this one, {owner.peer}: ask its owner for one of yours"
        )

    def shown(deployment: DeploymentId) -> bytes:
        return token.signed if deployment == token.capability.deployment else b""

    with only_user_of(folder, "client of another's deployment"):
        async with _joined(options, _Who(owner, owner, shown)) as client:
            yield client


@asynccontextmanager
async def observe(options: ClientOptions) -> AsyncIterator[Client]:
    """A client that only looks: under an identity of the moment, so it never stands in a deploying client's way."""
    identity = Identity(os.urandom(32))
    async with _joined(replace(options, chooses=False), _Who(identity, identity, none_needed)) as client:
        yield client


async def _prepared(client: Client) -> None:
    """What helps requests to choose. One after the other: a draft model's speed is measured when it is opened."""
    await client.choosing.prepare(partial(client.journal.newest, REPLAYED_MAX))
    await client.drafts.run()


@dataclass(frozen=True, slots=True)
class _Who:
    """`owner` signs manifests, `process` is what others see; `credentials` tie the two together, and `introduce` ties
    workers to the owner."""

    owner: Identity
    process: Identity
    credentials: Credentials
    introduce: Introduce = to_nobody


@asynccontextmanager
async def _joined(options: ClientOptions, who: _Who) -> AsyncIterator[Client]:
    entry = read_entry(options.bootstrap)
    leads, metrics = Leads(entry.addrs), ClientMetrics()
    mesh_config = MeshConfig(who.process.seed, listen=())  # no listener: every stream that is read is opened from here
    with ungrouped():
        async with open_mesh(mesh_config) as mesh, trio.open_nursery() as nursery:
            with serve_metrics(options.metrics, metrics.registry):
                transport, gossip = member_ports(mesh, entry.key)
                ports = ClientPorts(
                    identity=who.process,
                    transport=transport,
                    gossip=gossip,
                    clock=SystemClock(),
                    entropy=os.urandom,
                    observer=metrics,
                    credentials=who.credentials,
                    introduce=who.introduce,
                    trusted=trusted_scopes(entry.addrs, entry.key is not None),
                )
                driver = Driver(ports)
                await nursery.start(driver.run)  # type: ignore[arg-type]  # trio-typing's stubs are older than trio
                client = Client(options, who.owner, ports, driver)
                metrics.watch(lambda: client.watch.view)
                await client.watch.start()
                if client.sharing is not None:
                    await client.sharing.start()
                async with in_touch(mesh, leads, entry):
                    nursery.start_soon(stay_joined, mesh, leads, random.random)
                    nursery.start_soon(client.leases.run)
                    nursery.start_soon(client.journal.run)
                    if options.advised:
                        nursery.start_soon(_prepared, client)
                    if client.sharing is not None:
                        nursery.start_soon(client.sharing.tell_on)
                        nursery.start_soon(client.sharing.keep)
                    try:
                        yield client
                    finally:
                        await client.leases.aclose()
                        await client.journal.aclose()
                        if client.sharing is not None:
                            await client.sharing.aclose()
            nursery.cancel_scope.cancel()
