"""Staying reachable: the tasks that feed `reach.Reach` and act on it.

Connected peers are asked to dial back; when they cannot, the router is asked for a port; when that does not help,
connected peers are asked to be relays, and two reservations are kept alive, at relays on the internet where there are
any. The order is the order of what a hop then costs; of peers it is one that no stranger can foresee. Everything is
retried at its own pace for as long as the node runs, since routers and peers come and go.

A node that others can dial serves in turn: it dials back for others, and relays for them if its owner lets it.
"""

from __future__ import annotations

import ipaddress
import logging
from dataclasses import dataclass

import trio
from libp2p.peer.id import ID

from node.p2p import upnp
from node.p2p.addresses import tcp_endpoint
from node.p2p.autonat import AutoNat
from node.p2p.circuit import Reservation
from node.p2p.mesh import Mesh
from node.p2p.relay import Relay
from protocol.errors import TransportError
from protocol.ids import PeerId
from protocol.scopes import scope_of

log = logging.getLogger("sotto.node")

ROUND_S = 1.0  # how soon a new neighbour is asked
ASKED_MAX = 5  # peers per probe
PROBE_FIRST_S, PROBE_S = 5.0, 300.0  # who dialled back is asked again after the second; others ever later, up to it
RELAYS_WANTED = 2
RELAY_AGAIN_S = 60.0  # before a peer that is no relay, or has no room, is asked again
UNMAP_S = 2.0


@dataclass(frozen=True, slots=True)
class ReachOptions:
    """`relay`: pass on other nodes' encrypted connections while this one can be dialled. `upnp`: ask the router."""

    relay: bool = True
    upnp: bool = True


class Reaching:
    """`run` keeps the mesh reachable; one task per way of being reached."""

    def __init__(self, mesh: Mesh, options: ReachOptions) -> None:
        self.mesh = mesh
        self.options = options
        self.autonat = AutoNat(mesh)
        self.mapping: upnp.Mapping | None = None
        self._moved = trio.Event()
        self._asked: dict[PeerId, float] = {}  # when to ask again
        self._pauses_s: dict[PeerId, float] = {}  # of those who say no, or nothing: clients never do
        self._no_relay: dict[PeerId, float] = {}  # when to ask again
        self._reserved: dict[PeerId, tuple[Reservation, float]] = {}  # (reservation, when to renew)

    async def run(self) -> None:
        """Serve others, and be reachable, until cancelled; then the router gets its port back."""
        self.autonat.serve()
        self.mesh.circuits.serve()
        if self.options.relay:
            Relay(self.mesh, self.mesh.host).serve()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._probe)
                nursery.start_soon(self._keep_relays)
                if self.options.upnp:
                    nursery.start_soon(self._map_ports)
        finally:
            await self._unmap()

    async def _probe(self) -> None:
        """Have neighbours dial back, for ever."""
        listening = self.mesh.listening
        if not listening:
            self.mesh.reach.shut()
            return
        while True:
            before, listening = listening, self.mesh.listening
            if listening != before:
                log.info("listening elsewhere", extra={"addrs": listening})
                self._begin_anew()
            await self.probe_once()
            await trio.sleep(ROUND_S)

    def _begin_anew(self) -> None:
        """The machine got its first address, or another: what was heard, and mapped, is about the one of before."""
        self._asked.clear()
        self._pauses_s.clear()  # the first question may go over a connection that is as good as dead
        self._moved.set()
        self._moved = trio.Event()
        self.mesh.reach.moved()

    async def probe_once(self) -> None:
        now = trio.current_time()
        connected = self.mesh.ranked()
        self._asked = {peer: again for peer, again in self._asked.items() if again > now}
        self._pauses_s = {peer: pause_s for peer, pause_s in self._pauses_s.items() if peer in connected}
        due = [peer for peer in connected if peer not in self._asked][:ASKED_MAX]
        if self.mesh.reach.verdicts >= ASKED_MAX and len(due) < min(ASKED_MAX, len(connected)):
            return  # enough was heard; the next round of questions comes when all are due
        async with trio.open_nursery() as nursery:
            for peer in due:
                nursery.start_soon(self._ask, peer)

    async def _ask(self, peer: PeerId) -> None:
        pause_s = self._pauses_s.get(peer, PROBE_FIRST_S)
        self._asked[peer] = trio.current_time() + pause_s
        self._pauses_s[peer] = min(2 * pause_s, PROBE_S)
        try:
            addr = await self.autonat.ask(peer, self.mesh.addrs)
        except TransportError as error:
            log.debug("no verdict on reachability", extra={"peer": peer, "reason": str(error)})
            return
        now = trio.current_time()
        if addr is not None:  # "no" may be the first moment's: a port that opens later, a machine that was busy
            self._asked[peer] = now + PROBE_S
            self._pauses_s.pop(peer, None)
        before = self.mesh.reach.state
        self.mesh.reach.heard(peer, addr, self._is_outside(peer), now)
        if self.mesh.reach.state is not before:
            log.info("reachability", extra={"state": self.mesh.reach.state.value, "addrs": self.mesh.addrs})

    async def _map_ports(self) -> None:
        """Have the router forward the port while it is needed, for ever."""
        while True:
            if (self.mesh.hidden or self.mapping is not None) and self.mesh.listening:
                moved = self._moved
                _, port = tcp_endpoint(self.mesh.host.get_transport_addrs()[0])
                self.mapping = await upnp.map_port(port)
                if self.mapping is not None:
                    log.info("the router forwards a port", extra={"addr": self.mapping.addr, "port": port})
                if (addr := self.mapping.addr if self.mapping else None) != self.mesh.reach.mapped:
                    self.mesh.reach.map_to(addr)
                    self._asked.clear()
                with trio.move_on_after(upnp.RENEW_S):
                    await moved.wait()  # it forwards to the address of before
            await trio.sleep(ROUND_S)

    async def _unmap(self) -> None:
        with trio.move_on_after(UNMAP_S) as scope:
            scope.shield = True
            if self.mapping is not None:
                await upnp.unmap_port(self.mapping)

    async def _keep_relays(self) -> None:
        """Hold reservations at neighbours while nobody can dial this node, for ever."""
        while True:
            await self.reserve_once()
            await trio.sleep(ROUND_S)

    async def reserve_once(self) -> None:
        now, connected = trio.current_time(), self.mesh.ranked()
        kept = {peer: held for peer, held in self._reserved.items() if peer in connected and self.mesh.hidden}
        self._reserved = kept
        self._no_relay = {peer: again for peer, again in self._no_relay.items() if again > now}
        for peer, (_, renew_at) in list(kept.items()):
            if renew_at <= now:
                await self._reserve(peer)
        for peer in connected if self.mesh.hidden else ():
            if sum(_is_global(held) for held, _ in self._reserved.values()) >= RELAYS_WANTED:
                break
            if peer in self._reserved or peer in self._no_relay:
                continue
            if len(self._reserved) < RELAYS_WANTED or self._is_outside(peer):
                await self._reserve(peer)
        self._keep_best()
        circuits = tuple(held.circuits[0] for held, _ in self._reserved.values())
        if circuits != self.mesh.reach.circuits:
            self.mesh.reach.relay_through(circuits)
            log.info("relays", extra={"state": self.mesh.reach.state.value, "circuits": circuits})

    def _keep_best(self) -> None:
        """Relays on the internet come first; those that only neighbours in the same house find do while there are no
        others."""
        best = sorted(self._reserved, key=lambda peer: not _is_global(self._reserved[peer][0]))
        for peer in best[RELAYS_WANTED:]:
            self._no_relay[peer] = trio.current_time() + RELAY_AGAIN_S
        self._reserved = {peer: self._reserved[peer] for peer in best[:RELAYS_WANTED]}

    def _is_outside(self, peer: PeerId) -> bool:
        """Its connection comes from the internet."""
        ip = self.mesh.host.observed_ip(ID.from_base58(peer))
        return ip is not None and ipaddress.ip_address(ip).is_global

    async def _reserve(self, peer: PeerId) -> None:
        try:
            reservation = await self.mesh.circuits.reserve(peer, self.mesh.known_addrs(peer))
            self._reserved[peer] = (reservation, trio.current_time() + reservation.renew_s)
        except TransportError as error:
            log.debug("no relay", extra={"peer": peer, "reason": str(error)})
            self._reserved.pop(peer, None)
            self._no_relay[peer] = trio.current_time() + RELAY_AGAIN_S


def _is_global(reservation: Reservation) -> bool:
    return scope_of(reservation.circuits[0]) == "global"
