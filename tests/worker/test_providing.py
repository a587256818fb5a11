"""A worker tells the directory which shards it holds: soon, again and again, and never in a flood."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import trio

from protocol.directory import shard_key
from protocol.errors import Refused, TransportError
from protocol.ids import ShardDigest
from protocol.limits import PROVIDE_AGAIN_S, PROVIDER_LIFE_S, PROVIDES_PER_S
from protocol.messages import RefusalReason
from protocol.ports import Provider
from simnet import runtime
from simnet.runtime import VirtualClock
from worker.providing import PERIOD_S, RETRY_S, Held, Providing

DIGESTS = [ShardDigest(bytes([number]) * 32) for number in range(40)]


@dataclass
class Told:
    """A directory that remembers what it was told, and when."""

    alone: bool = False
    told: list[tuple[float, bytes]] = field(default_factory=list)

    async def provide(self, key: bytes) -> None:
        self.told.append((trio.current_time(), key))
        if self.alone:
            raise TransportError("no peer took the provider record")

    async def providers(self, key: bytes) -> tuple[Provider, ...]:
        return ()


def provided(
    held: list[ShardDigest], seconds: float, alone: bool = False, given: list[ShardDigest] = DIGESTS
) -> list[tuple[float, bytes]]:
    """What the directory was told; `held` is empty at first, and of it only what is `given` would be given."""

    async def gives(digest: ShardDigest) -> bool:
        return digest in given

    async def main() -> list[tuple[float, bytes]]:
        directory, now = Told(alone), list[ShardDigest]()
        with trio.move_on_after(seconds):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(Providing(directory, VirtualClock(), Held(lambda: now, gives)).run)
                await trio.sleep(1)
                now += held
        start = trio.current_time() - seconds
        return [(at - start, key) for at, key in directory.told]

    return runtime.run(main, seed=1)


def test_new_shards_are_told_soon_and_under_keys_that_do_not_name_them() -> None:
    told = provided(DIGESTS[:2], 20)
    assert [key for _, key in told] == [shard_key(digest) for digest in DIGESTS[:2]]
    assert told[0][0] <= 1 + PERIOD_S


def test_what_would_be_refused_is_not_told() -> None:
    told = provided(DIGESTS[:3], 20, given=DIGESTS[1:2])
    assert [key for _, key in told] == [shard_key(DIGESTS[1])]


def test_a_shard_of_which_the_disk_does_not_say_whether_it_is_here_waits_for_its_turn() -> None:
    """The others are told all the same."""

    async def gives(digest: ShardDigest) -> bool:
        if digest == DIGESTS[0] and trio.current_time() < RETRY_S:
            raise Refused(RefusalReason.DISK, "the disk failed")
        return True

    async def main() -> list[tuple[float, bytes]]:
        directory = Told()
        with trio.move_on_after(3 * RETRY_S):
            await Providing(directory, VirtualClock(), Held(lambda: DIGESTS[:2], gives)).run()
        return directory.told

    told = runtime.run(main, seed=1)
    assert [key for _, key in told] == [shard_key(DIGESTS[1]), shard_key(DIGESTS[0])]
    assert told[0][0] < PERIOD_S
    assert told[1][0] >= RETRY_S


def test_all_are_told_again_before_their_records_expire() -> None:
    times = [at for at, _ in provided(DIGESTS[:1], PROVIDER_LIFE_S)]
    assert len(times) == 3
    assert all(PROVIDE_AGAIN_S <= later - sooner <= PROVIDE_AGAIN_S + PERIOD_S for sooner, later in pairwise(times))


def test_many_are_told_one_after_another() -> None:
    times = [at for at, _ in provided(DIGESTS, 60)]
    assert len(times) == len(DIGESTS)
    assert all(later - sooner >= 1 / PROVIDES_PER_S for sooner, later in pairwise(times))


def test_a_lone_worker_tries_again() -> None:
    times = [at for at, _ in provided(DIGESTS[:1], 200, alone=True)]
    assert len(times) >= 200 // (RETRY_S + PERIOD_S) - 1
