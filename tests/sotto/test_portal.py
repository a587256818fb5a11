"""The thread that holds a client for plain code: what is called when there is no loop, or none any more."""

from __future__ import annotations

import signal
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio

from protocol.errors import InputError, LocalProtocolError, SottoError
from sotto.api import AsyncModel, AsyncSwarm, Model
from sotto.chat import AsyncChat, Chat
from sotto.portal import Portal

WAIT_S = 10.0


@asynccontextmanager
async def resource() -> AsyncIterator[str]:
    yield "open"


class Idle:
    """A model and a chat that answer nothing, and are never asked."""

    async def aclose(self) -> None: ...


def closed_portal() -> Portal[str]:
    portal = Portal(resource)
    assert portal.open() == "open"
    portal.close()
    return portal


def in_time(work: Callable[[], Any]) -> BaseException | None:
    """What `work` raises. It runs beside the test, so that one which never ends fails."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except (SottoError, trio.RunFinishedError, trio.Cancelled) as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(WAIT_S)
    assert not thread.is_alive(), "it waits for ever"
    return raised[0] if raised else None


@pytest.mark.parametrize(
    "call",
    [
        lambda model, _: model.generate("a"),
        lambda model, _: list(model.stream("a")),
        lambda model, _: model.chat(),
        lambda _, chat: chat.say("a"),
        lambda _, chat: list(chat.stream("a")),
    ],
    ids=["generate", "stream", "chat", "say", "chat stream"],
)
def test_a_model_is_of_no_use_after_its_swarm_and_says_so(call: Callable[[Model, Chat], Any]) -> None:
    portal = cast("Portal[AsyncSwarm]", closed_portal())
    model = Model(portal, AsyncModel(cast("Any", Idle()), lambda: None))
    chat = Chat(portal, AsyncChat(cast("Any", Idle())))
    error = in_time(lambda: call(model, chat))
    assert isinstance(error, InputError)
    assert "the swarm is closed" in str(error)
    assert in_time(chat.close) is None, "the session went with the swarm"
    assert in_time(model.close) is None, "the leases too"


def test_a_stream_ends_when_its_swarm_is_closed_meanwhile() -> None:
    portal = Portal(resource)
    portal.open()

    async def produce(emit: Callable[[str], None]) -> None:
        emit("one")
        await trio.sleep_forever()

    pieces = portal.stream(produce)
    assert next(pieces) == "one"
    portal.close()
    assert isinstance(in_time(lambda: list(pieces)), InputError)


def test_a_stream_that_is_left_early_is_cancelled() -> None:
    portal, ended = Portal(resource), list[str]()
    portal.open()

    async def produce(emit: Callable[[str], None]) -> None:
        try:
            emit("one")
            await trio.sleep_forever()
        finally:
            ended.append("produce")

    def leave() -> None:
        pieces = portal.stream(produce)
        assert next(pieces) == "one"
        pieces.close()

    assert in_time(leave) is None
    assert ended == ["produce"]
    portal.close()


@pytest.mark.parametrize("streams", [False, True], ids=["call", "stream"])
def test_what_uses_a_swarm_that_another_thread_closes_ends_before_the_swarm_does(streams: bool) -> None:
    began, ended, late = threading.Event(), list[str](), list[BaseException | None]()
    beside = threading.Thread(target=lambda: late.append(in_time(lambda: portal.call(trio.sleep, 0))))

    @asynccontextmanager
    async def driver() -> AsyncIterator[trio.Event]:
        stopped = trio.Event()
        yield stopped
        assert portal.closed
        ended.append("driver")
        stopped.set()
        beside.start()
        await trio.sleep(0.1)

    portal = Portal(driver)
    stopped = portal.open()

    async def use(*_: object) -> None:
        began.set()
        try:
            await stopped.wait()
            raise LocalProtocolError("the driver has stopped")
        finally:
            ended.append("use")

    def close() -> None:
        began.wait()
        portal.close()

    closing = threading.Thread(target=close)
    closing.start()
    error = in_time(lambda: list(portal.stream(use)) if streams else portal.call(use))
    closing.join()
    beside.join()
    for each in (error, *late):
        assert isinstance(each, InputError)
        assert "the swarm is closed" in str(each)
    assert ended == ["use", "driver"]


def test_a_loop_that_a_fault_of_ours_ended_says_which() -> None:
    crash, ended = trio.Event(), list[str]()

    async def crashing() -> None:
        await crash.wait()
        raise ValueError("a bug")

    @asynccontextmanager
    async def faulty() -> AsyncIterator[str]:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(crashing)
            try:
                yield "open"
            finally:
                ended.append("faulty")
                with trio.CancelScope(shield=True):
                    await trio.sleep(0.1)

    async def use() -> None:
        crash.set()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.sleep_forever)
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(0.1)
            ended.append("use")

    portal = Portal(faulty)
    portal.open()
    for _ in range(2):
        with pytest.RaisesGroup(pytest.RaisesExc(ValueError, match="a bug")):
            portal.call(use)
    assert ended == ["use", "faulty"]


def test_an_interrupted_call_has_ended_when_the_interrupt_is_raised() -> None:
    """Else a chat would be used by two turns at once: the one that goes on unseen, and the next."""
    before, ended = signal.signal(signal.SIGINT, signal.default_int_handler), list[str]()
    portal = Portal(resource)
    portal.open()

    async def turn() -> None:
        try:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(0)
            ended.append("turn")

    async def another() -> list[str]:
        return [*ended, "another"]

    try:
        with pytest.raises(KeyboardInterrupt):
            portal.call(turn)
        assert portal.call(another) == ["turn", "another"]
    finally:
        signal.signal(signal.SIGINT, before)
        portal.close()


def test_an_interrupt_before_the_loop_runs_undoes_what_was_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes where `open` waits; the loop begins only then."""
    portal, begin = Portal(resource), threading.Event()
    run = portal._run

    def interrupt() -> None:
        begin.set()
        raise KeyboardInterrupt

    def late() -> None:
        begin.wait()
        run()

    monkeypatch.setattr(portal, "_thread", threading.Thread(target=late, daemon=True))
    monkeypatch.setattr(portal, "_opened", SimpleNamespace(get=interrupt, put=lambda _: None))
    with pytest.raises(KeyboardInterrupt):
        portal.open()
    assert not portal._thread.is_alive()
