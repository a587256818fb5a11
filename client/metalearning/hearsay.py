"""What other clients report of strategies, weighed: whose word counts how much, and what they say together.

Identities are free, so nothing here counts heads. A peer of whom nothing is known is one of a crowd, and the crowd
together weighs what one prediction does before any request (CROWD_WEIGHT), however many they are. Where a peer's
ratios agree with what this user measured, it leaves the crowd and gains weight of its own; where they contradict, it
loses it, and then is not heard at all. Votes are combined by a weighted median, which the lesser half cannot move.

Trust buys weight, never a larger effect: it can be got by repeating what others found. How much any word of peers may
do to a choice is the chooser's bound (chooser.py), which holds whatever is heard here. Invariant: at most PEERS_KEPT
reports are kept, one of each signer. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from client.metalearning.comparing import Compared, Place, heard
from client.metalearning.online import ERROR_DEVIATION
from protocol.ids import PeerId
from protocol.reports import Report

PEERS_KEPT = 256  # each at most a KiB on disk
BELIEVED_MS = 7 * 86_400_000  # workers, links and versions change within weeks
CROWD_WEIGHT = 1.0  # of all peers together of whom nothing is known; 1 is the weight of a prediction
AGREES_WITHIN = 2.0  # standard errors of a difference
DIFFERS_ANYWAY = 0.1  # log ratios of two users in one kind of situation, that honest measurements differ by
CONTRADICTION = 2.0  # agreements that one contradiction undoes
TRUST_SLOWNESS = 2.0  # agreements that make half of the trust


@dataclass(frozen=True, slots=True)
class Word:
    """What peers say together of a strategy: the log of its cost over the default's, and one deviation of it."""

    log_ratio: float
    deviation: float


@dataclass(frozen=True, slots=True)
class _Peer:
    """`trust`: 0 to 1; None as long as nothing that it says can be compared with what was measured here."""

    issued_ms: int
    says: Mapping[Place, Compared]
    trust: float | None


@dataclass(slots=True)
class Hearsay:
    """The reports that are kept."""

    _own: Mapping[Place, Compared] = field(default_factory=dict)
    _peers: dict[PeerId, _Peer] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._peers)

    def judge_by(self, own: Mapping[Place, Compared]) -> None:
        """Trust by what this user's requests showed until now."""
        self._own = own
        for signer, peer in self._peers.items():
            self._peers[signer] = replace(peer, trust=_trust(peer.says, own))

    def hear(self, signer: PeerId, report: Report) -> bool:
        """Keep what `signer` reports, unless something newer of it is kept. When there is no room the peer with least
        trust goes, of several the one that spoke longest ago. True when it is kept."""
        known = self._peers.get(signer)
        if known is not None and known.issued_ms >= report.issued_ms:
            return False
        says = dict(each for comparison in report.comparisons if (each := heard(comparison)) is not None)
        self._peers[signer] = _Peer(report.issued_ms, says, _trust(says, self._own))
        if len(self._peers) > PEERS_KEPT:
            del self._peers[min(self._peers, key=self._worth)]
        return signer in self._peers

    def forget(self, now_ms: int) -> None:
        """Let go what is too old to be believed."""
        for signer in [signer for signer, each in self._peers.items() if each.issued_ms < now_ms - BELIEVED_MS]:
            del self._peers[signer]

    def __contains__(self, signer: object) -> bool:
        return signer in self._peers

    def word(self, where: Place) -> Word | None:
        """What peers say of a strategy in a kind of situation; None when nobody who is heard says anything."""
        said = [(each.says[where], each.trust) for each in self._peers.values() if where in each.says]
        crowd = sum(trust is None for _, trust in said)
        share = min(1.0, CROWD_WEIGHT / crowd) if crowd else 0.0
        votes = [(vote, share if trust is None else trust) for vote, trust in said]
        weighed = [(vote, weight / (1 + (vote.error / ERROR_DEVIATION) ** 2)) for vote, weight in votes if weight > 0]
        return _median(weighed) if weighed else None

    def _worth(self, signer: PeerId) -> tuple[float, int]:
        peer = self._peers[signer]
        return peer.trust or 0.0, peer.issued_ms


def _trust(says: Mapping[Place, Compared], own: Mapping[Place, Compared]) -> float | None:
    shared = [(each, own[where]) for where, each in says.items() if where in own]
    if not shared:
        return None
    agreed = sum(_agree(each, mine) for each, mine in shared)
    contradicted = len(shared) - agreed
    return max(0.0, agreed - CONTRADICTION * contradicted) / (len(shared) + TRUST_SLOWNESS)


def _agree(one: Compared, other: Compared) -> bool:
    return abs(one.log_ratio - other.log_ratio) <= AGREES_WITHIN * math.hypot(one.error, other.error, DIFFERS_ANYWAY)


def _median(votes: Iterable[tuple[Compared, float]]) -> Word:
    """The weighted median. Its deviation is that of one prediction for a weight of 1, and the votes' own spread."""
    ordered = sorted((vote.log_ratio, weight) for vote, weight in votes)
    total, passed = sum(weight for _, weight in ordered), 0.0
    middle = ordered[-1][0]
    for ratio, weight in ordered:
        passed += weight
        if passed >= total / 2:
            middle = ratio
            break
    spread = sum(weight * abs(ratio - middle) for ratio, weight in ordered) / total
    return Word(middle, math.hypot(ERROR_DEVIATION / math.sqrt(total), spread))
