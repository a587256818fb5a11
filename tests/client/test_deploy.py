"""Deploying to hand-written workers: upload, resume, and every way in which a worker or a disk can be wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import trio

from client.deploy import DeployProgress, deploy
from client.errors import HopLost, HopRefused, HopViolation
from client.leases import LeaseKeeper, Leasing
from client.routing import Hop, Route
from client.upload import PIECE_ASKED_MAX, SLOWEST_S, Holders, ShardUpload, Supply, holders_in, nobody
from node.grants import OwnCredentials
from protocol.adverts import HeldSpan
from protocol.capabilities import CapabilityGate, Claim, Right
from protocol.errors import InputError, RemoteProtocolError
from protocol.ids import DeploymentId, ShardDigest
from protocol.leases import open_lease, sign_lease
from protocol.limits import PIECE_BYTES
from protocol.manifest import sign_manifest
from protocol.messages import (
    Message,
    PiecesWanted,
    Pong,
    Refusal,
    RefusalReason,
    ShardProgress,
    ShardStored,
    Source,
    SpanLeased,
    SpanLoaded,
)
from protocol.pieces import PieceList
from protocol.signed import Identity
from protocol.swarm import SwarmView
from simnet.runtime import run
from tests.helpers.adverts import advert
from tests.helpers.adverts import peer as peer_of
from tests.helpers.client_shards import MANIFEST, SHARDS, Shards, block
from tests.helpers.fake_depot import FakeDepot
from tests.helpers.fake_hop import CLIENT, DEPLOYMENT, FakeSwarm, fake_swarm

STRANGER = Identity(bytes(32))


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

    async def deploy(self, holders: Holders = nobody) -> list[tuple[int, int]]:
        signed = sign_manifest(MANIFEST, self.swarm.ports.identity), MANIFEST
        supply = Supply(self.source, holders)
        hops = await deploy(self.swarm.ports, self.route, signed, supply, self.leasing, self.progress.append)
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
            assert depot.streams == 1
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


@pytest.mark.parametrize("content", [b"x", b""], ids=["garbled", "not the shard"])
def test_a_shard_that_was_changed_here_is_our_users_problem(content: bytes) -> None:
    async def body(case: Case) -> None:
        digest = MANIFEST.blocks[2].digest
        case.source.shards[digest] = content and content + case.source.shards[digest][1:]
        with pytest.raises(InputError, match=r"block 2 was changed.*run this again"):
            await case.deploy()
        assert case.source.discarded == [digest], "else 'sotto seal' finds a shard of the right size there"

    with_depots(body)


def test_progress_counts_what_is_there_whoever_brought_it() -> None:
    async def body(case: Case) -> None:
        case.depots[0].partial[MANIFEST.blocks[0].digest] = {0: SHARDS[0][:PIECE_BYTES]}
        await case.deploy()
        assert list(case.depots[0].store.values()) == SHARDS[:2]
        told = [each for each in case.progress if each.peer == case.depots[0].endpoint.peer and each.stage == "upload"]
        assert [each.present_bytes for each in told][:2] == [0, PIECE_BYTES]
        assert told[-1].present_bytes == told[-1].total_bytes

    with_depots(body)


def test_a_worker_that_wants_a_piece_for_ever_is_given_up() -> None:
    async def body(case: Case) -> None:
        case.depots[0].greedy = True
        with pytest.raises(HopViolation, match="once too often"):
            await case.deploy()
        assert case.depots[0].pieces == PIECE_ASKED_MAX

    with_depots(body)


def test_a_worker_that_only_says_that_it_goes_on_is_given_up() -> None:
    async def body(case: Case) -> None:
        case.depots[0].dawdling = True
        with trio.fail_after(1000), pytest.raises(HopLost, match="no further piece") as caught:
            await case.deploy()
        assert caught.value.peer == case.depots[0].endpoint.peer

    with_depots(body)


@pytest.mark.parametrize("claimed_kib_s", [5, 12])
@pytest.mark.parametrize("count", [1, 6])
def test_a_worker_that_goes_on_too_slowly_is_given_up(claimed_kib_s: int, count: int) -> None:
    """It says each second that others brought it a little. 1 Mbit/s shared by ten hops is enough."""
    shards = [bytes([number]) * (12 * PIECE_BYTES // count) for number in range(count)]
    lists = {pieces.digest: pieces for pieces in map(PieceList.of_bytes, shards)}

    class Large(Shards):
        async def pieces(self, digest: ShardDigest) -> PieceList | None:
            return lists[digest]

    async def body(case: Case) -> None:
        first = case.depots[0]
        first.dawdling, first.claimed_per_s = True, claimed_kib_s << 10
        source = Large(dict(zip(lists, shards, strict=True)))
        upload = ShardUpload(case.swarm.ports, case.route.hops[0], DEPLOYMENT, Supply(source))
        began = trio.current_time()
        if claimed_kib_s > 8:
            await upload.run(dict(enumerate(map(block, shards))), lambda _: None)
            assert trio.current_time() - began > SLOWEST_S
        else:
            with pytest.raises(HopLost, match="slower than 8 KiB/s"):
                await upload.run(dict(enumerate(map(block, shards))), lambda _: None)
            assert trio.current_time() - began < SLOWEST_S + 2

    with_depots(body)


def test_a_worker_that_finds_a_shard_of_its_own_damaged_gets_it_again() -> None:
    async def body(case: Case) -> None:
        await case.deploy()
        digest = MANIFEST.blocks[1].digest
        case.source.reads.clear()

        def damaged(answer: Message) -> Message:
            if isinstance(answer, SpanLoaded):
                case.depots[0].replace = lambda other: other
                del case.depots[0].store[digest]
                case.depots[0].partial[digest] = {1: SHARDS[1][PIECE_BYTES:]}
                return Refusal(RefusalReason.MISSING_SHARDS, "1 shards are not here")
            return answer

        case.depots[0].replace = damaged
        await case.deploy()
        assert case.source.reads == [(digest, 0)]

    with_depots(body)


def test_a_worker_that_never_finds_its_shards_is_not_asked_for_ever() -> None:
    async def body(case: Case) -> None:
        case.depots[0].replace = replacing(SpanLoaded, Refusal(RefusalReason.MISSING_SHARDS, "gone again"))
        with pytest.raises(HopRefused, match="gone again"):
            await case.deploy()

    with_depots(body)


def test_a_worker_hears_who_else_has_a_shard_and_may_read_it_there() -> None:
    async def body(case: Case) -> None:
        others = [peer_of(number) for number in range(1, 12)]
        first = case.depots[0].endpoint.peer

        async def holders(block: int) -> tuple[Source, ...]:
            peers = [first, *others] if block == 1 else ()
            return tuple(Source(peer, ("/ip4/192.0.2.8/tcp/4001",)) for peer in peers)

        now_ms = int(case.swarm.ports.clock.time() * 1000)
        introduce = OwnCredentials(CLIENT, peer_of(0), lambda: now_ms).introduce
        case.swarm.ports = replace(case.swarm.ports, introduce=introduce)
        await case.deploy(holders)
        without, with_others = case.depots[0].offers
        assert without.sources == ()
        named = [source.peer for source in with_others.sources]
        assert named == case.swarm.ports.identity.ranked(others)[:7] != others[:7], "not itself, and not all"
        claim = Claim(first, Right.FETCH, DEPLOYMENT, CLIENT.peer)
        for offer in (without, with_others):  # the worker may know of others itself
            CapabilityGate().admit(claim, offer.capability, now_ms)
            with pytest.raises(RemoteProtocolError):
                CapabilityGate().admit(replace(claim, right=Right.USE), offer.capability, now_ms)

    with_depots(body)


def test_a_client_that_cannot_sign_for_the_owner_names_nobody() -> None:
    async def body(case: Case) -> None:
        async def holders(_: int) -> tuple[Source, ...]:
            return (Source(peer_of(1), ("/ip4/192.0.2.8/tcp/4001",)),)

        await case.deploy(holders)
        assert {(offer.sources, offer.capability) for offer in case.depots[0].offers} == {((), b"")}

    with_depots(body)


def test_holders_are_those_whose_spans_have_the_block() -> None:
    peers = [peer_of(number) for number in range(1, 4)]
    view = SwarmView()
    for each, (start, end) in zip(peers, ((0, 2), (1, 3), (0, 3)), strict=True):
        addrs = ("/ip4/192.0.2.8/tcp/4001",) if each != peers[2] else ()
        held = replace(advert(spans=(HeldSpan(DEPLOYMENT, start, end, 1),)), addrs=addrs)
        view = view.with_advert(each, held, each, held.issued_ms)

    async def body() -> list[set[str]]:
        holders = holders_in(view, DEPLOYMENT)
        return [{source.peer for source in await holders(block)} for block in range(4)]

    assert run(body, seed=1) == [{peers[0]}, {peers[0], peers[1]}, {peers[1]}, set()]


@pytest.mark.parametrize(
    ("kind", "answer", "says"),
    [
        (SpanLeased, Pong(b"12345678"), "Pong came where SpanLeased was due"),
        (PiecesWanted, PiecesWanted(MANIFEST.blocks[2].digest, 2, 1), "piece 2 of 2"),
        (PiecesWanted, PiecesWanted(MANIFEST.blocks[0].digest, 0, 1), "fits no offered shard"),
        (ShardProgress, ShardProgress(MANIFEST.blocks[2].digest, 1 << 30), "fits no offered shard"),
        (ShardStored, ShardStored(ShardDigest(b"o" * 32)), "fits no offered shard"),
        (ShardStored, Pong(b"12345678"), "fits no offered shard"),
        (SpanLoaded, Pong(b"12345678"), "Pong came where SpanLoaded was due"),
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


@pytest.mark.parametrize("kind", [SpanLeased, ShardProgress, PiecesWanted, ShardStored, SpanLoaded])
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
        signed = sign_manifest(MANIFEST, case.swarm.ports.identity), MANIFEST
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
        signed = sign_manifest(MANIFEST, case.swarm.ports.identity), MANIFEST
        with pytest.raises(InputError, match="place the model again"):
            await deploy(case.swarm.ports, Route(DEPLOYMENT, case.route.hops[:1]), signed, case.source, case.leasing)
        assert case.depots[0].prepared is None

    with_depots(body)
