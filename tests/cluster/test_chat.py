"""Chats over real workers: turns that cost what is new, a worker killed between and within them, the command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

from models.chat_template import ChatMessage, ChatTemplate
from models.checkpoint import Checkpoint
from models.local import LocalModel
from models.sampling import SamplingParams
from models.tokenizer import Tokenizer
from node.chat import Chat, ChatOptions, Turn, open_chat
from node.client import Client
from node.model import Ask
from protocol.errors import InputError
from protocol.limits import PAGE_TOKENS
from protocol.strategy import Strategy
from simnet import cluster
from simnet.cluster import Cluster
from sotto import Swarm
from sotto.__main__ import app
from sotto.demo import demo_checkpoint, demo_draft
from tests.helpers.swarm import deploy, with_client
from tests.helpers.tiny_models import make_checkpoint

SYSTEM, TEXTS = "You are Python.", ("What is a list?", "And a tuple?", "So which one?")

SYSTEM_LONG = "You are Python, and you answer in one sentence which says what is asked and nothing beside it. "


@pytest.fixture
def mortal(tmp_path: Path) -> Iterator[Cluster]:
    """Two workers that a test may kill."""
    with cluster.running(tmp_path / "cluster", [cluster.WorkerSpec("600MiB", "150MiB", 1)] * 2) as net:
        yield net


@dataclass
class Reference:
    """The same chat with the unsealed model in this process, each prompt computed from its beginning."""

    checkpoint: Checkpoint
    messages: list[ChatMessage] = field(default_factory=lambda: [ChatMessage("system", SYSTEM)])

    def __post_init__(self) -> None:
        self.model = LocalModel(self.checkpoint)
        self.tokenizer = Tokenizer.open(self.checkpoint.tokenizer_file)
        self.template = ChatTemplate.open(self.checkpoint.path, datetime.now())

    def prompt(self, text: str) -> list[int]:
        rendered = self.template.render([*self.messages, ChatMessage("user", text)])
        return self.tokenizer.encode(rendered, special=not self.template.own)

    def ids(self, text: str, tokens: int, sampling: SamplingParams) -> list[int]:
        return self.model.generate(self.prompt(text), tokens, sampling, self.checkpoint.config.eos_ids)

    def said(self, text: str, turn: Turn) -> None:
        self.messages += [ChatMessage("user", text), ChatMessage("assistant", turn.result.text)]


async def said(chat: Chat, text: str, ask: Ask) -> Turn:
    async with chat.say(text, ask) as reply:
        async for _ in reply.pieces:
            pass
    return reply.turn


def chatting(
    net: Cluster, data_dir: Path, work: Callable[[Chat], Awaitable[None]], workers: int = 1, **options: object
) -> list[str]:
    """Run `work` with a chat; what it had to tell its user."""
    notices: list[str] = []

    async def main(client: Client) -> None:
        model = await deploy(client, demo_checkpoint(), workers=workers)
        chat = await open_chat(model, ChatOptions(**{"system": SYSTEM, "notice": notices.append, **options}))  # type: ignore[arg-type]
        async with aclosing(chat):
            await work(chat)

    with_client(net, data_dir, main)
    return notices


def test_what_was_sent_in_lower_precision_is_sent_again(swarm: Cluster, tmp_path: Path) -> None:
    rough, plain = Ask(8, strategy=Strategy(wire="int8")), Ask(8, strategy=Strategy())

    async def work(chat: Chat) -> None:
        turns = [await said(chat, text, ask) for text, ask in zip(TEXTS, (rough, rough, plain), strict=True)]
        assert [bool(turn.reused_tokens) for turn in turns] == [False, True, False]

    chatting(swarm, tmp_path / "data", work)


def test_the_next_process_finds_what_a_chat_left(swarm: Cluster, tmp_path: Path) -> None:
    reused, ids = list[int](), list[tuple[int, ...]]()

    async def work(chat: Chat) -> None:
        turn = await said(chat, TEXTS[0], Ask(8))
        reused.append(turn.reused_tokens)
        ids.append(turn.result.ids)

    for _ in range(2):
        chatting(swarm, tmp_path / "data", work, workers=2, system=4 * SYSTEM_LONG)
    assert reused[0] == 0
    assert reused[1] >= PAGE_TOKENS, "under another identity of the moment"
    assert ids[0] == ids[1]


@pytest.mark.parametrize("strategy", [Strategy(), Strategy(deterministic=True)], ids=["default", "deterministic"])
def test_no_page_stands_for_the_text_of_another_conversation(
    strategy: Strategy, swarm: Cluster, tmp_path: Path
) -> None:
    """Said, forgotten, and something else said; then the first again, in a chat that finds what the other left."""
    one, other = (f"{word} {' '.join([word] * 150)}" for word in ("file", "open"))
    turns = list[Turn]()

    async def first(chat: Chat) -> None:
        await said(chat, one, Ask(2, strategy=strategy))
        chat.reset()
        await said(chat, other, Ask(2, strategy=strategy))

    async def second(chat: Chat) -> None:
        turns.append(await said(chat, one, Ask(12, strategy=strategy)))

    for work in (first, second):
        chatting(swarm, tmp_path / "data", work, workers=2)
    reference = Reference(Checkpoint.open(demo_checkpoint()))
    assert list(turns[0].result.ids) == reference.ids(one, 12, SamplingParams())
    assert turns[0].reused_tokens >= PAGE_TOKENS, "what the first conversation left is still found"


def test_who_names_no_pages_from_now_on_has_another_session(swarm: Cluster, tmp_path: Path) -> None:
    named, unnamed = Ask(4, strategy=Strategy()), Ask(4, strategy=Strategy(prefix_cache=False))

    async def work(chat: Chat) -> None:
        turns = [await said(chat, text, ask) for text, ask in zip(TEXTS, (named, unnamed, unnamed), strict=True)]
        assert [bool(turn.reused_tokens) for turn in turns] == [False, False, True]

    chatting(swarm, tmp_path / "data", work)


@pytest.mark.parametrize(
    "ask",
    [Ask(24), Ask(24, SamplingParams(0.8, seed=4), strategy=Strategy(speculation="draft"))],
    ids=["plain", "sampled with a draft"],
)
def test_turns_are_those_of_the_model_alone_and_send_what_is_new(ask: Ask, swarm: Cluster, tmp_path: Path) -> None:
    async def work(chat: Chat) -> None:
        reference, held = Reference(Checkpoint.open(demo_checkpoint())), 0
        for text in TEXTS:
            expected, prompt = reference.ids(text, 24, ask.sampling), reference.prompt(text)
            turn = await said(chat, text, ask)
            assert list(turn.result.ids) == expected
            assert turn.result.prompt_tokens == len(prompt)
            # the answer is tokenised again as a part of the chat, which may merge its last tokens with what follows
            assert held - 4 <= turn.reused_tokens <= held
            held = len(prompt) + len(turn.result.ids) - 1
            reference.said(text, turn)
        chat.reset()
        again = await said(chat, TEXTS[0], ask)
        assert again.result.ids == tuple(Reference(reference.checkpoint).ids(TEXTS[0], 24, ask.sampling))

    assert chatting(swarm, tmp_path, work, workers=3) == []


def test_an_answer_stopped_early_stays_in_the_chat(swarm: Cluster, tmp_path: Path) -> None:
    async def work(chat: Chat) -> None:
        async with chat.say(TEXTS[0], Ask(100)) as reply:
            pieces = [await anext(reply.pieces) for _ in range(5)]
        ((_, answer),) = chat.transcript.turns
        assert answer.content == "".join(pieces)
        turn = await said(chat, TEXTS[1], Ask(8))
        assert turn.reused_tokens > turn.result.prompt_tokens / 2

    assert chatting(swarm, tmp_path, work) == []


def test_a_full_context_loses_its_oldest_turns_and_says_so(swarm: Cluster, tmp_path: Path) -> None:
    async def work(chat: Chat) -> None:
        dropped = [(await said(chat, text, Ask(24))).dropped_turns for text in TEXTS * 3]
        assert sum(dropped) > 2
        assert dropped[:2] == [0, 0]
        with pytest.raises(InputError, match="shorten it"):
            await said(chat, "word " * 200, Ask(8))
        assert (await said(chat, "And now?", Ask(8))).result.ids

    notices = chatting(swarm, tmp_path, work, context_tokens=128)
    assert notices
    assert all("the context is full" in notice for notice in notices)


@pytest.mark.parametrize("midway", [False, True], ids=["between turns", "within an answer"])
def test_a_killed_worker_costs_a_line(midway: bool, mortal: Cluster, tmp_path: Path) -> None:
    ask, reference = Ask(48, SamplingParams(0.8, seed=9)), Reference(Checkpoint.open(demo_checkpoint()))

    def kill(chat: Chat) -> None:
        (hop,) = chat._model.route.hops
        next(worker for worker in mortal.workers if worker.peer == hop.peer).send(signal.SIGKILL)

    async def work(chat: Chat) -> None:
        first = await said(chat, TEXTS[0], ask)
        reference.said(TEXTS[0], first)
        expected = reference.ids(TEXTS[1], 48, ask.sampling)
        if not midway:
            kill(chat)
        async with chat.say(TEXTS[1], ask) as reply:
            if midway:
                await anext(reply.pieces)
                kill(chat)
            async for _ in reply.pieces:
                pass
        assert list(reply.turn.result.ids) == expected
        assert (reply.turn.losses, reply.turn.reused_tokens) == (1, 0)

    (notice,) = chatting(mortal, tmp_path / "data", work)
    assert "lost to this session" in notice


def test_a_template_of_its_own_is_used(swarm: Cluster, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", max_position_embeddings=512)
    template = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}<answer>"
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    reference = Reference(Checkpoint.open(folder), [])
    with Swarm(swarm.bootstrap, data_dir=tmp_path / "data") as client, client.deploy(folder).chat() as chat:
        for text in ("the quiet brook", "a worker sees"):
            expected = reference.ids(text, 12, SamplingParams())
            assert reference.prompt(text)[0] == 0, "one beginning, the template's"
            assert list(chat.say(text, max_new_tokens=12).ids) == expected
            assert chat.last is not None
            reference.said(text, chat.last)
        assert chat.last.reused_tokens > 10
        for _ in chat.stream("more", max_new_tokens=200):
            break
        assert chat.last is None


def command(swarm: Cluster, data_dir: Path, *words: str, said: str) -> tuple[int, str, str]:
    fixed = ["chat", "-b", swarm.bootstrap, "--data-dir", str(data_dir), "-n", "8"]
    result = CliRunner().invoke(app, [*fixed, *words], input=said)
    return result.exit_code, result.stdout, result.stderr


def test_each_line_of_standard_input_is_a_turn(swarm: Cluster, tmp_path: Path) -> None:
    said = "What is a list?\n\nAnd a tuple?\n/reset\nWhat is a list?\n/exit\nnever asked\n"
    code, out, _ = command(swarm, tmp_path, "--json", "--system", SYSTEM, said=said)
    turns = [json.loads(line) for line in out.splitlines()]
    assert (code, len(turns)) == (0, 3)
    assert turns[0]["ids"] == turns[2]["ids"]
    assert turns[0]["reused_tokens"] == 0 < turns[1]["reused_tokens"]
    history = CliRunner().invoke(app, ["history", "--json", "--data-dir", str(tmp_path)])
    records = {record["task_prompt_tokens"]: record for record in json.loads(history.stdout)["records"]}
    second = records[turns[1]["prompt_tokens"]]
    assert (second["measured_prefix_tokens"], second["measured_tokens"]) == (turns[1]["reused_tokens"], 8)
    sent_tokens = turns[1]["prompt_tokens"] - turns[1]["reused_tokens"] + 8 - 1
    assert second["measured_bytes_out"] == sent_tokens * 4 * 256
    code, out, err = command(swarm, tmp_path, "--system", SYSTEM, said=said)
    assert (code, out.splitlines()[0].strip()) == (0, turns[0]["text"].strip().splitlines()[0])
    assert err.count("prompt tokens reused") == 3


def test_a_turn_that_cannot_be_answered_does_not_end_the_chat(swarm: Cluster, tmp_path: Path) -> None:
    said = f"{'word ' * 100}\nWhat is a list?\n"
    code, out, _ = command(swarm, tmp_path, "--json", "--context", "64", said=said)
    first, second = (json.loads(line) for line in out.splitlines())
    assert code == 1
    assert "shorten it" in first["error"]
    assert len(second["ids"]) == 8


@pytest.mark.parametrize("more", [(), ("--strategy", "auto")])
def test_draft_models_that_do_not_fit_are_refused(more: tuple[str, ...], swarm: Cluster, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other")
    code, out, _ = command(swarm, tmp_path, "--json", *more, "--draft", str(other), said="Hello\n")
    assert code == 1
    assert "cannot draft for target" in json.loads(out)["error"]


def test_a_draft_model_that_is_named_is_there_for_the_first_choice(swarm: Cluster, tmp_path: Path) -> None:
    words = ("--json", "--strategy", "auto", "--draft", str(demo_draft()))
    code, _, _ = command(swarm, tmp_path, *words, said="Hello\n")
    history = CliRunner().invoke(app, ["history", "--json", "--data-dir", str(tmp_path)])
    (record,) = json.loads(history.stdout)["records"]
    assert (code, record["chosen_by"]) == (0, "auto")
    assert record["task_guess_us"] > 0


@pytest.mark.parametrize("terminal", [True, False])
def test_an_interrupt_stops_the_answer_at_a_terminal_and_else_the_chat(
    terminal: bool, swarm: Cluster, tmp_path: Path
) -> None:
    words = [
        "-b",
        swarm.bootstrap,
        "--data-dir",
        str(tmp_path),
        "-n",
        "1500",
        "--context",
        "1024",
        "--temperature",
        "1",
    ]
    keyboard, stdin = os.openpty() if terminal else reversed(os.pipe())
    process = subprocess.Popen(
        [sys.executable, "-m", "sotto", "chat", *words],
        stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.close(stdin)
    assert process.stdout is not None
    try:
        os.write(keyboard, b"Tell me everything.\nWhat is a list?\n" + b"\x04" * terminal)  # Ctrl-D
        assert process.stdout.read(20), "the answer has begun"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
        os.close(keyboard)
    assert process.returncode == (0 if terminal else 1), err
    assert err.count("[stopped]") == err.count("prompt tokens reused") == int(terminal)
    assert (err.splitlines()[-1] == "sotto: interrupted") == (not terminal)
