"""How this node can be reached, from what is known: a small state machine. Pure; time comes in as an argument.

    UNKNOWN ---- a peer dialled back ------------------------------------> PUBLIC
       |                                                                     ^
       +---- peers tried to dial back and could not ----> UNREACHABLE -------+ (a forwarded port was opened)
                                                           |      |
                               the router mapped a port    |      |  a relay gave a reservation
                                                           v      v
                                                         MAPPED  RELAYED

Peers' verdicts are hearsay: the majority of the latest ones counts, one per peer, and each is forgotten after
VERDICT_LIFE_S. Peers on the open internet outvote those on this machine or in this house, who can dial it anyway. A lie
of the majority costs a detour through a relay, or one announced address that does not answer; of half of them, that
detour at most; of fewer peers, nothing. A node that was dialled at addresses of which it can announce none, for no
majority names one, is as good as unreachable.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum

from protocol.ids import PeerId

VERDICT_LIFE_S = 900.0
VERDICTS_MAX = 16


class ReachState(Enum):
    UNKNOWN = "unknown"
    PUBLIC = "public"
    MAPPED = "mapped"
    RELAYED = "relayed"
    UNREACHABLE = "unreachable"


@dataclass(frozen=True, slots=True)
class _Verdict:
    addr: str | None  # where dialling back worked
    outside: bool  # by a peer with a global address
    at: float


@dataclass(slots=True)
class Reach:
    """`on_change` is called when the state, or what to announce, has changed. `own`: the addresses that this node
    announces by itself."""

    on_change: Callable[[], None] = lambda: None
    own: Callable[[], tuple[str, ...]] = lambda: ()
    mapped: str | None = None
    circuits: tuple[str, ...] = ()
    _verdicts: dict[PeerId, _Verdict] = field(default_factory=dict)
    _shut: bool = False

    @property
    def state(self) -> ReachState:
        yes, no = self._counts()
        if yes > no and self._announced():
            return ReachState.PUBLIC if self.mapped is None else ReachState.MAPPED
        if not yes and not no and not self._shut:
            return ReachState.UNKNOWN
        return ReachState.RELAYED if self.circuits else ReachState.UNREACHABLE

    @property
    def confirmed(self) -> str | None:
        """The address that more than half of the peers have dialled, if there is one."""
        voters = self._voters()
        votes = Counter(verdict.addr for verdict in voters if verdict.addr is not None)
        return next((addr for addr, count in votes.items() if 2 * count > len(voters)), None)

    @property
    def verdicts(self) -> int:
        return len(self._verdicts)

    def shut(self) -> None:
        """There is no listening socket: nobody can dial."""
        self._shut = True

    def heard(self, peer: PeerId, addr: str | None, outside: bool, now: float) -> None:
        """`peer` tried to dial back: the address at which it succeeded, or None. `outside`: its address is global."""
        with self._watched():
            self._verdicts.pop(peer, None)
            self._verdicts[peer] = _Verdict(addr, outside, now)
            fresh = [item for item in self._verdicts.items() if now - item[1].at < VERDICT_LIFE_S]
            self._verdicts = dict(fresh[-VERDICTS_MAX:])

    def moved(self) -> None:
        """This node listens at other addresses now. Verdicts on those of before are void."""
        self._verdicts.clear()
        self.on_change()

    def map_to(self, addr: str | None) -> None:
        """The router forwards `addr` to this node, or no longer does. Verdicts on the time before are void."""
        with self._watched():
            if addr != self.mapped:
                self.mapped = addr
                self._verdicts.clear()

    def relay_through(self, circuits: tuple[str, ...]) -> None:
        """Relays make this node dialable under `circuits`; () for none."""
        with self._watched():
            self.circuits = circuits

    def addrs(self, direct: tuple[str, ...], count: int) -> tuple[str, ...]:
        """What to announce, `count` at most: what only others can know of (most of them dialled it, the router mapped
        it), then what this node knows by itself, of which it always announces something, then circuits, which all
        get a place while they are needed."""
        circuits = self.circuits if self.state is ReachState.RELAYED else ()
        room = max(0, count - len(circuits))
        found = dict.fromkeys(addr for addr in (self.confirmed, self.mapped) if addr and addr not in direct)
        best = (*tuple(found)[: max(0, room - 1) if direct else room], *dict.fromkeys(direct))
        return (*best[:room], *circuits)[:count]

    def _announced(self) -> bool:
        """Is there an address at which a peer dialled, among those to announce?"""
        worked = {verdict.addr for verdict in self._voters() if verdict.addr is not None}
        return self.confirmed is not None or not worked.isdisjoint((*self.own(), self.mapped))

    @contextmanager
    def _watched(self) -> Iterator[None]:
        before = (self.state, self.confirmed, self.mapped, self.circuits)
        yield
        if before != (self.state, self.confirmed, self.mapped, self.circuits):
            self.on_change()

    def _voters(self) -> list[_Verdict]:
        verdicts = list(self._verdicts.values())
        return [verdict for verdict in verdicts if verdict.outside] or verdicts

    def _counts(self) -> tuple[int, int]:
        voters = self._voters()
        yes = sum(verdict.addr is not None for verdict in voters)
        return yes, len(voters) - yes
