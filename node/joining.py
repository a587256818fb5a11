"""Getting into the swarm and staying there, from whatever leads there are: addresses that were given (by hand or in an
invite), and peers that were found on the local network.

Invariant: at least one given peer is connected, or is being tried; peers that were found fill up to NEIGHBOURS_ENOUGH
connections beside it. Leads are dialled side by side; each backs off by itself, with jitter, so that a swarm whose node
comes back is not stormed.
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import trio

from node.p2p.addresses import parse_bootstrap
from node.p2p.dht import NEIGHBOURS_ENOUGH
from node.p2p.racing import side_by_side
from protocol.errors import TransportError
from protocol.ids import PeerId
from protocol.ports import Transport

log = logging.getLogger("sotto.node")

RETRY_FIRST_S, RETRY_MAX_S = 0.5, 30.0
CHECK_S = 5.0  # how soon a lost neighbour is noticed
FOUND_MAX = 32  # peers of the local network that are remembered; anybody there can invent some
FOUND_DIAL_S = 1.0  # for all addresses of one: a network this near answers in milliseconds, an invented peer never
BESIDE_DIAL_S = 2.0  # for all that have not answered, when one has and a client waits to begin
ADDRS_PER_PEER_MAX = 8
Jitter = Callable[[], float]
"""Uniform in [0, 1)."""


@dataclass(slots=True)
class Lead:
    """A peer to join through. `addrs` end in /p2p/<peer id>; it is tried again from `due` on (trio's clock)."""

    peer: PeerId
    addrs: tuple[str, ...]
    given: bool = False
    delay_s: float = RETRY_FIRST_S
    due: float = 0.0

    def answered(self, now: float) -> None:
        """Should the connection be lost at once, the next dial still waits."""
        self.delay_s, self.due = RETRY_FIRST_S, now + CHECK_S

    def was_silent(self, now: float, jitter: float) -> float:
        """Back off: twice as long each time, less up to a half of it. Gives the seconds until it is due again."""
        pause_s = self.delay_s * (1 - jitter / 2)
        self.due, self.delay_s = now + pause_s, min(2 * self.delay_s, RETRY_MAX_S)
        return pause_s


class Leads:
    """The leads of one node. Pure but for `changed`; the caller brings the time."""

    def __init__(self, given: Iterable[str] = ()) -> None:
        """`given`: multiaddrs that end in /p2p/<peer id>. Raises InputError."""
        self.changed = trio.Event()
        self._given: dict[PeerId, Lead] = {}
        self._found: OrderedDict[PeerId, Lead] = OrderedDict()
        for addr in given:
            peer, _ = parse_bootstrap(addr)
            lead = self._given.setdefault(peer, Lead(peer, (), given=True))
            lead.addrs = (*lead.addrs, addr.strip())[:ADDRS_PER_PEER_MAX]

    def __bool__(self) -> bool:
        return bool(self._given or self._found)

    def sighted(self, peer: PeerId, addrs: tuple[str, ...]) -> None:
        """`peer` was seen on the local network at `addrs`; () when it left."""
        known = self._found.get(peer)
        if not addrs:
            self._found.pop(peer, None)
        elif known is None or known.addrs != addrs:
            self._found[peer] = Lead(peer, addrs[:ADDRS_PER_PEER_MAX])
            while len(self._found) > FOUND_MAX:
                self._found.popitem(last=False)
            self.changed.set()
            self.changed = trio.Event()

    def wanted(self, own: PeerId, connected: Iterable[PeerId]) -> list[Lead]:
        """The leads whose connection is missing, given ones first, the latest found before older ones."""
        neighbours = frozenset(connected)
        given = [] if neighbours & self._given.keys() else [lead for peer, lead in self._given.items() if peer != own]
        if self.enough(neighbours):
            return given
        known = neighbours | self._given.keys() | {own}
        return given + [lead for peer, lead in reversed(self._found.items()) if peer not in known]

    def enough(self, connected: Iterable[PeerId]) -> bool:
        """Is there no need of more peers that were found?"""
        return len((self._given.keys() | self._found.keys()) & frozenset(connected)) >= NEIGHBOURS_ENOUGH


async def join(transport: Transport, leads: Leads) -> None:
    """Connect to every lead once. Raises InputError (malformed), TransportError (none answers)."""
    failures: list[TransportError] = []
    answered = False

    async def attempt(lead: Lead) -> None:
        nonlocal answered
        if not lead.given and leads.enough(transport.connected()):
            return
        try:
            await _dial(transport, lead)
        except TransportError as error:
            failures.append(error)
            return
        answered = True
        scope.deadline = min(scope.deadline, trio.current_time() + BESIDE_DIAL_S)

    with trio.CancelScope() as scope:
        wanted = leads.wanted(transport.peer, transport.connected())
        await side_by_side([partial(attempt, lead) for lead in wanted])
    if failures and not answered:
        raise TransportError(f"no bootstrap address answers ({failures[0]})")


async def join_found(transport: Transport, leads: Leads) -> None:
    """Wait until a peer that is found answers. Waits as long as it takes: callers own timeouts."""
    while not transport.connected():
        changed = leads.changed
        with suppress(TransportError):
            await join(transport, leads)
        if not transport.connected():
            await changed.wait()


async def stay_joined(transport: Transport, leads: Leads, jitter: Jitter) -> None:
    """Connect to whichever leads are wanted, and again when they are lost. Runs until cancelled.

    A worker may be started before the node it joins through, so silence is no error here; a malformed address is.
    """
    while True:
        changed = leads.changed
        wanted = leads.wanted(transport.peer, transport.connected())
        due = [lead for lead in wanted if lead.due <= trio.current_time()]
        await side_by_side([partial(_try, transport, leads, lead, jitter) for lead in due])
        missing = leads.wanted(transport.peer, transport.connected())
        with trio.move_on_at(min([trio.current_time() + CHECK_S, *(lead.due for lead in missing)])):
            await changed.wait()


async def _try(transport: Transport, leads: Leads, lead: Lead, jitter: Jitter) -> None:
    if not lead.given and leads.enough(transport.connected()):
        return
    try:
        await _dial(transport, lead)
    except TransportError as error:
        pause_s = lead.was_silent(trio.current_time(), jitter())
        log.info("lead silent", extra={"peer": lead.peer, "retry_s": round(pause_s, 3), "reason": str(error)})
    else:
        lead.answered(trio.current_time())
        log.info("joined", extra={"peer": lead.peer})


async def _dial(transport: Transport, lead: Lead) -> None:
    """Raises InputError (malformed), TransportError (none answers)."""
    with trio.move_on_after(math.inf if lead.given else FOUND_DIAL_S):
        await transport.connect(*lead.addrs)
        return
    raise TransportError(f"{lead.peer} does not answer")
