"""The whole client against real workers on the virtual network: gossip, placement, upload, generation.

A tiny Llama is sealed block by block and answered through three workers that hold two blocks each; the reference is the
unsealed model in one process.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import trio
from safetensors.torch import save

from client.asking import ANSWER_S, ask, channel_to
from client.deploy import deploy
from client.driver import Driver
from client.errors import HopLost, HopRefused, HopViolation
from client.generate import Ends, Generation, GenerationHost, GenerationParams, inline, kv_tokens_for
from client.leases import LeaseKeeper, Leasing
from client.placement import ModelNeeds, Placement, PlaceOptions, plan
from client.ports import ClientPorts
from client.routing import Route, choose_route, route_of
from client.sealing import Sealer, block_entry, manifest_of
from client.session import RouteSession, SessionTerms
from client.swarm import SwarmWatch
from client.tensors import to_payload
from client.text import TextStream
from client.upload import Supply
from equivariant.keys import RootKey
from models.checkpoint import Checkpoint
from models.local import LocalModel
from models.sampling import SamplingParams
from models.tokenizer import Tokenizer
from protocol.errors import InputError, RouteUnavailable
from protocol.ids import DeploymentId, PeerId, SessionId, ShardDigest
from protocol.manifest import Manifest, sign_manifest
from protocol.messages import CONTROL, RefusalReason, ReleaseSpan, SpanReleased
from protocol.pieces import PieceList
from protocol.ports import LoadedSpan, SessionSpec, SpanSpec, StepResult, StepWork
from simnet.runtime import SeededEntropy, VirtualClock, run
from simnet.store import MemoryStore
from tests.helpers.outputs import KeptOutputs
from tests.helpers.tiny_models import make_checkpoint
from tests.helpers.workers import DEPLOYMENT, SALT, Swarm, Worker, identity, open_swarm
from worker.engine import Engine

BLOCKS = 6
STEP_S = 0.02


@dataclass
class InlineEngine:
    """The real engine, called on the event loop, with virtual time for each step. `spoil` changes what it answers."""

    store: MemoryStore
    folder: Path
    spoil: Callable[[StepWork, StepResult], StepResult] = lambda _work, result: result
    sessions: dict[SessionId, None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.engine = Engine(self._path)

    def _path(self, digest: ShardDigest) -> Path:
        path = self.folder / digest.hex()
        path.write_bytes(self.store.whole[digest])
        return path

    async def load(self, span: SpanSpec) -> LoadedSpan:
        return self.engine.load(span)

    async def unload(self, deployment: DeploymentId) -> None:
        self.engine.unload(deployment)

    async def open(self, session: SessionId, spec: SessionSpec) -> int:
        held = self.engine.open(session, spec)
        self.sessions[session] = None
        return held

    async def step(self, work: StepWork) -> StepResult:
        result = self.spoil(work, self.engine.step(work))
        await trio.sleep(STEP_S)
        return result

    async def close(self, session: SessionId, page_keys: tuple[bytes, ...] = ()) -> None:
        self.engine.close(session, page_keys)
        self.sessions.pop(session, None)


@dataclass(frozen=True)
class Sealed:
    """A model, ready to be deployed."""

    manifest: Manifest
    shards: dict[ShardDigest, bytes]
    ends: Ends

    async def pieces(self, digest: ShardDigest) -> PieceList | None:
        pieces = PieceList.of_bytes(self.shards[digest])
        return pieces if pieces.digest == digest else None

    async def read(self, digest: ShardDigest, offset: int, nbytes: int) -> bytes:
        return self.shards[digest][offset : offset + nbytes]

    async def discard(self, digest: ShardDigest) -> None:
        del self.shards[digest]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("llama")
    return Checkpoint.open(str(make_checkpoint(folder, "llama", num_hidden_layers=BLOCKS)))


def seal(checkpoint: Checkpoint, tier: str) -> Sealed:
    key = RootKey.from_bytes(bytes(range(32))) if tier == "ee" else None
    sealer = Sealer.open(checkpoint, "float32", key, DEPLOYMENT)
    shards, entries = {}, []
    for index in range(BLOCKS):
        tensors, config = sealer.block(index)
        shard = save(tensors)
        digest = PieceList.of_bytes(shard).digest
        shards[digest] = shard
        entries.append(block_entry(tensors, config, digest, len(shard)))
    return Sealed(manifest_of(identity("client").peer, SALT, tier == "ee", "float32", entries), shards, sealer.ends())


@dataclass
class Client:
    """The client, as a composition root would put it together."""

    swarm: Swarm
    sealed: Sealed
    ports: ClientPorts
    driver: Driver
    watch: SwarmWatch
    leases: LeaseKeeper
    placement: Placement | None = None

    def needs(self, kv_tokens: int = 256) -> ModelNeeds:
        return ModelNeeds.of_manifest(self.sealed.manifest, kv_tokens)

    async def deployed(self) -> Route:
        """From gossip to loaded spans on all workers, two blocks each."""
        view = await self.watch.wait_for(lambda view: len(view.members) == len(self.swarm.workers))
        self.placement = plan(view, self.needs(), PlaceOptions(hops_min=len(self.swarm.workers)))
        route = route_of(self.placement, view, DEPLOYMENT)
        manifest = self.sealed.manifest
        signed = sign_manifest(manifest, self.ports.identity), manifest
        await deploy(self.ports, route, signed, Supply(self.sealed), Leasing(self.leases))
        return route

    def generation(self, session: RouteSession, prompt: list[int], params: GenerationParams) -> Generation:
        return Generation(session, self.sealed.ends, prompt, params, GenerationHost(VirtualClock(), inline))

    async def ids(self, route: Route, prompt: list[int], params: GenerationParams) -> list[int]:
        terms = SessionTerms(kv_tokens_for(len(prompt), params.max_new_tokens, 128))
        async with self.driver.session(route, terms) as session:
            return [token async for token in self.generation(session, prompt, params).tokens()]

    def worker(self, peer: PeerId) -> Worker:
        return next(worker for worker in self.swarm.workers if worker.peer == peer)


@asynccontextmanager
async def client_of(swarm: Swarm, sealed: Sealed) -> AsyncIterator[Client]:
    """Workers in a line; the client knows the first one's address."""
    ends = [*(worker.endpoint for worker in swarm.workers), swarm.client.endpoint]
    for near, far in ((1, 0), (2, 1), (3, 0)):
        await ends[near].connect(f"{ends[far].addrs[0]}/p2p/{ends[far].peer}")
    endpoint = swarm.client.endpoint
    ports = ClientPorts(swarm.client.identity, endpoint, endpoint, VirtualClock(), SeededEntropy(8, "client"))
    watch, driver = SwarmWatch(endpoint, VirtualClock()), Driver(ports)
    await watch.start()
    async with trio.open_nursery() as nursery:
        await nursery.start(driver.run)
        yield Client(swarm, sealed, ports, driver, watch, LeaseKeeper(ports))
        nursery.cancel_scope.cancel()


def with_client(sealed: Sealed, folder: Path, body: Callable[[Client], Awaitable[None]], **memory: int) -> None:
    def engine(store: MemoryStore) -> InlineEngine:
        return InlineEngine(store, folder)

    async def main() -> bool:
        async with open_swarm(3, compute=engine, **memory) as swarm, client_of(swarm, sealed) as client:
            await body(client)
            return True
        return False

    assert run(main, seed=1), "the body was cancelled"


async def assert_idle(client: Client, *but: PeerId) -> None:
    await trio.sleep(3)
    for worker in client.swarm.workers:
        if worker.peer not in but:
            worker.assert_idle()


PROMPT = [0, 17, 250, 33, 90, 12, 301, 8, 44, 121, 6]


@pytest.mark.parametrize("tier", ["plain", "ee"])
def test_three_workers_give_the_answer_of_the_model_itself(checkpoint: Checkpoint, tier: str, tmp_path: Path) -> None:
    reference = LocalModel(checkpoint)

    async def body(client: Client) -> None:
        route = await client.deployed()
        assert [hop.end - hop.start for hop in route.hops] == [2, 2, 2]
        for sampling in (SamplingParams(), SamplingParams(temperature=0.8, top_k=50, top_p=0.9, seed=11)):
            expected = reference.generate(PROMPT, 24, sampling)
            for chunk in (256, 4, 1):
                params = GenerationParams(24, sampling, prefill_chunk=chunk)
                assert await client.ids(route, PROMPT, params) == expected
        await assert_idle(client)

    with_client(seal(checkpoint, tier), tmp_path, body)


async def forgotten(client: Client, route: Route) -> None:
    request = ReleaseSpan(DEPLOYMENT, forget=True, capability=client.ports.credentials(DEPLOYMENT))
    for hop in route.hops:
        async with channel_to(client.ports, hop, CONTROL) as channel:
            await ask(hop.peer, channel, request, SpanReleased, ANSWER_S)


def test_the_route_is_found_again_in_gossip(checkpoint: Checkpoint, tmp_path: Path) -> None:
    async def body(client: Client) -> None:
        placed = await client.deployed()
        view = await client.watch.wait_for(lambda view: len(view.holders(DEPLOYMENT)) == 3)
        assert choose_route(view, DEPLOYMENT, BLOCKS) == placed
        assert await client.ids(choose_route(view, DEPLOYMENT, BLOCKS), PROMPT, GenerationParams(2))
        await forgotten(client, placed)
        await client.watch.wait_for(lambda view: not view.holders(DEPLOYMENT))
        with pytest.raises(HopRefused):
            await client.driver.open_session(placed, SessionTerms(16))

    with_client(seal(checkpoint, "plain"), tmp_path, body)


def test_the_answer_s_text_streams(checkpoint: Checkpoint, tmp_path: Path) -> None:
    tokenizer = Tokenizer.open(checkpoint.tokenizer_file)
    prompt = tokenizer.encode("the quiet brook")
    expected = LocalModel(checkpoint).generate(prompt, 16)

    async def body(client: Client) -> None:
        route = await client.deployed()
        async with client.driver.session(route, SessionTerms(64)) as session:
            stream = TextStream(client.generation(session, prompt, GenerationParams(16)), tokenizer.stream())
            pieces = [piece async for piece in stream.pieces()]
        result = stream.result()
        assert list(result.ids) == expected
        assert "".join(pieces) == result.text == tokenizer.decode(expected)

    with_client(seal(checkpoint, "ee"), tmp_path, body)


def test_sessions_at_the_same_time_do_not_mix(checkpoint: Checkpoint, tmp_path: Path) -> None:
    reference = LocalModel(checkpoint)
    prompts = [PROMPT[:length] for length in (3, 7, 11)]

    async def body(client: Client) -> None:
        route = await client.deployed()
        answers: dict[int, list[int]] = {}

        async def ask(number: int) -> None:
            answers[number] = await client.ids(route, prompts[number], GenerationParams(12, prefill_chunk=2))

        async with trio.open_nursery() as nursery:
            for number in range(3):
                nursery.start_soon(ask, number)
        assert [answers[number] for number in range(3)] == [reference.generate(prompt, 12) for prompt in prompts]
        await assert_idle(client)

    with_client(seal(checkpoint, "ee"), tmp_path, body)


def test_a_prompt_can_be_gone_back_in(checkpoint: Checkpoint, tmp_path: Path) -> None:
    reference = LocalModel(checkpoint)
    other = [*PROMPT[:5], 200, 201]

    async def body(client: Client) -> None:
        route = await client.deployed()
        async with client.driver.session(route, SessionTerms(64)) as session:
            await session.step(to_payload(client.sealed.ends.embed(PROMPT), torch.float32), position=0)
            answer = await session.step(to_payload(client.sealed.ends.embed(other[5:]), torch.float32), position=5)
            hidden = torch.frombuffer(bytearray(answer.data), dtype=torch.float32).reshape(1, -1)
            token = int(client.sealed.ends.logits(hidden)[0].argmax())
        assert [token] == reference.generate(other, 1)

    with_client(seal(checkpoint, "ee"), tmp_path, body)


def test_every_hop_s_outputs_come_back_when_asked_for(checkpoint: Checkpoint, tmp_path: Path) -> None:
    async def body(client: Client) -> None:
        route, kept = await client.deployed(), KeptOutputs()
        async with client.driver.session(route, SessionTerms(64, returns="bfloat16", sink=kept)) as session:
            async for _ in client.generation(session, PROMPT, GenerationParams(4, prefill_chunk=8)).tokens():
                pass
            await trio.sleep(1)
        for hop in (0, 1):
            assert [(o.position, o.payload.header.shape[0]) for o in kept.of_hop(hop)] == [
                (0, 8), (8, 3), (11, 1), (12, 1), (13, 1),
            ]  # fmt: skip
            assert {o.payload.header.dtype for o in kept.of_hop(hop)} == {"bfloat16"}

    with_client(seal(checkpoint, "plain"), tmp_path, body)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_worker_killed_in_mid_generation(checkpoint: Checkpoint, tmp_path: Path, index: int) -> None:
    async def body(client: Client) -> None:
        route = await client.deployed()
        killed = route.hops[index].peer
        async with client.driver.session(route, SessionTerms(64)) as session:
            tokens = client.generation(session, PROMPT, GenerationParams(40)).tokens()
            for _ in range(5):
                await anext(tokens)
            at = trio.current_time()
            client.swarm.network.crash(killed)
            with pytest.raises(RouteUnavailable, match="lost in mid-generation") as caught:
                async for _ in tokens:
                    pass
            assert isinstance(caught.value, HopLost)
            assert caught.value.peer == killed
            assert trio.current_time() - at < 5
        await assert_idle(client, killed)

    with_client(seal(checkpoint, "plain"), tmp_path, body)


@pytest.mark.parametrize("index", [0, 2])
def test_a_hop_whose_numbers_break_down_is_named(checkpoint: Checkpoint, tmp_path: Path, index: int) -> None:
    def nan(_work: StepWork, result: StepResult) -> StepResult:
        broken = torch.full(result.forward.header.shape, float("nan"))
        returned = (
            None
            if result.returned is None
            else to_payload(torch.full(result.returned.header.shape, float("nan")), torch.float32)
        )
        return StepResult(to_payload(broken, torch.float32), returned, 0)

    async def body(client: Client) -> None:
        route = await client.deployed()
        async with client.driver.session(route, SessionTerms(64, returns="float32")) as session:
            client.worker(route.hops[index].peer).compute.spoil = nan
            with pytest.raises(HopViolation, match="NaN") as caught:
                async for _ in client.generation(session, PROMPT, GenerationParams(8)).tokens():
                    pass
            assert caught.value.peer == route.hops[index].peer
        await assert_idle(client)

    with_client(seal(checkpoint, "plain"), tmp_path, body)


def test_cancelled_at_any_time_no_worker_keeps_anything(checkpoint: Checkpoint, tmp_path: Path) -> None:
    async def body(client: Client) -> None:
        route = await client.deployed()
        outcomes = []
        for number in range(24):
            with trio.move_on_after(0.06 * number) as scope:
                await client.ids(route, PROMPT, GenerationParams(4, prefill_chunk=4))
            outcomes.append(scope.cancelled_caught)
            await assert_idle(client)
        assert set(outcomes) == {True, False}

    with_client(seal(checkpoint, "plain"), tmp_path, body)


def test_too_little_memory_in_the_swarm_is_said_before_anything_is_sent(checkpoint: Checkpoint, tmp_path: Path) -> None:
    async def body(client: Client) -> None:
        with pytest.raises(
            RouteUnavailable, match=r"weights, the swarm's 3 workers offer 0\.1 MiB.*are missing.*--memory"
        ):
            await client.deployed()

    with_client(seal(checkpoint, "plain"), tmp_path, body, memory_bytes=(1 << 18) + 40_000)


def test_a_session_that_finds_no_room_for_its_kv_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    async def body(client: Client) -> None:
        route, terms = await client.deployed(), SessionTerms(100)
        async with client.driver.session(route, terms), client.driver.session(route, terms):
            with pytest.raises(HopRefused) as caught:
                await client.driver.open_session(route, terms)
        assert caught.value.reason == RefusalReason.KV_MEMORY
        async with client.driver.session(route, terms):
            pass
        await assert_idle(client)

    with_client(seal(checkpoint, "plain"), tmp_path, body, kv_memory_bytes=1 << 17)


def test_a_tampered_shard_never_gets_loaded(checkpoint: Checkpoint, tmp_path: Path) -> None:
    sealed = seal(checkpoint, "plain")
    digest = sealed.manifest.blocks[3].digest
    shard = bytearray(sealed.shards[digest])
    shard[-1] ^= 1
    sealed.shards[digest] = bytes(shard)

    async def body(client: Client) -> None:
        with pytest.raises(InputError, match="block 3 was changed"):
            await client.deployed()

    with_client(sealed, tmp_path, body)
