"""A client of the swarm: it finds workers, deploys sealed models on them, and gives up what it leased.

Starts no task: app_client.py does. Sealing runs in a thread; the event loop stays free for the network.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import trio

from client.batches import Batches
from client.deploy import DeployedHop
from client.driver import Driver
from client.leases import KeptLease, LeaseKeeper
from client.metalearning.candidates import RANKING
from client.metalearning.chooser import Chooser
from client.page_keys import plain_secret
from client.placement import ModelNeeds, Placement, PlaceOptions, could_fit, mended, plan, priced
from client.ports import ClientPorts
from client.revoking import revoke_everywhere
from client.routing import Route, choose_route, held_route, spans_meet
from client.rtts import measure_rtts_ms, worth_asking
from client.sealing import Sealer
from client.speculation import Costs
from client.swarm import SwarmWatch
from equivariant.ends import ClientEnds
from equivariant.keys import RootKey, require_key
from models.checkpoint import Checkpoint
from models.tokenizer import Tokenizer
from node.bringing import Bringing, DeployOptions
from node.choosing import Choosing, shipped_ranking
from node.defaults import KV_TOKENS
from node.draft import Draft, Opening
from node.grants import Grants, Token
from node.kept_ends import folded_ends
from node.links import Inflow, note_links, read_links
from node.measuring import time_ends
from node.model import DeployedModel, head_batches_of
from node.moves import Moves
from node.paths import history_file, reports_file
from node.rates import note_rate
from node.recording import Journal, Origin, Recorder, Subject, wanted
from node.sealing import Progress, SealedFolder, seal_into, sealed_place
from node.sharing import COMPARED_MAX, Sharing, Sources
from protocol import limits
from protocol.capabilities import Right
from protocol.errors import InputError, Refused, RouteUnavailable
from protocol.ids import DeploymentId, PeerId
from protocol.reports import pen_of
from protocol.signed import Identity
from protocol.strategy import DEFAULT
from protocol.swarm import Member, SwarmView

SETTLE_S = 1.2 * limits.ADVERT_INTERVAL_MIN_S  # every worker of a small swarm has been heard once by then


@dataclass(frozen=True, slots=True)
class ClientOptions:
    """`data_dir` holds identity, keys and sealed models. `bootstrap` holds addresses and invites; when it is empty the
    local network is searched for a public swarm. `discover_s` is how long to wait for workers. `capability`: what the
    owner of another's deployment gave, for a client that uses that one. `origin`: what the history says that this
    client's requests are. `draft`: see node.draft.Draft. `share_records`: tell other clients how strategies compared
    here, and heed what they tell (node/sharing.py). `chooses`: have strategies chosen by records, which takes one to
    two seconds of a processor to get ready, for the most part to load libraries."""

    data_dir: Path
    bootstrap: tuple[str, ...]
    metrics: tuple[str, int] | None = None
    discover_s: float = 10.0
    capability: Token | None = None
    origin: Origin = "request"
    draft: str | None = None
    share_records: bool = False
    chooses: bool = True

    @property
    def advised(self) -> bool:
        """Whether records have a say in what is chosen here. A bench asks for what it measures."""
        return self.chooses and self.origin == "request"


@dataclass(frozen=True, slots=True)
class SealedModel:
    """A model ready to be deployed, and the key that opens what comes back (None in the plain tier)."""

    checkpoint: Checkpoint
    folder: SealedFolder
    key: RootKey | None


DEPLOY_DEFAULT = DeployOptions()


@dataclass(frozen=True, slots=True)
class _Priced:
    """By what a route's prediction goes, and how another route is found. `dtype`: of the blocks. `passed`: see
    Moves."""

    view: SwarmView
    needs: ModelNeeds
    where: PlaceOptions
    dtype: str
    again: Callable[[Loaded, frozenset[PeerId]], Awaitable[DeployedModel]]
    passed: Counter[PeerId]


@dataclass(frozen=True, slots=True)
class Loaded:
    """What of a model is in the client's own memory, whatever route it goes over. `client_s`: see PlaceOptions.
    `page_secret`: see Sealer."""

    ends: ClientEnds
    tokenizer: Tokenizer
    client_s: float
    tier: str
    page_secret: bytes | None

    @classmethod
    def of(cls, sealer: Sealer, data_dir: Path) -> Loaded:
        """Reads GBs where a model is large: call it in a thread."""
        ends = sealer.ends(folded_ends(data_dir, sealer))
        tokenizer = Tokenizer.open(sealer.checkpoint.tokenizer_file)
        tier = "plain" if sealer.secrets is None else "ee"
        return cls(ends, tokenizer, time_ends(ends), tier, sealer.page_secret())


class Client:
    """Made by `open_client`."""

    def __init__(self, options: ClientOptions, owner: Identity, ports: ClientPorts, driver: Driver) -> None:
        self.options = options
        self.ports = ports
        self.watch = SwarmWatch(ports.gossip, ports.clock, ports.observer)
        self.leases = LeaseKeeper(ports)
        self.grants = Grants(options.data_dir / "client" / "grants")
        self.journal = Journal(history_file(options.data_dir) if wanted() else None)
        ranking = shipped_ranking() if options.advised else RANKING
        self.choosing = Choosing(ports.entropy, ports.clock, Chooser(ranking=ranking))
        self.drafts = Opening()
        self._owner = owner
        self.sharing = self._sharing() if options.share_records else None
        self._driver = driver
        self._started = trio.current_time()
        self._asked: dict[PeerId, None] = {}
        self._rtts_ms: dict[PeerId, float] = {}
        self._deploying: defaultdict[DeploymentId, trio.Lock] = defaultdict(trio.Lock)
        self._parted = set[DeploymentId]()  # until they are deployed anew

    def _sharing(self) -> Sharing:
        records = partial(self.journal.newest, COMPARED_MAX)
        sources = Sources(pen_of(self._owner), records, reports_file(self.options.data_dir))
        sharing = Sharing(self.ports.gossip, self.ports.clock, sources)
        self.choosing.chooser.peers = sharing.hearsay
        return sharing

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

    async def bring(
        self,
        checkpoint: Checkpoint,
        dtype: str | None,
        key: RootKey | None,
        options: DeployOptions = DEPLOY_DEFAULT,
        progress: Progress = lambda *_: None,
    ) -> DeployedModel:
        """The model, ready for prompts: sealed and deployed; or as its owner deployed it, where there is a capability.
        `dtype` None: float32, or the owner's. Raises what `seal`, `deploy` and `attach` raise, and InputError for what
        the owner chose otherwise."""
        token = self.options.capability
        if token is None:
            return await self.deploy(await self.seal(checkpoint, dtype or DEFAULT.weights, key, progress), options)
        if dtype not in (None, token.dtype):
            raise InputError(f"the owner of a deployment chooses its weights, here {token.dtype}: leave the dtype out")
        if options.hops_min > 1:
            raise InputError("the owner of a deployment chooses how many workers hold it: leave workers out")
        return await self.attach(checkpoint, key)

    async def seal(
        self, model: Checkpoint, dtype: str, key: RootKey | None, progress: Progress = lambda *_: None
    ) -> SealedModel:
        """Seal `model` into the data folder, or find it there from an earlier run."""
        place = sealed_place(self.options.data_dir / "sealed", model, dtype, key)
        fresh, started = not place.exists(), self.ports.clock.monotonic()

        def work() -> SealedFolder:
            folder = seal_into(place, model, dtype, key, self._owner.peer, progress)
            if fresh:
                folded_ends(self.options.data_dir, folder.sealer(model, key))
            return folder

        folder = await trio.to_thread.run_sync(work, abandon_on_cancel=True)  # type: ignore[call-arg]  # old stubs; a seal resumes
        if fresh:
            weights = ModelNeeds.of_configs(model.config.blocks, dtype, 1).block_bytes
            self._note_sealed(sum(weights), started)
        return SealedModel(model, folder, key)

    async def place(self, needs: ModelNeeds, options: PlaceOptions) -> tuple[Placement, SwarmView]:
        """Who would hold what. Raises RouteUnavailable saying what is missing."""
        view = await self.discover(lambda view: could_fit(view, needs, self._owning(view, needs, options)))
        return await self.planned(view, needs, options), view

    async def planned(self, view: SwarmView, needs: ModelNeeds, options: PlaceOptions) -> Placement:
        """As `place`, over the workers of `view`."""
        options = replace(self._owning(view, needs, options), client_rtts_ms=await self.rtts_ms(view.ranked()))
        hops = [kept.hop for kept in self._leased(view, needs) if kept.hop.peer not in options.exclude]
        standing = [(hop.peer, hop.start, hop.end) for hop in hops if view.members[hop.peer].advert.accepting]

        def placed() -> Placement:
            return mended(view, needs, standing, options) or plan(view, needs, options)

        return await trio.to_thread.run_sync(placed)

    def _owning(self, view: SwarmView, needs: ModelNeeds, options: PlaceOptions) -> PlaceOptions:
        """`options` with what this client leases of the model, in the view's adverts not free."""
        own = {}
        for kept in self._leased(view, needs):
            span = slice(kept.hop.start, kept.hop.end)
            kv_bytes = kept.request.kv_tokens * sum(needs.kv_bytes_per_token[span])
            own[kept.hop.peer] = sum(needs.block_bytes[span]), kv_bytes
        return replace(options, own=own)

    def _leased(self, view: SwarmView, needs: ModelNeeds) -> list[KeptLease]:
        """Of the spans of the model, those that workers hold for this client, and say so."""
        if needs.deployment is None:
            return []
        said = {(member.peer, span.start, span.end) for member, span in view.holders(needs.deployment)}
        granted = self.leases.granted(needs.deployment)
        return [kept for kept in granted if (kept.hop.peer, kept.hop.start, kept.hop.end) in said]

    async def rtts_ms(self, members: Iterable[Member]) -> dict[PeerId, float]:
        """Round trips from here, measured now for those of `members` that were never asked; for many, for some."""
        asked = worth_asking([member for member in members if member.peer not in self._asked])
        found = await measure_rtts_ms(self.ports, asked)
        self._asked.update(dict.fromkeys(found))
        self._rtts_ms.update({peer: rtt_ms for peer, rtt_ms in found.items() if rtt_ms is not None})
        return dict(self._rtts_ms)

    async def deploy(
        self,
        model: SealedModel,
        options: DeployOptions,
        without: frozenset[PeerId] = frozenset(),
        loaded: Loaded | None = None,
    ) -> DeployedModel:
        """Lease the model on workers that hold it, or bring it to workers, and give it back ready for prompts.

        Workers that decline or are lost meanwhile are left out, as are those of `without`. Raises what the last one
        said when no others are left. However it fails, leases are those of before. Who comes while the same model is
        deployed waits, and finds it there. `loaded`, if the client has the model in its memory already.
        """
        # In a thread: up to 256 files are read and checked, the first time.
        signed, manifest = await trio.to_thread.run_sync(model.folder.manifest, self._owner)
        needs, where = ModelNeeds.of_manifest(manifest, options.kv_room), options.where(without)
        bringing = Bringing(self, model.folder, (signed, manifest), needs, options)
        async with self._deployed_alone(manifest.deployment):
            violations = self.ports.violations.copy()
            route, view, hops = await bringing.run(where)
            source = await trio.to_thread.run_sync(_source_of_ends, model, loaded)
            again = partial(self._again, route, partial(self.deploy, model, options))
            priced_as = _Priced(view, needs, where, manifest.dtype, again, violations)
            ready = await self._ready(route, hops, model.checkpoint, priced_as, source)
            if loaded is None:  # else it is for requests of before
                self._parted.discard(manifest.deployment)
            return ready

    def part(self, deployment: DeploymentId) -> None:
        """Give up what is leased of `deployment`, and what requests under way lease of it when they move. Where it is
        being deployed that is done once nobody does so any more, unless it has been deployed anew by then."""
        self._parted.add(deployment)
        self._give_up_parted(deployment)

    @asynccontextmanager
    async def _deployed_alone(self, deployment: DeploymentId) -> AsyncIterator[None]:
        """Nobody else here deploys it in the block. However that fails, leases are those of before."""
        try:
            async with self._deploying[deployment], self.leases.transaction(deployment):
                yield
        finally:
            self._give_up_parted(deployment)

    def _give_up_parted(self, deployment: DeploymentId) -> None:
        if deployment in self._parted and not self._deploying[deployment].locked():  # who deploys it still comes here
            self.leases.part(deployment, ())

    def _note_sealed(self, nbytes: int, started: float) -> None:
        with suppress(OSError):  # a disk that is full fails what matters, not this
            note_rate(self.options.data_dir, "seal_bytes_s", nbytes, self.ports.clock.monotonic() - started)

    def note_brought(self, inflow: Inflow, started: float) -> None:
        """How fast workers took shards in since `started`, for later predictions."""
        data_dir, took_s = self.options.data_dir, self.ports.clock.monotonic() - started
        with suppress(OSError):
            note_rate(data_dir, "bring_bytes_s", inflow.total_bytes, took_s)
            note_links(data_dir, inflow.mbit_s)

    async def _again(
        self,
        left: Route,
        deployed: Callable[[frozenset[PeerId], Loaded], Awaitable[DeployedModel]],
        loaded: Loaded,
        without: frozenset[PeerId],
    ) -> DeployedModel:
        """The model over a route that is found now, past the workers `without` where there are others: else over those
        of them that did no worse than break the protocol, and only then over any. What was leased for the route that is
        left and the new one has no use for is given up; where there is no new one, it is not."""
        lost = without.difference(self.ports.violations)  # it goes past these others by itself, as far as it can
        try:
            ready = await deployed(lost, loaded)
        except (RouteUnavailable, Refused):
            if not lost:
                raise
            ready = await deployed(frozenset(), loaded)
        self.leases.part(left.deployment, [hop.peer for hop in ready.route.hops])
        return ready

    async def attach(
        self,
        checkpoint: Checkpoint,
        key: RootKey | None,
        without: frozenset[PeerId] = frozenset(),
        loaded: Loaded | None = None,
    ) -> DeployedModel:
        """The deployment that the options' capability is for, as its owner brought it to workers: past those of
        `without`, and past those that broke the protocol here where there are others. Nothing is sealed, sent or
        leased. Raises InputError (wrong key or model, no capability), CheckpointError, RouteUnavailable."""
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
        if loaded is None and await trio.to_thread.run_sync(checkpoint.likeness) != token.model:
            raise InputError(
                f"the deployment is not of {checkpoint.name}, or the capability is of an older sotto: give the model "
                "that its owner deployed, or ask for a new capability"
            )
        config = checkpoint.config
        view = await self.discover(lambda view: spans_meet(view, deployment, config.num_blocks, without))
        rtts_ms = await self.rtts_ms(member for member, _ in view.holders(deployment))
        violations = self.ports.violations.copy()
        route = held_route(view, deployment, config.num_blocks, without.union(violations), rtts_ms)
        route = route or choose_route(view, deployment, config.num_blocks, without, rtts_ms)
        needs = ModelNeeds.of_configs(config.blocks, token.dtype, KV_TOKENS)
        source: Sealer | Loaded | None = loaded
        if source is None:
            source = await trio.to_thread.run_sync(Sealer.open, checkpoint, token.dtype, key, deployment)
        again = partial(self._again, route, partial(self.attach, checkpoint, key))
        priced_as = _Priced(view, needs, PlaceOptions(), token.dtype, again, violations)
        return await self._ready(route, (), checkpoint, priced_as, source)

    async def revoke(self, token: Token) -> tuple[list[PeerId], dict[PeerId, str]]:
        """Have all workers of the swarm that hold the deployment refuse `token` from now on. Gives those that were
        told, and why others could not be. Raises InputError when it is not this user's to revoke."""
        self.grants.revoke(token, self._owner.peer)
        view = await self.discover(lambda _: False)
        return await revoke_everywhere(self.ports, view, token.capability.deployment, token.capability.serial)

    async def _ready(
        self,
        route: Route,
        hops: tuple[DeployedHop, ...],
        checkpoint: Checkpoint,
        priced_as: _Priced,
        source: Sealer | Loaded,
    ) -> DeployedModel:
        if isinstance(source, Loaded):
            loaded = source
        else:
            loaded = await trio.to_thread.run_sync(
                partial(Loaded.of, source, self.options.data_dir), abandon_on_cancel=True
            )  # type: ignore[call-arg]  # old stubs
        where = replace(priced_as.where, client_rtts_ms=self._rtts_ms, client_s=loaded.client_s)
        spans = [(hop.peer, hop.start, hop.end) for hop in route.hops]
        predicted = priced(priced_as.view, priced_as.needs, spans, where)
        subject = Subject(
            name=checkpoint.name,
            tier=loaded.tier,
            config=checkpoint.config,
            dtype=priced_as.dtype,
            needs=priced_as.needs,
            placement=predicted,
            view=priced_as.view,
            client_rtts_ms=dict(self._rtts_ms),
            mbit_s=read_links(self.options.data_dir),
        )
        return DeployedModel(
            ports=self.ports,
            driver=self._driver,
            route=route,
            hops=hops,
            predicted=predicted,
            ends=loaded.ends,
            page_secret=loaded.page_secret or plain_secret(self._owner),
            tokenizer=loaded.tokenizer,
            config=checkpoint.config,
            checkpoint=checkpoint,
            dtype=priced_as.dtype,
            draft=Draft(checkpoint, self.options.draft),
            deploy_again=partial(priced_as.again, loaded),
            recorder=Recorder(
                journal=self.journal,
                subject=subject,
                view=lambda: self.watch.view,
                clock=self.ports.clock,
                entropy=self.ports.entropy,
                origin=self.options.origin,
            ),
            head_batches=head_batches_of(loaded.ends),
            guess_costs=Costs(),
            batches=Batches(),
            choosing=self.choosing,
            moves=Moves(priced_as.passed),
        )


def _source_of_ends(model: SealedModel, loaded: Loaded | None) -> Sealer | Loaded:
    """What the client's own part of the model comes from, or is. Raises InputError for a wrong key or model."""
    if loaded is None:
        return model.folder.sealer(model.checkpoint, model.key)
    model.folder.require(model.checkpoint, model.key)
    return loaded
