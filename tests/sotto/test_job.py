"""A job of many prompts: one that cannot be answered costs the others nothing, and what ends it early no answer."""

from __future__ import annotations

import errno
import json
import signal
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from io import FileIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import tokenizers
import trio
from typer.testing import CliRunner, Result

from client.errors import HopLost, HopViolation
from models.errors import CheckpointError
from models.tokenizer import Tokenizer
from node.client import ClientOptions
from node.model import Ask, DeployedModel
from protocol.errors import InputError
from protocol.ids import PeerId
from sotto.__main__ import app
from sotto.commands.job import NOT_REACHED, Answers, Listener, run_job, taken
from tests.helpers.tiny_models import make_checkpoint, tokenizer_json

TOKENIZER = Tokenizer(tokenizers.Tokenizer.from_str(tokenizer_json()))
PEER = PeerId("12D3KooWLost")


class Echo:
    """A model that answers a prompt with itself, and a client that has nothing to deploy."""

    draft = None
    drafts = SimpleNamespace(soon=lambda _: None)

    @asynccontextmanager
    async def ask(self, prompt: str, ask: Ask) -> AsyncGenerator[Any, None]:
        ask.notice("a worker is busy")
        if not prompt:
            raise InputError("an empty prompt")
        if prompt == "lost":
            raise HopLost(PEER, "was lost")
        if prompt == "spoilt":
            raise HopViolation(PEER, "an output with numbers that are NaN or infinite")
        if prompt == "no draft":
            raise CheckpointError("no such model")
        if prompt == "interrupted":
            signal.raise_signal(signal.SIGINT)
            await trio.sleep_forever()
        ids = TOKENIZER.encode(prompt)
        result = SimpleNamespace(text=prompt, ids=ids, finish_reason="length")
        decided = SimpleNamespace(choice=None)
        yield SimpleNamespace(decided=decided, pieces=self.pieces(prompt), result=result)

    async def pieces(self, text: str) -> AsyncGenerator[str, None]:
        yield text

    async def bring(self, *_: object) -> Echo:
        return self


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


@pytest.fixture
def submit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`sotto submit` of prompts, one after the other, to a swarm that only echoes."""

    @asynccontextmanager
    async def echoing(_: ClientOptions) -> AsyncIterator[Echo]:
        yield Echo()

    monkeypatch.setattr("node.app_client.open_client", echoing)
    model = make_checkpoint(tmp_path / "model")

    def call(lines: list[dict[str, Any]], output: Path, *words: str) -> Result:
        prompts = tmp_path / "prompts.jsonl"
        prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
        options = ["-m", str(model), "-b", "x", "--privacy", "plain", "--concurrency", "1", *words]
        return CliRunner().invoke(app, ["submit", str(prompts), "-o", str(output), *options])

    return call


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_prompt_that_cannot_be_answered_costs_no_other_its_answer() -> None:
    lines = [{"prompt": "a"}, {"prompt": "x\ud83d"}, {"prompt": ""}, {"prompt": "b", "error": "of an earlier job"}]
    heard: list[tuple[int, int]] = []
    answers: dict[int, dict[str, Any]] = {}

    async def main() -> None:
        listener = Listener(lambda done, total: heard.append((done, total)), lambda _: None, answers.__setitem__)
        await run_job(cast("DeployedModel", Echo()), lines, Ask(), 1, listener)

    trio.run(main)
    first, broken, empty, last = (answers[index] for index in range(4))
    assert (first["text"], last["text"]) == ("a", "b")
    assert "error" not in last
    assert "not valid Unicode" in broken["error"]
    assert empty["error"] == "an empty prompt"
    assert heard[-1] == (4, 4)


def test_a_worker_that_breaks_the_protocol_costs_one_line_and_ends_the_job_where_there_is_no_other() -> None:
    lines = [{"prompt": prompt} for prompt in ("spoilt", "a", "spoilt", "b")]
    answers: dict[int, dict[str, Any]] = {}

    async def main() -> None:
        listener = Listener(lambda *_: None, lambda _: None, answers.__setitem__)
        await run_job(cast("DeployedModel", Echo()), lines, Ask(), 1, listener)

    with pytest.RaisesGroup(HopViolation):
        trio.run(main)
    assert list(answers) == [0, 1]
    assert "broke the protocol" in answers[0]["error"]
    assert answers[1]["text"] == "a"


def test_what_no_prompt_can_be_answered_without_ends_the_job() -> None:
    answers: dict[int, dict[str, Any]] = {}

    async def main() -> None:
        listener = Listener(lambda *_: None, lambda _: None, answers.__setitem__)
        await run_job(cast("DeployedModel", Echo()), [{"prompt": "no draft"}, {"prompt": "a"}], Ask(), 1, listener)

    with pytest.RaisesGroup(CheckpointError):
        trio.run(main)
    assert not answers


def test_a_disk_that_fills_up_leaves_whole_lines_and_says_how_many(tmp_path: Path) -> None:
    class Full(FileIO):
        def write(self, data: Any) -> int:
            if self.tell() > 20:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data[:11])

    out = tmp_path / "out"
    answers = Answers(Full(out, "w"), [{"prompt": str(index)} for index in range(3)])
    answers.__enter__()
    answers.put(0, {"text": "0123456"})
    for attempt in (lambda: answers.put(1, {"text": "0123456"}), lambda: answers.__exit__(None, None, None)):
        with pytest.raises(InputError, match=r"out cannot be written \(No space left.*holds the first 1 lines"):
            attempt()
    assert out.read_bytes() == b'{"text": "0123456"}\n'
    assert answers.counts() == {"answered": 1, "failed": 0, "not_reached": 2}
    assert not answers.whole


def test_an_answer_is_written_as_soon_as_those_before_it_are(tmp_path: Path) -> None:
    file = tmp_path / "out"
    file.write_text("of an earlier job\n" * 100)
    answers = Answers(FileIO(file, "r+"), [{"prompt": str(index)} for index in range(4)])
    assert file.stat().st_size, "until there are answers"
    with answers:
        answers.put(1, {"text": "one"})
        assert read(file) == []
        answers.put(0, {"text": "none"})
        assert [line["text"] for line in read(file)] == ["none", "one"]
        answers.put(3, {"error": "three"})
    assert read(file)[2:] == [{"prompt": "2", "error": NOT_REACHED}, {"error": "three"}]
    assert answers.counts() == {"answered": 2, "failed": 1, "not_reached": 1}


@pytest.mark.parametrize(("how", "says"), [("lost", "was lost"), ("interrupted", "interrupted")])
def test_a_job_that_ends_early_keeps_what_was_answered(how: str, says: str, submit: Any, tmp_path: Path) -> None:
    lines, out = [{"prompt": "a", "id": 7}, {"prompt": ""}, {"prompt": how}, {"prompt": "b"}], tmp_path / "out"
    ended = submit(lines, out)
    assert ended.exit_code == 1
    assert ended.stdout == f"1 answered, 1 failed, 2 not reached: {out}\n"
    assert ended.stderr.splitlines()[-1].startswith("sotto: ")
    assert says in ended.stderr.splitlines()[-1]
    answers = read(out)
    assert (answers[0]["text"], answers[0]["id"]) == ("a", 7)
    assert [answer.get("error") for answer in answers] == [None, "an empty prompt", NOT_REACHED, NOT_REACHED]
    exported = json.loads(submit(lines, out, "--overwrite", "--json").stdout)
    assert says in exported.pop("error")
    assert exported == {"answered": 1, "failed": 1, "not_reached": 2, "over_budget": 0, "output": str(out)}
    rest = [line for line in answers if "error" in line][2:]
    assert submit(rest, tmp_path / "rest").exit_code == 0
    assert [(line["text"], "error" in line) for line in read(tmp_path / "rest")] == [("b", False)]


def test_that_a_worker_is_busy_is_said_once(submit: Any, tmp_path: Path) -> None:
    lines, out = [{"prompt": "a"}, {"prompt": "b"}], tmp_path / "out"
    assert submit(lines, out).stderr.count("[a worker is busy]") == 1
    assert "busy" not in submit(lines, out, "--overwrite", "--json").stderr


def test_where_answers_cannot_be_written_is_known_before_anything_starts(submit: Any, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("")
    (tmp_path / "out").mkdir()
    for output, says in ((tmp_path / "out", "is not a file"), (prompts, "holds the prompts")):
        refused = submit([{"prompt": "lost"}], output)
        assert says in refused.stderr
        assert refused.stdout == ""
        with pytest.raises(InputError, match=says), taken(output, prompts, overwrite=True):
            pass
    with taken(tmp_path / "new" / "out", prompts, overwrite=False):
        assert (tmp_path / "new" / "out").is_file()


def test_answers_that_are_there_are_replaced_only_if_that_is_asked_for(submit: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.touch()
    assert submit([{"prompt": "a"}], out).exit_code == 0
    again = submit([{"prompt": "b"}], out)
    assert (again.exit_code, again.stdout) == (1, "")
    assert f"{out} is not empty" in again.stderr
    assert "--overwrite" in again.stderr
    assert [line["text"] for line in read(out)] == ["a"]
    assert submit([{"prompt": "b"}], out, "--overwrite").exit_code == 0
    assert [line["text"] for line in read(out)] == ["b"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_that_another_job_has_taken_is_refused_before_anything_starts(
    overwrite: bool, submit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, words = tmp_path / "out", ["--overwrite"] * overwrite
    with taken(out, tmp_path / "prompts.jsonl", overwrite=overwrite) as file:
        with monkeypatch.context() as patched:
            patched.setattr("sotto.commands.models.open_model", lambda _: pytest.fail("it was started"))
            refused = submit([{"prompt": "b"}], out, *words)
        assert (refused.exit_code, refused.stdout) == (1, "")
        assert "another job writes" in refused.stderr
        with Answers(file, [{"prompt": "a"}]) as answers:
            answers.put(0, {"text": "a"})
    assert read(out) == [{"text": "a"}]
    assert submit([{"prompt": "b"}], out, *words).exit_code == (0 if overwrite else 1)


def test_a_job_that_does_not_begin_leaves_what_was_there(submit: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("of an earlier job\n")
    assert submit([{"prompt": "a"}], out, "--overwrite", "-m", str(tmp_path / "none")).exit_code == 1
    assert out.read_text() == "of an earlier job\n"


def test_where_there_are_no_locks_answers_that_came_meanwhile_are_not_lost(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with taken(out, tmp_path, overwrite=False) as file:
        answers = Answers(file, [{"prompt": "b"}])
        out.write_text("of another job\n")
        with pytest.raises(InputError, match="another job has written"):
            answers.__enter__()
    assert out.read_text() == "of another job\n"


def test_prompts_that_are_not_utf_8_are_named_by_their_line(tmp_path: Path) -> None:
    prompts = tmp_path / "in"
    prompts.write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n')
    refused = CliRunner().invoke(app, ["submit", str(prompts), "-o", str(tmp_path / "out"), "-b", "x"])
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert "line 2" in refused.stderr
