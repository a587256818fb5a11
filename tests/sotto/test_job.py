"""A job of many prompts: one that cannot be answered costs the others nothing."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import tokenizers
import trio

from models.tokenizer import Tokenizer
from node.model import Ask, DeployedModel
from protocol.errors import InputError
from sotto.commands.job import Hear, run_job
from tests.helpers.tiny_models import tokenizer_json

TOKENIZER = Tokenizer(tokenizers.Tokenizer.from_str(tokenizer_json()))


class Echo:
    """A model that answers a prompt with itself."""

    @asynccontextmanager
    async def ask(self, prompt: str, _: Ask) -> AsyncGenerator[Any, None]:
        if not prompt:
            raise InputError("an empty prompt")
        ids = TOKENIZER.encode(prompt)
        result = SimpleNamespace(text=prompt, ids=ids, finish_reason="length")
        yield SimpleNamespace(decided=None, pieces=self.pieces(prompt), result=result)

    async def pieces(self, text: str) -> AsyncGenerator[str, None]:
        yield text


def test_a_prompt_that_cannot_be_answered_costs_no_other_its_answer() -> None:
    lines = [{"prompt": "a"}, {"prompt": "x\ud83d"}, {"prompt": ""}, {"prompt": "b"}]
    heard: list[tuple[int, int]] = []

    async def main() -> list[dict[str, Any]]:
        hear = Hear(lambda done, total: heard.append((done, total)))
        return await run_job(cast("DeployedModel", Echo()), lines, Ask(), 1, hear)

    first, broken, empty, last = trio.run(main)
    assert (first["text"], last["text"]) == ("a", "b")
    assert "not valid Unicode" in broken["error"]
    assert empty["error"] == "an empty prompt"
    assert heard[-1] == (4, 4)
