"""Deploying to hand-written workers: upload, resume, and every way in which a worker or a disk can be wrong."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import trio

from client.deploy import DeployProgress, delete, deploy
from client.errors import HopLost, HopRefused, HopViolation
from client.leases import LeaseKeeper, Leasing
from client.routing import Hop, Route
from protocol.errors import InputError
from protocol.ids import DeploymentId, ShardDigest
from protocol.leases import open_lease, sign_lease
from protocol.limits import PIECE_BYTES
from protocol.manifest import BlockEntry, ConfigPair, Manifest, TensorEntry, sign_manifest
from protocol.messages import (
    Message,
    Pong,
    Refusal,
    RefusalReason,
    ShardStored,
    ShardWanted,
    SpanLeased,
    SpanLoaded,
)
from protocol.signed import Identity
from protocol.tensors import TensorHeader
from simnet.runtime import run
from tests.helpers.fake_depot import FakeDepot
from tests.helpers.fake_hop import CLIENT, DEPLOYMENT, SALT, FakeSwarm, fake_swarm

STRANGER = Identity(bytes(32))
SHARDS = [bytes([number]) * (PIECE_BYTES + 1000 * (number + 1)) for number in range(4)]


def block(shard: bytes) -> BlockEntry:
    tensors = (TensorEntry("down", TensorHeader("float32", (4, 4))),)
    digest = ShardDigest(hashlib.sha256(shard).digest())
    return BlockEntry(digest, len(shard), (ConfigPair("family", "llama"),), tensors)


MANIFEST = Manifest(DEPLOYMENT, SALT, "ee", "float32", tuple(block(shard) for shard in SHARDS))


@dataclass
class Shards:
    """The shards of this side, in memory."""

    shards: dict[ShardDigest, bytes] = field(
        default_factory=lambda: {entry.digest: shard for entry, shard in zip(MANIFEST.blocks, SHARDS, strict=True)}
    )
    reads: list[tuple[ShardDigest, int]] = field(default_factory=list)

    async def read(self, digest: ShardDigest, offset: int, max_bytes: int) -> bytes:
        self.reads.append((digest, offset))
        return self.shards[digest][offset : offset + max_bytes]


@dataclass
class Case:
    swarm: FakeSwarm
    depots: list[FakeDepot]
    source: Shards = field(default_factory=Shards)
    progress: list[DeployProgress] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.leasing = Leasing(LeaseKeeper(self.swarm.ports), kv_tokens=64)

    @property
    def route(self) -> Route:
        hops = [
            Hop(depot.endpoint.peer, depot.endpoint.addrs, 2 * index, 2 * index + 2)
            for index, depot in enumerate(self.depots)
        ]
        return Route(DEPLOYMENT, tuple(hops))

    async def deploy(self) -> list[tuple[int, int]]:
        signed = sign_manifest(MANIFEST, self.swarm.ports.identity)
        hops = await deploy(self.swarm.ports, self.route, signed, self.source, self.leasing, self.progress.append)
        return [(hop.start, hop.end) for hop in hops]


def with_depots(body: Callable[[Case], Awaitable[None]]) -> None:
    async def main() -> bool:
        async with fake_swarm(2) as swarm:
            depots = [FakeDepot(hop.endpoint, hop.identity) for hop in swarm.hops]
            for depot in depots:
                depot.serve()
            await body(Case(swarm, depots))
            return True
        return False

    assert run(main, seed=3), "the body was cancelled"


def replacing(kind: type[Message], *answers: Message | None) -> Callable[[Message], Message | None]:
    """The first answers of `kind` are replaced; the last replacement stays."""
    left = list(answers)

    def replace(answer: Message) -> Message | None:
        if not isinstance(answer, kind):
            return answer
        return left.pop(0) if len(left) > 1 else left[0]

    return replace


def test_each_worker_gets_its_shards_and_loads_them() -> None:
    async def body(case: Case) -> None:
        assert await case.deploy() == [(0, 2), (2, 4)]
        for index, depot in enumerate(case.depots):
            assert list(depot.store.values()) == SHARDS[2 * index : 2 * index + 2]
            assert depot.loaded
        for peer, shards in zip([depot.endpoint.peer for depot in case.depots], (SHARDS[:2], SHARDS[2:]), strict=True):
            told = [progress for progress in case.progress if progress.peer == peer]
            assert [progress.stage for progress in told][:2] == ["lease", "upload"]
            assert told[-1] == DeployProgress(peer, "ready", sum(map(len, shards)), sum(map(len, shards)))

    with_depots(body)


def test_what_a_worker_has_is_not_sent_again() -> None:
    async def body(case: Case) -> None:
        await case.deploy()
        case.source.reads.clear()
        await case.deploy()
        assert case.source.reads == []

    with_depots(body)


def test_an_upload_goes_on_where_it_broke_off() -> None:
    async def body(case: Case) -> None:
        first = case.depots[0]
        first.leave_after = 1
        with pytest.raises(HopLost) as caught:
            await case.deploy()
        assert caught.value.peer == first.endpoint.peer
        first.leave_after = None
        case.source.reads.clear()
        await case.deploy()
        assert (MANIFEST.blocks[0].digest, 0) not in case.source.reads
        assert list(first.store.values()) == SHARDS[:2]

    with_depots(body)


def test_a_refusal_names_the_worker_and_its_reason() -> None:
    async def body(case: Case) -> None:
        case.depots[1].replace = replacing(SpanLeased, Refusal(RefusalReason.MEMORY, "1000 bytes are missing"))
        with pytest.raises(HopRefused, match="1000 bytes are missing") as caught:
            await case.deploy()
        assert caught.value.peer == case.depots[1].endpoint.peer
        assert caught.value.reason == RefusalReason.MEMORY
        assert case.depots[1].endpoint.peer[-6:] in str(caught.value)

    with_depots(body)


def test_a_shard_that_was_changed_here_is_our_users_problem() -> None:
    async def body(case: Case) -> None:
        digest = MANIFEST.blocks[2].digest
        case.source.shards[digest] = b"x" + case.source.shards[digest][1:]
        with pytest.raises(InputError, match="block 2 was changed"):
            await case.deploy()

    with_depots(body)


def test_a_worker_that_calls_a_good_shard_bad_is_a_liar() -> None:
    async def body(case: Case) -> None:
        case.depots[0].replace = replacing(ShardStored, Refusal(RefusalReason.BAD_SHARD, "bad"))
        with pytest.raises(HopViolation, match="digest is right") as caught:
            await case.deploy()
        assert caught.value.peer == case.depots[0].endpoint.peer

    with_depots(body)


def test_a_worker_whose_partial_shard_was_bad_gets_it_whole() -> None:
    async def body(case: Case) -> None:
        case.depots[0].partial[MANIFEST.blocks[0].digest] = b"rubbish"
        await case.deploy()
        assert list(case.depots[0].store.values()) == SHARDS[:2]
        assert case.progress[-1].sent_bytes == case.progress[-1].total_bytes

    with_depots(body)


@pytest.mark.parametrize(
    ("kind", "answer", "says"),
    [
        (SpanLeased, Pong(b"12345678"), "Pong came where SpanLeased was due"),
        (ShardWanted, ShardWanted(1 << 40), "beyond its end"),
        (ShardStored, ShardStored(ShardDigest(b"o" * 32)), "another shard"),
        (SpanLoaded, ShardWanted(0), "ShardWanted came where SpanLoaded was due"),
    ],
)
def test_answers_that_make_no_sense_are_violations(kind: type[Message], answer: Message, says: str) -> None:
    async def body(case: Case) -> None:
        case.depots[1].replace = replacing(kind, answer)
        with pytest.raises(HopViolation, match=says) as caught:
            await case.deploy()
        assert caught.value.peer == case.depots[1].endpoint.peer

    with_depots(body)


def forged(**changes: Any) -> Callable[[FakeDepot, SpanLeased], SpanLeased]:
    """The lease as the worker would sign it with `changes`."""

    def forge(depot: FakeDepot, leased: SpanLeased) -> SpanLeased:
        lease = dataclasses.replace(open_lease(leased.lease, depot.identity.peer), **changes)
        return dataclasses.replace(leased, lease=sign_lease(lease, depot.identity))

    return forge


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda _, leased: dataclasses.replace(leased, missing=(ShardDigest(b"o" * 32),)), "not of its span"),
        (
            lambda _, leased: dataclasses.replace(leased, lease=leased.lease[:-1] + bytes([leased.lease[-1] ^ 1])),
            "lease",
        ),
        (lambda depot, leased: dataclasses.replace(leased, lease=sign_lease(depot.lease, CLIENT)), "another peer"),
        (forged(holder=STRANGER.peer), "something else"),
        (forged(start=1), "something else"),
        (forged(deployment=DeploymentId(bytes(16))), "something else"),
        (forged(kv_tokens=63), "other terms"),
    ],
)
def test_leases_that_do_not_hold_are_violations(
    change: Callable[[FakeDepot, SpanLeased], SpanLeased], says: str
) -> None:
    async def body(case: Case) -> None:
        depot = case.depots[0]
        depot.replace = lambda answer: change(depot, answer) if isinstance(answer, SpanLeased) else answer
        with pytest.raises(HopViolation, match=says):
            await case.deploy()
        assert not depot.loaded

    with_depots(body)


@pytest.mark.parametrize("kind", [SpanLeased, ShardWanted, ShardStored, SpanLoaded])
def test_a_silent_worker_is_given_up(kind: type[Message]) -> None:
    async def body(case: Case) -> None:
        case.depots[0].replace = replacing(kind, None)
        with pytest.raises(HopLost, match="no sign of life") as caught:
            await case.deploy()
        assert caught.value.peer == case.depots[0].endpoint.peer

    with_depots(body)


def test_a_crashed_worker_is_lost_and_an_absent_one_cannot_be_reached() -> None:
    async def body(case: Case) -> None:
        peer = case.depots[0].endpoint.peer

        def crash(answer: Message) -> Message:
            case.swarm.network.crash(peer)
            return answer

        case.depots[0].replace = crash
        route = case.route
        signed = sign_manifest(MANIFEST, case.swarm.ports.identity)
        for says in ("was lost", "cannot be reached"):
            with pytest.raises(HopLost, match=says) as caught:
                await deploy(case.swarm.ports, route, signed, case.source, case.leasing)
            assert caught.value.peer == peer

    with_depots(body)


def test_a_cancelled_deployment_ends_at_once_and_can_go_on() -> None:
    async def body(case: Case) -> None:
        for delay_s in [0.001 * 1.6**step for step in range(12)]:
            with trio.move_on_after(delay_s):
                await case.deploy()
        assert await case.deploy() == [(0, 2), (2, 4)]

    with_depots(body)


def test_a_route_of_another_deployment_is_refused_before_anything_is_sent() -> None:
    async def body(case: Case) -> None:
        signed = sign_manifest(MANIFEST, case.swarm.ports.identity)
        with pytest.raises(InputError, match="place the model again"):
            await deploy(case.swarm.ports, Route(DEPLOYMENT, case.route.hops[:1]), signed, case.source, case.leasing)
        assert case.depots[0].prepared is None

    with_depots(body)


def test_a_manifest_that_was_changed_here_is_our_users_problem() -> None:
    async def body(case: Case) -> None:
        signed = bytearray(sign_manifest(MANIFEST, case.swarm.ports.identity))
        signed[len(signed) // 2] ^= 1
        with pytest.raises(InputError, match="seal the model again"):
            await deploy(case.swarm.ports, case.route, bytes(signed), case.source, case.leasing)
        assert case.depots[0].prepared is None

    with_depots(body)


def test_deleting_passes_over_workers_that_are_gone() -> None:
    async def body(case: Case) -> None:
        await case.deploy()
        route = case.route
        case.swarm.network.crash(route.hops[0].peer)
        await delete(case.swarm.ports, route)
        assert case.depots[1].prepared is None

    with_depots(body)
