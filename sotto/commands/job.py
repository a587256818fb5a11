"""A job of many prompts: lines in, answers out in the same order, a few under way at once.

Invariant: an answer that came is not lost when the job ends early, nor to another job. Nothing here starts a job again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from client.generate import GenerationResult
    from node.choosing import Decided
    from node.model import Ask, DeployedModel

NOT_REACHED = "not answered: the job ended before"


def read_prompts(file: Path) -> list[dict[str, Any]]:
    """The lines of a prompts file. Raises InputError naming the first bad line, before anything is started."""
    from node.files import read_bytes
    from protocol.errors import InputError

    lines = []
    for number, line in enumerate(read_bytes(file).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
            raise InputError(f'{file} line {number} is not a JSON object with a "prompt" string')
        lines.append(record)
    if not lines:
        raise InputError(f"{file} holds no prompts")
    return lines


@contextlib.contextmanager
def taken(output: Path, prompts: Path, *, overwrite: bool) -> Iterator[FileIO]:
    """`output`, open within the block for this job alone, with what it holds: before anything is started. It and its
    folder are made if need be. Raises InputError when answers cannot be written there, another job writes there, or
    something would be lost that `overwrite` does not give up; OSError."""
    from protocol.errors import InputError

    there = output.exists()
    if there and not output.is_file():
        raise InputError(f"{output} is not a file: give --output the name of one")
    if there and output.samefile(prompts):
        raise InputError(f"{output} holds the prompts: give --output another name")
    output.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(output if there else output.parent, os.W_OK):
        raise InputError(f"{output} may not be written: give --output another name")
    if not there:
        output.touch()
    with output.open("r+b", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another job writes into {output}: give --output another name") from None
        except OSError:  # a file system that knows no locks
            pass
        if not overwrite and os.fstat(file.fileno()).st_size:
            raise InputError(f"{output} is not empty: give --output another name, or --overwrite to lose what it holds")
        yield file


class Answers:
    """The output of a job, `file`, which is `taken`. Within the block, which begins by emptying it, each answer is
    written as soon as those before it are; at its end come, in order, the rest, and an "error" for each line that has
    none. An interrupt may come at any moment. To enter raises InputError when another job has written there, where the
    file system knows no locks."""

    def __init__(self, file: FileIO, lines: list[dict[str, Any]]) -> None:
        self._file = file
        self._lines = lines
        self._found_bytes = os.fstat(file.fileno()).st_size
        self._answers: dict[int, dict[str, Any]] = {}
        self._written = (0, 0)  # lines, bytes: in one, so that a line is never there twice

    def __enter__(self) -> Answers:
        from protocol.errors import InputError

        if os.fstat(self._file.fileno()).st_size != self._found_bytes:
            raise InputError(f"another job has written into {self._file.name}: give --output another name")
        self._file.truncate(0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for index in range(self._written[0], len(self._lines)):
            self._write(self._answers.get(index) or answer_of(self._lines[index], error=NOT_REACHED))

    def put(self, index: int, answer: dict[str, Any]) -> None:
        """The answer of line `index` has come."""
        self._answers[index] = answer
        while self._written[0] in self._answers:
            self._write(self._answers[self._written[0]])

    def _write(self, answer: dict[str, Any]) -> None:
        """Raises InputError when the disk does not take all of it; then there is nothing of it."""
        from protocol.errors import InputError

        file, (count, end) = self._file, self._written
        data = json.dumps(answer).encode() + b"\n"
        try:
            file.seek(end)
            left = memoryview(data)
            while left:
                left = left[file.write(left) :]
        except OSError as error:
            file.truncate(end)
            raise InputError(
                f"{file.name} cannot be written ({error.strerror}): it holds the first {count} lines; give the "
                "others to another job"
            ) from None
        self._written = (count + 1, end + len(data))

    @property
    def whole(self) -> bool:
        """Each line is in the output, with its answer or an "error"."""
        return self._written[0] == len(self._lines)

    def counts(self) -> dict[str, int]:
        """Of how many lines the output has the answer, how many could not be answered, and how many the job did not
        reach, or write."""
        there = [answer for index, answer in self._answers.items() if index < self._written[0]]
        failed = sum("error" in answer for answer in there)
        return {"answered": len(there) - failed, "failed": failed, "not_reached": len(self._lines) - len(there)}


def answer_of(line: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """`line` with what became of it now: an "error" of an earlier job is gone."""
    return {name: value for name, value in line.items() if name != "error"} | fields


@dataclass(frozen=True, slots=True)
class Listener:
    """`progress` gets how many of how many lines are done; `decided` what was decided for each, before it runs;
    `answered` each answer as it comes, and the index of its line."""

    progress: Callable[[int, int], None]
    decided: Callable[[Decided], None]
    answered: Callable[[int, dict[str, Any]], None]


async def run_job(
    model: DeployedModel, lines: list[dict[str, Any]], ask: Ask, concurrency: int, listener: Listener
) -> None:
    """Answer each line. A prompt that cannot be answered gets an "error", as does one whose answer a worker spoils by
    breaking the protocol. When workers are lost, or have done that, the job goes on over others, and ends where there
    are none."""
    import trio

    from client.errors import HopViolation
    from models.errors import TextError
    from protocol.errors import InputError, Refused

    waiting, violators = iter(range(len(lines))), set[str]()
    done, streams = 0, min(concurrency, len(lines))
    ask = replace(ask, concurrency=streams, recover=True)

    async def answered(prompt: str) -> GenerationResult:
        async with model.ask(prompt, ask) as answer:
            listener.decided(answer.decided)
            async for _ in answer.pieces:
                pass
        return answer.result

    async def serve() -> None:
        nonlocal done
        for index in waiting:
            gone_past = frozenset(violators)
            try:
                result = await answered(lines[index]["prompt"])
            except (InputError, TextError, Refused, HopViolation) as error:
                if isinstance(error, HopViolation):
                    if error.peer in gone_past:
                        raise  # there was no other to go to
                    violators.add(error.peer)
                answer = answer_of(lines[index], error=str(error))
            else:
                found = {"text": result.text, "ids": list(result.ids), "finish_reason": result.finish_reason}
                answer = answer_of(lines[index], **found)
            listener.answered(index, answer)
            done += 1
            listener.progress(done, len(lines))

    listener.progress(0, len(lines))
    async with trio.open_nursery() as nursery:
        for _ in range(streams):
            nursery.start_soon(serve)
