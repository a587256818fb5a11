"""The client's composition root: a node that finds workers and deploys sealed models on them.

The only root that meets keys. Everything that is started ends with the block it was started in. Sealing runs in a
thread; the event loop stays free for the network.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from client.deploy import DeployedHop, deploy
from client.deploy import Progress as UploadProgress
from client.driver import Driver
from client.placement import ModelNeeds, Placement, PlaceOptions, plan
from client.ports import ClientPorts
from client.routing import Route, choose_route, route_of
from client.swarm import SwarmWatch
from client.upload import holders_in
from equivariant.keys import RootKey
from models.checkpoint import Checkpoint
from models.tokenizer import Tokenizer
from node.clock import SystemClock
from node.groups import ungrouped
from node.identity import load_identity
from node.joining import join
from node.lifetime import only_user_of
from node.metrics import ClientMetrics, serve_metrics
from node.model import DeployedModel
from node.p2p.mesh import MeshConfig, open_mesh
from node.sealing import FolderSource, Progress, SealedFolder, seal_into, sealed_place
from protocol import limits
from protocol.errors import InputError, RouteUnavailable
from protocol.signed import Identity
from protocol.swarm import SwarmView

KV_TOKENS_DEFAULT = 4096  # KV room that a placement asks for: one long chat, or several short requests
SETTLE_S = 1.2 * limits.ADVERT_INTERVAL_MIN_S  # every worker of a small swarm has been heard once by then


@dataclass(frozen=True, slots=True)
class ClientOptions:
    """`data_dir` holds identity, keys and sealed models. `discover_s` is how long to wait for workers."""

    data_dir: Path
    bootstrap: tuple[str, ...]
    metrics: tuple[str, int] | None = None
    discover_s: float = 10.0


@dataclass(frozen=True, slots=True)
class SealedModel:
    """A model ready to be deployed, and the key that opens what comes back (None in the plain tier)."""

    checkpoint: Checkpoint
    folder: SealedFolder
    key: RootKey | None


@dataclass(frozen=True, slots=True)
class DeployOptions:
    """`hops_min`: spread over at least so many workers. `kv_tokens`: room that all open sessions share."""

    hops_min: int = 1
    kv_tokens: int = KV_TOKENS_DEFAULT
    on_placement: Callable[[Placement, SwarmView], None] = lambda *_: None
    on_upload: UploadProgress = lambda _: None


class Client:
    """Made by `open_client`."""

    def __init__(self, options: ClientOptions, identity: Identity, ports: ClientPorts, driver: Driver) -> None:
        self.options = options
        self.ports = ports
        self.watch = SwarmWatch(ports.gossip, ports.clock, ports.observer)
        self._identity = identity
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
            "through it; start one with 'sotto worker --bootstrap ADDRESS'"
        )

    async def seal(self, model: Checkpoint, dtype: str, key: RootKey | None, progress: Progress) -> SealedModel:
        """Seal `model` into the data folder, or find it there from an earlier run."""
        place = sealed_place(self.options.data_dir / "sealed", model, dtype, key)
        work = partial(seal_into, place, model, dtype, key, progress)
        folder, _ = await trio.to_thread.run_sync(work, abandon_on_cancel=True)  # type: ignore[call-arg]  # old stubs; a seal resumes
        return SealedModel(model, folder, key)

    async def place(self, needs: ModelNeeds, options: PlaceOptions) -> tuple[Placement, SwarmView]:
        """Who would hold what. Raises RouteUnavailable saying what is missing."""
        view = await self.discover(lambda view: _fits(view, needs, options))
        return plan(view, needs, options), view

    async def deploy(self, model: SealedModel, options: DeployOptions) -> DeployedModel:
        """Bring the model to workers, unless they hold it already, and give it back ready for prompts."""
        data, manifest = model.folder.manifest(self._identity)
        tokenizer = Tokenizer.open(model.checkpoint.tokenizer_file)
        hops: tuple[DeployedHop, ...] = ()
        route = await self._held_route(model, options)
        if route is None:
            needs = ModelNeeds.of_manifest(manifest, options.kv_tokens)
            where = PlaceOptions(hops_min=options.hops_min)
            placement, view = await self.place(needs, where)
            options.on_placement(placement, view)
            route = route_of(placement, view, manifest.deployment)
            others = holders_in(view, manifest.deployment)
            hops = await deploy(self.ports, route, data, FolderSource(model.folder), options.on_upload, others)
        sealer = await trio.to_thread.run_sync(model.folder.sealer, model.checkpoint, model.key)
        return DeployedModel(
            ports=self.ports,
            driver=self._driver,
            route=route,
            hops=hops,
            ends=sealer.ends(),
            tokenizer=tokenizer,
            config=model.checkpoint.config,
        )

    async def _held_route(self, model: SealedModel, options: DeployOptions) -> Route | None:
        """A route over workers that say they hold the model; None when there is none."""
        blocks = model.folder.info.num_blocks

        def route(view: SwarmView) -> Route | None:
            try:
                return choose_route(view, model.folder.deployment, blocks)
            except RouteUnavailable:
                return None

        await self.discover()
        found = route(self.watch.view)
        return found if found is not None and len(found.hops) >= options.hops_min else None


@asynccontextmanager
async def open_client(options: ClientOptions) -> AsyncIterator[Client]:
    """A client under this user's identity, joined to the swarm. Raises InputError (bad address, identity in use),
    TransportError (nobody answers)."""
    with only_user_of(options.data_dir / "client", "client"):
        async with _joined(options, load_identity(options.data_dir / "client")) as client:
            yield client


@asynccontextmanager
async def observe(options: ClientOptions) -> AsyncIterator[Client]:
    """A client that only looks: under an identity of the moment, so it never stands in a deploying client's way."""
    async with _joined(options, Identity(os.urandom(32))) as client:
        yield client


@asynccontextmanager
async def _joined(options: ClientOptions, identity: Identity) -> AsyncIterator[Client]:
    if not options.bootstrap:
        raise InputError("a client needs the address of one node of the swarm: give --bootstrap ADDRESS")
    metrics = ClientMetrics()
    mesh_config = MeshConfig(identity.seed, listen=())  # no listener: every stream that is read is opened from here
    with ungrouped():
        async with open_mesh(mesh_config) as mesh, trio.open_nursery() as nursery:
            with serve_metrics(options.metrics, metrics.registry):
                ports = ClientPorts(identity, mesh, mesh, SystemClock(), os.urandom, metrics)
                driver = Driver(ports)
                await nursery.start(driver.run)  # type: ignore[arg-type]  # trio-typing's stubs are older than trio
                client = Client(options, identity, ports, driver)
                metrics.watch(lambda: client.watch.view)
                await client.watch.start()
                await join(mesh, options.bootstrap)
                yield client
            nursery.cancel_scope.cancel()


def _fits(view: SwarmView, needs: ModelNeeds, options: PlaceOptions) -> bool:
    try:
        plan(view, needs, options)
    except RouteUnavailable:
        return False
    return True
