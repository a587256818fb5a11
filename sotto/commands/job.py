"""A job of many prompts: lines in, answers out in the same order, a few under way at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from client.generate import GenerationResult
    from node.choosing import Decided
    from node.model import Ask, DeployedModel


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


@dataclass(frozen=True, slots=True)
class Hear:
    """`progress` gets how many of how many lines are done; `decided` what was decided for each, before it runs."""

    progress: Callable[[int, int], None]
    decided: Callable[[Decided], None] = lambda _: None


async def run_job(
    model: DeployedModel, lines: list[dict[str, Any]], ask: Ask, concurrency: int, hear: Hear
) -> list[dict[str, Any]]:
    """Each line with its answer. A prompt that cannot be answered gets an "error"; a lost swarm ends the job."""
    import trio

    from models.errors import ModelError
    from protocol.errors import InputError, Refused

    answers: list[dict[str, Any]] = [{} for _ in lines]
    waiting = iter(range(len(lines)))
    done, streams = 0, min(concurrency, len(lines))
    ask = replace(ask, concurrency=streams)

    async def answered(prompt: str) -> GenerationResult:
        async with model.ask(prompt, ask) as answer:
            hear.decided(answer.decided)
            async for _ in answer.pieces:
                pass
        return answer.result

    async def serve() -> None:
        nonlocal done
        for index in waiting:
            try:
                result = await answered(lines[index]["prompt"])
            except (InputError, ModelError, Refused) as error:
                answers[index] = {**lines[index], "error": str(error)}
            else:
                answers[index] = {
                    **lines[index],
                    "text": result.text,
                    "ids": list(result.ids),
                    "finish_reason": result.finish_reason,
                }
            done += 1
            hear.progress(done, len(lines))

    hear.progress(0, len(lines))
    async with trio.open_nursery() as nursery:
        for _ in range(streams):
            nursery.start_soon(serve)
    return answers
