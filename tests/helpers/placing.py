"""Placements judged from first principles: costs added up from the adverts, and every possibility tried."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations

from client.placement import HOP_SOFTWARE_S, ModelNeeds, Placement
from client.placement.costs import BLOCK_SOFTWARE_S, RELAY_DETOUR, RELAY_S, RELAY_SHARE
from client.placement.distances import RTT_UNKNOWN_MS
from protocol.adverts import peer_tag
from protocol.ids import PeerId
from protocol.swarm import Member, SwarmView
from tests.helpers.adverts import MIB

Chain = Sequence[tuple[Member, int, int]]


def needs(*block_mib: float, kv_mib: float = 0.0) -> ModelNeeds:
    """KV of `kv_mib` for each block, as one token."""
    return ModelNeeds(tuple(int(size * MIB) for size in block_mib), (int(kv_mib * MIB),) * len(block_mib), 1, "float32")


@dataclass(frozen=True)
class Judge:
    """What a placement costs in `swarm`, whose adverts state every round trip, in seconds."""

    swarm: SwarmView
    model: ModelNeeds
    client_rtts_ms: Mapping[PeerId, float] = field(default_factory=dict)
    concurrency: int = 1
    client_s: float = 0.0

    def latency_s(self, chain: Chain) -> float:
        total, before = 0.0, None
        for member, start, end in chain:
            total += self.leg_s(before, member) + HOP_SOFTWARE_S + self.compute_s(member, start, end)
            before = member
        assert before is not None
        return total + self.leg_s(None, before) + self.client_s

    def period_s(self, chain: Chain) -> float:
        busy = [
            self.compute_s(member, start, end) + HOP_SOFTWARE_S / (RELAY_SHARE if member.advert.relayed else 1)
            for member, start, end in chain
        ]
        return max(*busy, self.client_s, self.latency_s(chain) / self.concurrency)

    def compute_s(self, member: Member, start: int, end: int) -> float:
        read = sum(self.model.block_bytes[start:end]) / (member.advert.speeds[0].read_gb_s * 1e9)
        return (read + (end - start) * BLOCK_SOFTWARE_S) / (1 - min(0.95, member.advert.load_percent / 100))

    def leg_s(self, before: Member | None, to: Member) -> float:
        """One way; `before` None is the client, and so is the way back to it."""
        if before is None:
            measured = to.peer in self.client_rtts_ms
            rtt_ms = self.client_rtts_ms.get(to.peer, RTT_UNKNOWN_MS)
        else:
            measured = False
            stated = [rtt.rtt_ms for rtt in before.advert.rtts if rtt.tag == peer_tag(to.peer)]
            stated += [rtt.rtt_ms for rtt in to.advert.rtts if rtt.tag == peer_tag(before.peer)]
            rtt_ms = max(stated, default=RTT_UNKNOWN_MS)
        if not to.advert.relayed:
            return rtt_ms / 2000
        return rtt_ms / 2000 * (1 if measured else RELAY_DETOUR) + RELAY_S

    def fits(self, member: Member, start: int, end: int) -> bool:
        weights = sum(self.model.block_bytes[start:end])
        kv = sum(self.model.kv_bytes_per_token[start:end]) * self.model.kv_tokens * self.concurrency
        advert = member.advert
        return weights <= min(advert.memory_free_bytes, advert.disk_free_bytes) and kv <= advert.kv_free_bytes

    def check(self, placement: Placement) -> None:
        """Covers all blocks exactly, each worker once, within memory and KV, on workers that accept."""
        starts = [0, *(hop.end for hop in placement.hops)]
        assert [hop.start for hop in placement.hops] == starts[:-1]
        assert starts[-1] == len(self.model.block_bytes)
        assert len({hop.peer for hop in placement.hops}) == len(placement.hops)
        for hop in placement.hops:
            member = self.swarm.members[hop.peer]
            assert hop.end > hop.start
            assert member.advert.accepting
            assert self.fits(member, hop.start, hop.end)
            assert hop.weight_bytes == sum(self.model.block_bytes[hop.start : hop.end])

    def chain(self, placement: Placement) -> Chain:
        return [(self.swarm.members[hop.peer], hop.start, hop.end) for hop in placement.hops]

    def best_s(self, objective: str = "latency", hops_min: int = 1) -> float:
        """The least over every order of every subset and every cut; inf when nothing fits."""
        cost = self.latency_s if objective == "latency" else self.period_s
        members = [member for member in self.swarm.ranked() if member.advert.accepting]
        blocks, best = len(self.model.block_bytes), math.inf

        def place(rest: tuple[Member, ...], chain: list[tuple[Member, int, int]]) -> None:
            nonlocal best
            start = chain[-1][2] if chain else 0
            if not rest:
                best = min(best, cost(chain)) if start == blocks else best
                return
            for end in range(start + 1, blocks + 1):
                if self.fits(rest[0], start, end):
                    place(rest[1:], [*chain, (rest[0], start, end)])

        for count in range(hops_min, len(members) + 1):
            for order in permutations(members, count):
                place(order, [])
        return best
