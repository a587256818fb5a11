"""A deployed model's small decisions: what computes where, and what leaves the client in which precision."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager, nullcontext
from itertools import count
from types import MethodType, SimpleNamespace
from typing import cast

import pytest
import torch
import trio

from client.chat import ChatPrompt, Transcript
from client.errors import HopLost
from client.generate import GenerationHost
from client.kept import KeptTerms, Opened, OpenedSession, Opening
from client.session import SessionTerms
from client.speculation import Agreement, Costs
from models.chat_template import ChatTemplate
from models.checkpoint import Checkpoint
from models.sampling import SamplingParams
from node.chat import ENDING_S, Chat, ChatOptions, Reply, Turn
from node.draft import Draft, Guessing
from node.model import ENCODED_INLINE_MAX, Ask, DeployedModel, _Way, head_batches_of, wire_of
from node.moves import Moves
from node.recording import Journal
from protocol.errors import InputError, Refused, RouteUnavailable, SottoError
from protocol.ids import PeerId
from protocol.strategy import Strategy, parse
from simnet.runtime import VirtualClock, run
from sotto.chat import AsyncChat
from tests.helpers.notes import Notes
from tests.helpers.records import RECORD

PEER = PeerId("12D3KooW" + "x" * 44)


@pytest.mark.parametrize(
    ("dtype", "wire", "sent"),
    [
        ("float32", "float32", "float32"),
        ("bfloat16", "float32", "bfloat16"),
        ("int8", "float32", "float32"),
        ("bfloat16", "int8", "int8"),
        ("float32", "bfloat16", "bfloat16"),
    ],
)
def test_activations_leave_in_what_the_first_hop_computes_in(dtype: str, wire: str, sent: str) -> None:
    assert wire_of(parse(f"wire={wire}"), dtype) == sent


@pytest.mark.parametrize(("itemsize", "threads"), [(2, 0), (4, 1)])
def test_a_lone_request_computes_a_head_of_a_few_ms_on_the_loop(
    itemsize: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[object] = []

    async def in_thread(function):  # type: ignore[no-untyped-def]
        used.append(function)
        return function()

    async def main() -> None:
        head = SimpleNamespace(weight_bytes=itemsize * 2560 * 48_000)
        ends = SimpleNamespace(head=head, logits=lambda x: x, embed=lambda ids: torch.zeros(len(ids), 4))
        embedded = await head_batches_of(ends).join(torch.ones(1, 4), lambda _: (1,))  # type: ignore[arg-type]
        assert embedded is not None

    monkeypatch.setattr("node.model.in_thread", in_thread)
    trio.run(main)
    assert len(used) == threads


@pytest.mark.parametrize(
    ("named", "parts"),
    [
        ("micro_batches=0", (3, 4)),
        ("micro_batches=2", (2, 1)),
        ("batching=off", (1, 1)),
        ("deterministic=true", (1, 1)),
    ],
)
def test_sessions_are_parted_as_suits_the_route_unless_they_share_no_forward(
    named: str, parts: tuple[int, int]
) -> None:
    """Otherwise they would count among those that are divided, whose parts then took more than their share."""
    asked = model(predicted=predicted(3, 4)).terms(9, parse(named))
    assert (asked.micro_batches, asked.micro_batch_min) == parts


class Asked(Exception):
    """A request was made for this host."""


def asked(_kept: object, _ask: object, host: GenerationHost) -> None:
    raise Asked(host)


class SlowToGuess(Guessing):
    """Its draft model takes three seconds to load."""

    async def of(self, strategy: Strategy, sampling: SamplingParams) -> None:
        await trio.sleep(3)


def predicted(micro_batches: int, micro_batch_min: int = 1) -> SimpleNamespace:
    return SimpleNamespace(micro_batches=micro_batches, micro_batch_min=micro_batch_min)


def ports_of(observer: object = None, entropy: object = bytes) -> SimpleNamespace:
    clock = SimpleNamespace(monotonic=trio.current_time)
    return SimpleNamespace(clock=clock, observer=observer, entropy=entropy, violations=Counter[PeerId]())


def model(**attributes: object) -> DeployedModel:
    """Enough of one for a request to be made."""
    known = dict[str, object](
        ports=ports_of(),
        broken=False,
        config=SimpleNamespace(max_position=99, eos_ids=(), vocab_size=9),
        decide=lambda *_: SimpleNamespace(plan=SimpleNamespace(strategy=Strategy()), choice=None),
        dtype="float32",
        head_batches=None,
        ends=None,
        guessing=lambda: guessing,
        recorder=None,
        predicted=predicted(1),
        moves=Moves[DeployedModel](Counter()),
        tokenizer=SimpleNamespace(vocabulary=dict, stream=lambda: None),
    )
    fake = SimpleNamespace(**known | attributes)
    guessing = SlowToGuess(Draft(cast("Checkpoint", None)), 9, fake.ports.clock, Costs(), lambda: 1)
    for name in ("_answer", "params", "host", "terms", "page_keys", "_require_known", "_encoded"):
        setattr(fake, name, MethodType(getattr(DeployedModel, name), fake))
    return cast("DeployedModel", fake)


@pytest.mark.parametrize(("characters", "off"), [(ENCODED_INLINE_MAX, False), (ENCODED_INLINE_MAX + 1, True)])
def test_a_long_prompt_becomes_tokens_off_the_event_loop(
    characters: int, off: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_threads = list[bool]()

    def encode(text: str) -> list[int]:
        in_threads.append(not trio.lowlevel.in_trio_run())
        return [1] * len(text)

    async def main() -> None:
        journal = Journal(None)
        fake = model(
            recorder=SimpleNamespace(journal=journal),
            tokenizer=SimpleNamespace(vocabulary=dict, stream=lambda: None, encode=encode),
            config=SimpleNamespace(max_position=2 * characters, eos_ids=(), vocab_size=9),
        )
        with pytest.raises(Asked):
            async with DeployedModel.ask(fake, "x" * characters):
                pass
        assert not journal.running

    monkeypatch.setattr("node.model.KeptRequest", asked)
    run(main, seed=0)
    assert in_threads == [off]


@pytest.mark.parametrize("token", [-1, 9])
def test_a_token_that_the_model_has_no_embedding_for_is_refused(token: int) -> None:
    with pytest.raises(InputError, match=f"token {token}, and the model knows 0 to 8"):
        DeployedModel.decide(model(), [1, token], Ask())


def streamed(_request: object, _detokenizer: object, _stops: object, stop_ids: object) -> None:
    raise Asked(stop_ids)


def test_what_ends_an_answer_is_kept_out_of_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what ends it by the tokenizer's word alone, and whether its file calls that special or not."""
    fake = model(
        config=SimpleNamespace(max_position=99, eos_ids=(5,), vocab_size=9),
        tokenizer=SimpleNamespace(vocabulary=lambda: {"<|im_end|>": 7}, stream=lambda: None),
    )

    async def main() -> None:
        with pytest.raises(Asked) as made:
            async with fake._answer([1], Ask()):
                pass
        assert made.value.args[0] == {5}
        template = cast("ChatTemplate", SimpleNamespace(tokens={"eos_token": "<|im_end|>"}, stops=()))
        with pytest.raises(Asked) as made:
            await Chat(fake, template, ChatOptions())._request(ChatPrompt((1,), 9, 0), Ask(), Strategy(), 0.0)
        assert made.value.args[0] == {5, 7}

    monkeypatch.setattr("node.model.TextStream", streamed)
    monkeypatch.setattr("node.chat.TextStream", streamed)
    run(main, seed=0)


def test_loading_a_draft_model_is_part_of_what_a_user_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        started = trio.current_time()
        with pytest.raises(Asked) as made:
            async with model()._answer([1], Ask()):
                pass
        assert made.value.args[0].started_at == started

        started = trio.current_time()
        chat = Chat(model(), cast("ChatTemplate", SimpleNamespace(tokens={})), ChatOptions())
        with pytest.raises(Asked) as made:
            async with chat._reply("", ChatPrompt((1,), 9, 0), Ask()):
                pass
        assert made.value.args[0].started_at == started

    monkeypatch.setattr("node.model.KeptRequest", asked)
    monkeypatch.setattr("node.chat.KeptRequest", asked)
    run(main, seed=0)


def test_a_chat_whose_turn_has_not_ended_takes_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two at once would share a session, which serves one request at a time."""

    @asynccontextmanager
    async def reply(*_: object) -> AsyncIterator[None]:
        yield

    async def main() -> None:
        fake = model(recorder=SimpleNamespace(journal=Journal(None)))
        chat = Chat(fake, cast("ChatTemplate", SimpleNamespace(tokens={})), ChatOptions())
        chat.transcript = cast("Transcript", SimpleNamespace(prompt=lambda *_: ChatPrompt((1,), 9, 0)))
        begun = list[str]()
        async with chat.say("one"):
            with pytest.raises(InputError, match="the turn before has not ended"):
                async with chat.say("two"):
                    begun.append("two")
        with pytest.raises(HopLost):
            async with chat.say("three"):
                raise HopLost(PEER, "cannot be reached")
        async with chat.say("four"):
            begun.append("four")
        assert begun == ["four"], "a turn that failed has ended too"

    monkeypatch.setattr(Chat, "_reply", reply)
    run(main, seed=0)


def test_who_is_interrupted_does_not_wait_for_a_draft_model() -> None:
    left, waited = threading.Event(), list[bool]()
    draft = SimpleNamespace(ready=None, agreement=Agreement(), open=lambda: waited.append(left.wait(10)))

    async def main() -> None:
        with trio.move_on_after(1):
            guessing = Guessing(cast("Draft", draft), 9, VirtualClock(), Costs(), lambda: 1)
            await guessing.of(parse("speculation=draft"), SamplingParams())

    run(main, seed=0)
    assert waited == []
    left.set()


@pytest.mark.filterwarnings("ignore:Async generator:ResourceWarning")
def test_a_chat_whose_answer_was_dropped_takes_the_next_turn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop closes what was dropped in a later turn of its own."""

    async def pieces() -> AsyncGenerator[str, None]:
        yield "a"
        yield "b"

    @asynccontextmanager
    async def reply(*_: object) -> AsyncIterator[Reply]:
        async with aclosing(pieces()) as answer:
            yield Reply(answer, lambda: cast("Turn", None))

    async def main() -> None:
        fake = model(recorder=SimpleNamespace(journal=Journal(None)))
        inner = Chat(fake, cast("ChatTemplate", SimpleNamespace(tokens={})), ChatOptions())
        inner.transcript = cast("Transcript", SimpleNamespace(prompt=lambda *_: ChatPrompt((1,), 9, 0)))
        chat, began = AsyncChat(inner), trio.current_time()
        async for _ in chat.stream("one"):
            break
        assert [piece async for piece in chat.stream("two")] == ["a", "b"]
        assert trio.current_time() - began < ENDING_S

    monkeypatch.setattr(Chat, "_reply", reply)
    run(main, seed=0)


@pytest.mark.parametrize(("running", "beside"), [(0, 1), (1, 1), (5, 5)])
def test_guesses_are_weighed_by_all_requests_under_way(running: int, beside: int) -> None:
    recorder = SimpleNamespace(journal=SimpleNamespace(running=running))
    draft = SimpleNamespace(agreement=Agreement())
    guessing = DeployedModel.guessing(model(recorder=recorder, draft=draft, guess_costs=Costs()))
    assert guessing.beside() == beside


def kept(_opener: object, terms: KeptTerms, _violations: object) -> None:
    raise Asked(terms.notice)


def test_who_asks_is_told_why_a_request_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    heard = list[str]()

    async def main() -> None:
        with pytest.raises(Asked) as made:
            async with model()._answer([1], Ask(notice=heard.append)):
                pass
        made.value.args[0]("a worker is busy")

    monkeypatch.setattr("node.model.KeptSession", kept)
    run(main, seed=0)
    assert heard == ["a worker is busy"]


@pytest.mark.parametrize(("waits", "failed"), [(False, "HopLost"), (True, "cancelled")], ids=["lost", "given up"])
def test_a_request_is_under_way_while_its_session_is_opened(waits: bool, failed: str) -> None:
    """Most requests that fail do so there."""
    notes = Notes()

    async def opened(*_: object) -> Opened:
        if waits:
            await trio.sleep_forever()
        raise HopLost(PEER, "cannot be reached")

    async def main() -> None:
        ports = ports_of(observer=notes)
        recorder = SimpleNamespace(request=lambda _: nullcontext(SimpleNamespace()))
        fake = model(opened=opened, ports=ports, recorder=recorder, seat=lambda _: nullcontext())
        with trio.move_on_after(9), nullcontext() if waits else pytest.raises(HopLost):
            async with fake._answer([1, 2], Ask()) as answer:
                async for _ in answer.pieces:
                    raise AssertionError("there is no session")

    run(main, seed=0)
    assert notes.notes == [("started", 2), ("failed", (failed, 0))]


def test_a_session_over_a_route_that_was_found_anew_serves_the_next_turn() -> None:
    session = SimpleNamespace(held_tokens=0, bytes_out=0, bytes_in=0, closed=False)

    async def aclose() -> None:
        session.closed = True

    async def lost(_opening: Opening, _terms: SessionTerms, _used: Strategy) -> Opened:
        raise RouteUnavailable("a worker is gone")

    async def opened(_opening: Opening, terms: SessionTerms, _used: Strategy) -> Opened:
        assert terms.micro_batches == 3, "as suits the route"
        return Opened(cast("OpenedSession", session))

    async def moved(_without: object) -> DeployedModel:
        return model(predicted=predicted(3), opened=opened)

    async def main() -> None:
        session.aclose = aclose
        template = cast("ChatTemplate", SimpleNamespace(tokens={}, stops=()))
        before = model(predicted=predicted(2), opened=lost, moved=moved)
        chat = Chat(before, template, ChatOptions())
        for _ in range(2):
            await chat._request(ChatPrompt((1,), 9, 0), Ask(), Strategy(), 0.0)
            await chat._kept.ready([1])
            assert not session.closed

    run(main, seed=0)


@pytest.mark.parametrize("error", [Refused("memory", "no room for the span"), InputError("the sealed model is gone")])
def test_a_request_that_cannot_move_was_lost_and_not_declined(error: SottoError) -> None:
    """A job gives declined lines up one by one, and ends where there are no workers."""

    async def moved(without: frozenset[PeerId]) -> DeployedModel:
        assert without == {PEER}
        raise error

    async def main() -> None:
        way = _Way(model(moved=moved), 9, Strategy(), None, recover=True)
        with pytest.raises(RouteUnavailable, match="no others could take their place") as caught:
            await way.opened(Opening([1], anew=True, without=frozenset({PEER})))
        assert str(error) in str(caught.value), "it says what to do"

    run(main, seed=0)


def test_a_chat_that_cannot_move_was_lost_and_not_declined() -> None:
    """It looks for others again, and does not go back to the route that it lost."""

    async def moved(_without: frozenset[PeerId]) -> DeployedModel:
        raise Refused("memory", "no room for the span")

    async def main() -> None:
        chat = Chat(model(moved=moved), cast("ChatTemplate", None), ChatOptions())
        with pytest.raises(RouteUnavailable, match="no others could take their place"):
            await chat._open(Opening([1], anew=True))

    run(main, seed=0)


def test_a_request_keeps_its_id_over_the_route_that_it_moves_to_and_is_parted_as_suits_that() -> None:
    seen = list[SessionTerms]()

    async def opened(_opening: Opening, terms: SessionTerms, _used: Strategy) -> Opened:
        seen.append(terms)
        return Opened(cast("OpenedSession", None))

    async def moved(_without: frozenset[PeerId]) -> DeployedModel:
        return model(predicted=predicted(3), opened=opened)

    async def main() -> None:
        names = count()
        ports = ports_of(entropy=lambda length: bytes([next(names)] * length))
        way = _Way(model(predicted=predicted(2), opened=opened, moved=moved, ports=ports), 9, Strategy(), None, True)
        for anew in (False, True, False):
            await way.opened(Opening([1], anew))

    run(main, seed=0)
    assert [terms.micro_batches for terms in seen] == [2, 3, 3]
    assert len({terms.request for terms in seen}) == 1


@pytest.mark.parametrize("times", [False, True])
def test_the_workers_of_a_session_tell_their_times_where_its_opening_says_so(times: bool) -> None:
    seen = list[SessionTerms]()

    async def open_session(_: object, terms: SessionTerms) -> None:
        seen.append(terms)

    async def main() -> None:
        fake = model(driver=SimpleNamespace(open_session=open_session), route=None)
        await DeployedModel.opened(fake, Opening([1], times=times), SessionTerms(9), parse("prefix_cache=false"))

    run(main, seed=0)
    assert [terms.times for terms in seen] == [times]


@pytest.mark.parametrize("recover", [True, False])
def test_a_request_begins_past_a_worker_that_broke_the_protocol_towards_another(recover: bool) -> None:
    """Where others serve; where there are none, only the first that comes looks for them."""
    over = list[str]()

    async def opened_by(name: str) -> Opened:
        over.append(name)
        return Opened(cast("OpenedSession", None))

    async def main() -> None:
        ports, searches = ports_of(), list[frozenset[PeerId]]()
        ports.violations[PEER] += 1

        async def deploy_again(without: frozenset[PeerId]) -> DeployedModel:
            searches.append(without)
            return left

        route = SimpleNamespace(hops=(SimpleNamespace(peer=PEER),))
        left = model(ports=ports, route=route, deploy_again=deploy_again, opened=lambda *_: opened_by("the same"))
        left.succeeded_by = lambda found: found  # type: ignore[method-assign,misc]
        for _ in range(2):
            left.broken = DeployedModel.broken.fget(left)  # type: ignore[attr-defined,misc]
            left.moved = MethodType(DeployedModel.moved, left)  # type: ignore[method-assign,misc]
            way = _Way(left, 9, Strategy(), None, recover)
            await way.opened(Opening([1], without=frozenset(ports.violations)))
        assert searches == ([{PEER}] if recover else [])

    run(main, seed=0)
    assert over == ["the same"] * 2


def test_parts_that_were_named_for_several_hops_are_none_of_one_that_is_left() -> None:
    asked = Ask(strategy=parse("micro_batches=2"))
    with pytest.raises(InputError, match="this route has one hop"):
        DeployedModel.decide(alone(), [1], asked)
    assert DeployedModel.decide(alone(has_moved=True), [1], asked).plan.strategy.micro_batches == 0


def alone(has_moved: bool = False) -> DeployedModel:
    """A model on one hop, as far as decisions need it."""
    return model(
        route=SimpleNamespace(hops=(None,)),
        recorder=SimpleNamespace(task=lambda *_: RECORD.task),
        draft=SimpleNamespace(found=False, ready=None, guess_us=None, agreement=Agreement()),
        default_strategy=Strategy(),
        has_moved=has_moved,
    )
