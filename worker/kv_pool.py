"""KV memory as reservations: of leases, for the sessions of their holders, and of sessions, taken whole when they open,
so that no admitted step can run out.

Invariant: all reservations together never exceed the capacity. A session draws on its holder's lease first and on the
free pool for the rest; when the lease ends before the session does, what the session drew stays its own. Room that is
made for a session (worker/preemption.py) is claimed: no other session and no lease gets it meanwhile. The pool counts
bytes and knows no tensors: what a session really takes grows inside the engine, below its reservation.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import takewhile

from protocol.errors import LocalProtocolError, Refused
from protocol.ids import DeploymentId, PeerId, SessionId
from protocol.messages import RefusalReason

LeaseKey = tuple[DeploymentId, PeerId]  # a holder has one lease of a deployment


@dataclass(slots=True)
class _Share:
    """What a lease set aside, and how much of it sessions have drawn."""

    reserved_bytes: int
    drawn_bytes: int = 0


@dataclass(slots=True)
class _Drawn:
    """A session's bytes: from the lease `key` names, and from the free pool."""

    key: LeaseKey
    leased_bytes: int
    pool_bytes: int


@dataclass(slots=True)
class KvPool:
    """`capacity_bytes` of KV memory, shared by all leases and sessions."""

    capacity_bytes: int
    _shares: dict[LeaseKey, _Share] = field(default_factory=dict)
    _sessions: dict[SessionId, _Drawn] = field(default_factory=dict)
    _claims: dict[SessionId, int] = field(default_factory=dict)
    _claimed_bytes: int = 0
    used_bytes: int = 0

    @property
    def free_bytes(self) -> int:
        return self.capacity_bytes - self.used_bytes

    def set_aside_bytes(self, key: LeaseKey) -> int:
        """What the lease `key` has set aside, whether or not sessions have drawn it."""
        share = self._shares.get(key)
        return share.reserved_bytes if share else 0

    def missing(self, key: LeaseKey, reserved_bytes: int) -> int:
        """Bytes that are missing for the lease `key` to set `reserved_bytes` aside; 0 when there is room."""
        share = self._shares.get(key)
        grows = reserved_bytes - (share.reserved_bytes if share else 0)
        return max(0, grows - max(0, self.free_bytes - self._claimed_bytes))

    def require(self, key: LeaseKey, reserved_bytes: int) -> None:
        """Raises Refused(KV_MEMORY) unless the lease `key` could set `reserved_bytes` aside."""
        missing = self.missing(key, reserved_bytes)
        if missing:
            detail = f"the lease asks for {reserved_bytes} bytes of KV: {missing} bytes are missing"
            raise Refused(RefusalReason.KV_MEMORY, detail)

    def set_aside(self, key: LeaseKey, reserved_bytes: int) -> None:
        """Let the lease `key` have `reserved_bytes`, or what its sessions have drawn already if that is more. Raises
        Refused(KV_MEMORY), and then nothing changed."""
        self.require(key, reserved_bytes)
        share = self._shares.setdefault(key, _Share(0))
        after = max(reserved_bytes, share.drawn_bytes)
        self.used_bytes += after - share.reserved_bytes
        share.reserved_bytes = after

    def give_up(self, key: LeaseKey) -> None:
        """The lease `key` is over. Idempotent."""
        share = self._shares.pop(key, None)
        if share is None:
            return
        self.used_bytes -= share.reserved_bytes - share.drawn_bytes
        for drawn in self._sessions.values():
            if drawn.key == key:
                drawn.pool_bytes, drawn.leased_bytes = drawn.pool_bytes + drawn.leased_bytes, 0

    def from_pool(self, needed_bytes: int, key: LeaseKey) -> int:
        """What a session of `needed_bytes` would draw from the free pool, when its client's lease gives what it has."""
        share = self._shares.get(key)
        return max(0, needed_bytes - (share.reserved_bytes - share.drawn_bytes if share else 0))

    def pool_bytes(self, session: SessionId) -> int:
        """What an open session drew from the free pool."""
        return self._sessions[session].pool_bytes

    def claim(self, session: SessionId, pool_bytes: int) -> None:
        """Keep room for a session that will open soon: from what is free, or becomes free."""
        self.disclaim(session)
        self._claims[session] = pool_bytes
        self._claimed_bytes += pool_bytes

    def claims(self, session: SessionId) -> bool:
        """Whether room is kept for it."""
        return session in self._claims

    def disclaim(self, session: SessionId) -> None:
        """Idempotent."""
        self._claimed_bytes -= self._claims.pop(session, 0)

    def unclaimed_bytes(self, session: SessionId) -> int:
        """What is free for `session`, but for claims made before its own: less than nothing while they are not met."""
        if session not in self._claims:
            return self.free_bytes - self._claimed_bytes
        ahead = takewhile(lambda each: each != session, self._claims)
        return self.free_bytes - sum(self._claims[each] for each in ahead)

    def fits(self, session: SessionId, needed_bytes: int, key: LeaseKey) -> bool:
        """Would `reserve` find room now?"""
        needed = self.from_pool(needed_bytes, key)
        return not needed or needed <= self.unclaimed_bytes(session)

    def could_fit(self, needed_bytes: int, key: LeaseKey) -> bool:
        """Would there be room for a session of `needed_bytes` if no other session were open?"""
        share = self._shares.get(key)
        own = share.reserved_bytes if share else 0
        return needed_bytes <= own + self.free_bytes + sum(drawn.pool_bytes for drawn in self._sessions.values())

    @property
    def held_bytes(self) -> Counter[PeerId]:
        """What the open sessions of each client hold."""
        held: Counter[PeerId] = Counter()
        for drawn in self._sessions.values():
            held[drawn.key[1]] += drawn.leased_bytes + drawn.pool_bytes
        return held

    def reserve(self, session: SessionId, needed_bytes: int, key: LeaseKey) -> None:
        """Take `needed_bytes` for `session`, whose client's lease would be `key`. Raises Refused(KV_MEMORY), and then
        nothing changed."""
        if session in self._sessions:
            raise LocalProtocolError("a session reserves KV once")
        from_pool = self.from_pool(needed_bytes, key)
        if not self.fits(session, needed_bytes, key):
            missing = from_pool - self.unclaimed_bytes(session)
            raise Refused(
                RefusalReason.KV_MEMORY, f"the session needs {needed_bytes} bytes of KV: {missing} bytes are missing"
            )
        share, leased = self._shares.get(key), needed_bytes - from_pool
        if share is not None:
            share.drawn_bytes += leased
        self._sessions[session] = _Drawn(key, leased, from_pool)
        self.disclaim(session)
        self.used_bytes += from_pool

    def release(self, session: SessionId) -> None:
        """Give the session's bytes back, to its lease or to all. Idempotent."""
        drawn = self._sessions.pop(session, None)
        if drawn is None:
            return
        self.used_bytes -= drawn.pool_bytes
        if drawn.leased_bytes:
            self._shares[drawn.key].drawn_bytes -= drawn.leased_bytes
