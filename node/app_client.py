"""The client's composition root: a node that finds workers and deploys sealed models on them.

Each process runs under an identity of the moment and shows capabilities that the user's own identity, which owns the
deployments, issued to it: so any number of clients work with one data folder. A client that uses somebody else's
deployment runs under the user's own identity instead, which is the one that the capability names.

The only root that meets keys. Everything that is started ends with the block it was started in. Sealing runs in a
thread; the event loop stays free for the network.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from client.deploy import DeployedHop, deploy
from client.deploy import Progress as UploadProgress
from client.driver import Driver, run_all
from client.leases import LeaseKeeper, Leasing
from client.placement import ModelNeeds, Placement, PlaceOptions, plan
from client.ports import ClientPorts, Credentials, Introduce, none_needed, to_nobody
from client.revoking import revoke_at
from client.routing import Hop, Route, choose_route, route_of
from client.sealing import Sealer
from client.swarm import SwarmWatch
from client.upload import Supply, holders_in
from equivariant.keys import RootKey, require_key
from models.checkpoint import Checkpoint
from models.tokenizer import Tokenizer
from node.clock import SystemClock
from node.entry import read_entry
from node.grants import Grants, OwnCredentials, Token
from node.groups import ungrouped
from node.identity import load_identity
from node.joining import Leads, join, join_found, stay_joined
from node.lan import SWITCH, allowed, on_lan
from node.lifetime import only_user_of
from node.metrics import ClientMetrics, serve_metrics
from node.model import DeployedModel
from node.p2p.mesh import Mesh, MeshConfig, open_mesh
from node.private import PrivateGossip, PrivateTransport
from node.sealing import FolderSource, Progress, SealedFolder, seal_into, sealed_place
from protocol import limits
from protocol.capabilities import Right
from protocol.errors import InputError, Refused, RouteUnavailable
from protocol.ids import DeploymentId, PeerId
from protocol.membership import PUBLIC_SWARM, SwarmKey
from protocol.ports import Gossip, Transport
from protocol.signed import Identity
from protocol.swarm import SwarmView

KV_TOKENS_DEFAULT = 4096  # KV room that a placement asks for: one long chat, or several short requests
LAN_SEARCH_S = 4.0  # an answer takes a tenth of a second, but the first question may be lost
SETTLE_S = 1.2 * limits.ADVERT_INTERVAL_MIN_S  # every worker of a small swarm has been heard once by then


@dataclass(frozen=True, slots=True)
class ClientOptions:
    """`data_dir` holds identity, keys and sealed models. `bootstrap` holds addresses and invites; when it is empty the
    local network is searched for a public swarm. `discover_s` is how long to wait for workers. `capability`: what the
    owner of another's deployment gave, for a client that uses that one."""

    data_dir: Path
    bootstrap: tuple[str, ...]
    metrics: tuple[str, int] | None = None
    discover_s: float = 10.0
    capability: Token | None = None


@dataclass(frozen=True, slots=True)
class SealedModel:
    """A model ready to be deployed, and the key that opens what comes back (None in the plain tier)."""

    checkpoint: Checkpoint
    folder: SealedFolder
    key: RootKey | None


@dataclass(frozen=True, slots=True)
class DeployOptions:
    """`hops_min`: spread over at least so many workers. `kv_tokens`: room that this client's sessions share; it is
    leased, so that nobody else can take it."""

    hops_min: int = 1
    kv_tokens: int = KV_TOKENS_DEFAULT
    on_placement: Callable[[Placement, SwarmView], None] = lambda *_: None
    on_upload: UploadProgress = lambda _: None


class Client:
    """Made by `open_client`."""

    def __init__(self, options: ClientOptions, owner: Identity, ports: ClientPorts, driver: Driver) -> None:
        self.options = options
        self.ports = ports
        self.watch = SwarmWatch(ports.gossip, ports.clock, ports.observer)
        self.leases = LeaseKeeper(ports)
        self.grants = Grants(options.data_dir / "client" / "grants")
        self._owner = owner
        self._driver = driver
        self._started = trio.current_time()

    async def discover(self, enough: Callable[[SwarmView], bool] = lambda view: bool(view.members)) -> SwarmView:
        """The swarm as gossip tells it: as soon as it is `enough`, but not before every worker had time to speak.

        When it is never enough, the view after `discover_s`. Raises RouteUnavailable when nobody was heard.
        """
        with trio.move_on_after(self.options.discover_s):
            await self.watch.wait_for(lambda view: bool(view.members))
            await trio.sleep_until(self._started + SETTLE_S)
            await self.watch.wait_for(enough)
        if not self.watch.view.members:
            raise RouteUnavailable(self._nobody())
        return self.watch.view

    def _nobody(self) -> str:
        refused = self.watch.refused
        if refused:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(refused.items()))
            return (
                f"no workers found: every advert that came was refused ({reasons}); when they are expired or from the "
                "future, set this machine's clock or the workers'"
            )
        return (
            f"no workers found in {self.options.discover_s:g} s: the bootstrap node answers, but no worker advertises "
            "through it; start one with 'sotto worker --bootstrap ADDRESS', or get an invite if the swarm is private"
        )

    async def seal(self, model: Checkpoint, dtype: str, key: RootKey | None, progress: Progress) -> SealedModel:
        """Seal `model` into the data folder, or find it there from an earlier run."""
        place = sealed_place(self.options.data_dir / "sealed", model, dtype, key)
        work = partial(seal_into, place, model, dtype, key, self._owner.peer, progress)
        folder, _ = await trio.to_thread.run_sync(work, abandon_on_cancel=True)  # type: ignore[call-arg]  # old stubs; a seal resumes
        return SealedModel(model, folder, key)

    async def place(self, needs: ModelNeeds, options: PlaceOptions) -> tuple[Placement, SwarmView]:
        """Who would hold what. Raises RouteUnavailable saying what is missing."""
        view = await self.discover(lambda view: _fits(view, needs, options))
        return plan(view, needs, options), view

    async def deploy(self, model: SealedModel, options: DeployOptions) -> DeployedModel:
        """Lease the model on workers that hold it, or bring it to workers, and give it back ready for prompts."""
        data, manifest = model.folder.manifest(self._owner)
        leasing = Leasing(self.leases, options.kv_tokens)
        hops: tuple[DeployedHop, ...] = ()
        route = await self._leased_route(model, data, options)
        if route is None:
            needs = ModelNeeds.of_manifest(manifest, options.kv_tokens)
            where = PlaceOptions(hops_min=options.hops_min)
            placement, view = await self.place(needs, where)
            options.on_placement(placement, view)
            route = route_of(placement, view, manifest.deployment)
            supply = Supply(FolderSource(model.folder), holders_in(view, manifest.deployment))
            hops = await deploy(self.ports, route, data, supply, leasing, options.on_upload)
        await self._remind_of_revoked(route)
        sealer = await trio.to_thread.run_sync(model.folder.sealer, model.checkpoint, model.key)
        return self._ready(route, hops, sealer)

    async def attach(self, checkpoint: Checkpoint, key: RootKey | None) -> DeployedModel:
        """The deployment that the options' capability is for, as its owner brought it to workers. Nothing is sealed,
        sent or leased. Raises InputError (wrong key, no capability), RouteUnavailable."""
        token = self.options.capability
        if token is None or Right.USE not in token.capability.rights:
            raise InputError(
                "give a capability with the right to use the deployment: its owner makes one with 'sotto grant'"
            )
        if bool(key) != bool(token.key_check):
            raise InputError(f"the deployment is of tier {'ee' if token.key_check else 'plain'}: say so with --privacy")
        deployment = token.capability.deployment
        if key is not None:
            require_key(key, deployment, bytes.fromhex(token.key_check))
        blocks = checkpoint.config.num_blocks
        await self.discover(lambda view: _held(view, deployment, blocks) is not None)
        route = choose_route(self.watch.view, deployment, blocks)
        sealer = await trio.to_thread.run_sync(Sealer.open, checkpoint, "float32", key, deployment)
        return self._ready(route, (), sealer)

    async def revoke(self, token: Token) -> tuple[list[PeerId], list[PeerId]]:
        """Have all workers of the swarm that hold the deployment refuse `token` from now on. Gives those that were
        told, and those that could not be. Raises InputError when it is not this user's to revoke."""
        if token.owner != self._owner.peer:
            raise InputError("the capability was issued by another identity: only its owner can revoke it")
        self.grants.revoke(token)
        view = await self.discover(lambda _: False)
        told: list[PeerId] = []
        missed: list[PeerId] = []

        async def tell(hop: Hop) -> None:
            try:
                if await revoke_at(self.ports, hop, token.capability.deployment, (token.capability.serial,)):
                    told.append(hop.peer)
            except (Refused, RouteUnavailable):
                missed.append(hop.peer)

        holders = view.holders(token.capability.deployment)
        hops = [Hop(member.peer, member.advert.addrs, span.start, span.end) for member, span in holders]
        await run_all(*(partial(tell, hop) for hop in hops))
        return sorted(told), sorted(missed)

    def _ready(self, route: Route, hops: tuple[DeployedHop, ...], sealer: Sealer) -> DeployedModel:
        return DeployedModel(
            ports=self.ports,
            driver=self._driver,
            route=route,
            hops=hops,
            ends=sealer.ends(),
            tokenizer=Tokenizer.open(sealer.checkpoint.tokenizer_file),
            config=sealer.checkpoint.config,
        )

    async def _leased_route(self, model: SealedModel, manifest: bytes, options: DeployOptions) -> Route | None:
        """A route over workers that hold the model and lease it to us; None when there is none."""
        await self.discover()
        route = _held(self.watch.view, model.folder.deployment, model.folder.info.num_blocks)
        if route is None or len(route.hops) < options.hops_min:
            return None
        try:
            supply = Supply(FolderSource(model.folder), holders_in(self.watch.view, model.folder.deployment))
            await deploy(self.ports, route, manifest, supply, Leasing(self.leases, options.kv_tokens))
        except (Refused, RouteUnavailable):  # others may have room
            await self.leases.release(model.folder.deployment)
            return None
        return route

    async def _remind_of_revoked(self, route: Route) -> None:
        """A worker that did not hold the deployment when a capability was revoked has not heard of it."""
        now_ms = int(self.ports.clock.time() * 1000)
        serials = self.grants.revoked(route.deployment, now_ms)
        if serials:
            await run_all(*(partial(_told, self.ports, hop, route.deployment, serials) for hop in route.hops))


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
    async with _joined(options, _Who(identity, identity, none_needed)) as client:
        yield client


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
                ports = _ports(who, mesh, entry.key, metrics)
                driver = Driver(ports)
                await nursery.start(driver.run)  # type: ignore[arg-type]  # trio-typing's stubs are older than trio
                client = Client(options, who.owner, ports, driver)
                metrics.watch(lambda: client.watch.view)
                await client.watch.start()
                async with _in_touch(mesh, leads):
                    nursery.start_soon(stay_joined, mesh, leads, random.random)
                    nursery.start_soon(client.leases.run)
                    try:
                        yield client
                    finally:
                        await client.leases.aclose()
            nursery.cancel_scope.cancel()


def _ports(who: _Who, mesh: Mesh, key: SwarmKey | None, metrics: ClientMetrics) -> ClientPorts:
    """The world as a client of the swarm sees it: the mesh itself, or the members' part of it."""
    transport: Transport = mesh
    gossip: Gossip = mesh
    if key is not None:
        transport, gossip = PrivateTransport(mesh, key), PrivateGossip(mesh, key, mesh.peer, os.urandom)
    return ClientPorts(
        identity=who.process,
        transport=transport,
        gossip=gossip,
        clock=SystemClock(),
        entropy=os.urandom,
        observer=metrics,
        credentials=who.credentials,
        introduce=who.introduce,
    )


@asynccontextmanager
async def _in_touch(mesh: Mesh, leads: Leads) -> AsyncIterator[None]:
    """Connected to one of `leads`, or, when there are none, to a peer of the local network. Raises InputError (nobody
    there), TransportError (no lead answers)."""
    if leads:
        await join(mesh, leads)
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


def _held(view: SwarmView, deployment: DeploymentId, blocks: int) -> Route | None:
    try:
        return choose_route(view, deployment, blocks)
    except RouteUnavailable:
        return None


async def _told(ports: ClientPorts, hop: Hop, deployment: DeploymentId, serials: tuple[bytes, ...]) -> None:
    await revoke_at(ports, hop, deployment, serials)


def _fits(view: SwarmView, needs: ModelNeeds, options: PlaceOptions) -> bool:
    try:
        plan(view, needs, options)
    except RouteUnavailable:
        return False
    return True
