"""The session tables: exhaustive in what they refuse, and in agreement with each other in every reachable interleaving.

The model check lets a client and one hop do everything that their tables allow, over the channels that exist: the
attached stream, and the route by which the hops before bring OpenSession, Step and CloseSession (a new one after each
re-route; the old ones may still deliver). Bytes are never lost or reordered within a channel; between
channels any order is possible.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from protocol.errors import LocalProtocolError, RemoteProtocolError
from protocol.messages import (
    MESSAGES,
    Attach,
    Attached,
    CloseSession,
    Message,
    OpenSession,
    SessionFailed,
    SessionOpened,
    Step,
    StepOutput,
)
from protocol.session import TABLES, Role, SessionMachine, State

ROUTES_MAX = 3  # the first and two re-routes
ROUTE_QUEUE_MAX, STREAM_QUEUE_MAX = 2, 3
Kinds = tuple[str, ...]
BY_NAME: dict[str, type[Message]] = {kind.__name__: kind for kind in MESSAGES}
END = "end of stream"


class World(NamedTuple):
    client: State
    worker: State
    to_worker: Kinds = ()  # on the attached stream
    routes: tuple[Kinds, ...] = ()  # what hops before still hold, oldest route first
    to_client: Kinds = ()
    ended: bool = False  # the client closed the attached stream


class Fault(NamedTuple):
    role: Role
    state: State
    message: str


class Entry(NamedTuple):
    role: Role
    direction: str
    state: State
    message: str


@pytest.mark.parametrize(("role", "direction"), list(TABLES), ids=lambda value: getattr(value, "value", value))
def test_every_message_in_every_state_follows_the_table_or_is_refused(role: Role, direction: str) -> None:
    table = TABLES[role, direction]
    assert set(table) == set(State)
    for state in State:
        for kind in MESSAGES:
            machine = SessionMachine(role)
            machine.state = state
            act = machine.sent if direction == "send" else machine.received
            after = table[state].get(kind)
            if after is not None:
                act(kind)
                assert machine.state is after
                continue
            with pytest.raises(LocalProtocolError if direction == "send" else RemoteProtocolError, match=kind.__name__):
                act(kind)
            assert machine.state is state


def test_a_session_from_attach_to_close() -> None:
    client, worker = SessionMachine(Role.CLIENT), SessionMachine(Role.WORKER)
    script = [(client, worker, Attach), (worker, client, Attached), (client, worker, OpenSession)]
    script += [(worker, client, SessionOpened), (client, worker, Step), (worker, client, StepOutput)]
    script += [(client, worker, OpenSession), (worker, client, SessionOpened), (client, worker, CloseSession)]
    for sender, receiver, kind in script:
        sender.sent(kind)
        receiver.received(kind)
    assert (client.state, worker.state) == (State.CLOSED, State.CLOSED)


def test_no_side_may_send_what_the_other_refuses() -> None:
    _, faults, _ = explore()
    assert not faults, sorted(map(str, faults))


def test_every_entry_of_the_tables_is_used_by_some_interleaving() -> None:
    """An entry that nothing reaches would only hide a peer's violation."""
    _, _, used = explore()
    entries = {
        Entry(role, direction, state, kind.__name__)
        for (role, direction), table in TABLES.items()
        for state, row in table.items()
        for kind in row
    }
    assert entries - used == set()


def test_a_session_can_always_end_on_both_sides() -> None:
    worlds, _, _ = explore()
    done = {world for world in worlds if world.client is State.CLOSED and world.worker in (State.CLOSED, State.IDLE)}
    before: dict[World, set[World]] = {}
    for world in worlds:
        for after, _ in successors(world):
            before.setdefault(after, set()).add(world)
    reached, queue = set(done), deque(done)
    while queue:
        for world in before.get(queue.popleft(), ()):
            if world not in reached:
                reached.add(world)
                queue.append(world)
    # A client that never attached has nothing to end.
    assert {world for world in worlds - reached if world.client is not State.IDLE} == set()


@pytest.mark.parametrize(
    ("role", "direction", "state", "kind"),
    [
        (Role.CLIENT, "receive", State.OPENING, StepOutput),
        (Role.CLIENT, "receive", State.CLOSED, SessionFailed),
        (Role.WORKER, "receive", State.OPENING, Step),
        (Role.WORKER, "receive", State.FAILED, OpenSession),
        (Role.WORKER, "receive", State.CLOSED, Step),
    ],
)
def test_the_check_notices_a_hole(role: Role, direction: str, state: State, kind: type[Message]) -> None:
    holed = {key: dict(row) for key, row in TABLES[role, direction].items()}
    del holed[state][kind]
    _, faults, _ = explore(tables={**TABLES, (role, direction): holed})
    assert Fault(role, state, kind.__name__) in faults


def explore(tables=TABLES) -> tuple[set[World], set[Fault], set[Entry]]:
    start = World(State.IDLE, State.IDLE)
    seen, queue = {start}, deque([start])
    faults: set[Fault] = set()
    used: set[Entry] = set()
    while queue:
        for after, event in successors(queue.popleft(), tables):
            if isinstance(event, Fault):
                faults.add(event)
                continue
            if event is not None:
                used.add(event)
            if after not in seen:
                seen.add(after)
                queue.append(after)
    return seen, faults, used


def successors(world: World, tables=TABLES) -> Iterator[tuple[World, Entry | Fault | None]]:
    yield from _client_sends(world, tables)
    yield from _worker_sends(world, tables)
    yield from _deliveries(world, tables)
    if world.client is State.CLOSED and not world.ended:
        yield world._replace(ended=True, to_worker=(*world.to_worker, END)), None


def _client_sends(world: World, tables) -> Iterator[tuple[World, Entry | Fault | None]]:
    for kind, after in tables[Role.CLIENT, "send"][world.client].items():
        name = kind.__name__
        moved = world._replace(client=after)
        entry = Entry(Role.CLIENT, "send", world.client, name)
        if kind is OpenSession:
            if len(world.routes) < ROUTES_MAX:
                yield moved._replace(routes=(*world.routes, (name,))), entry
        elif world.routes and kind is not Attach:
            if len(world.routes[-1]) < ROUTE_QUEUE_MAX:
                yield moved._replace(routes=(*world.routes[:-1], (*world.routes[-1], name))), entry
        else:
            yield moved._replace(to_worker=(*world.to_worker, name)), entry


def _worker_sends(world: World, tables) -> Iterator[tuple[World, Entry | Fault | None]]:
    if len(world.to_client) >= STREAM_QUEUE_MAX:
        return
    for kind, after in tables[Role.WORKER, "send"][world.worker].items():
        moved = world._replace(worker=after, to_client=(*world.to_client, kind.__name__))
        yield moved, Entry(Role.WORKER, "send", world.worker, kind.__name__)


def _deliveries(world: World, tables) -> Iterator[tuple[World, Entry | Fault | None]]:
    if world.to_client:
        rest = world._replace(to_client=world.to_client[1:])
        yield _receive(rest, Role.CLIENT, world.to_client[0], tables)
    if world.to_worker:
        rest = world._replace(to_worker=world.to_worker[1:])
        yield _receive(rest, Role.WORKER, world.to_worker[0], tables)
    for index, route in enumerate(world.routes):
        if route:
            routes = (*world.routes[:index], route[1:], *world.routes[index + 1 :])
            yield _receive(world._replace(routes=routes), Role.WORKER, route[0], tables)


def _receive(world: World, role: Role, name: str, tables) -> tuple[World, Entry | Fault | None]:
    state = world.client if role is Role.CLIENT else world.worker
    kind = CloseSession if name == END else BY_NAME[name]
    after = tables[role, "receive"][state].get(kind)
    if after is None:
        return world, Fault(role, state, name)
    moved = world._replace(client=after) if role is Role.CLIENT else world._replace(worker=after)
    return moved, Entry(role, "receive", state, kind.__name__)
