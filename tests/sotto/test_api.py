"""The Python API over real workers, and every Python snippet of the documents, as it stands there."""

from __future__ import annotations

import ast
import inspect
import json
import re
import runpy
import threading
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
from typer.testing import CliRunner

from models.checkpoint import Checkpoint
from models.local import LocalModel
from models.tokenizer import Tokenizer
from node.identity import load_identity
from node.model import Ask, DeployedModel
from protocol.errors import InputError, TransportError
from protocol.strategy import DEFAULT
from simnet.cluster import Cluster
from simnet.runtime import run
from sotto import AsyncSwarm, SamplingParams, Swarm
from sotto.__main__ import app
from sotto.api import AsyncModel, Model
from sotto.demo import demo_checkpoint
from tests.helpers.tiny_models import make_checkpoint

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROMPT = "the quiet brook"
SNIPPETS = [
    (document.name, code)
    for document in DOCUMENTS
    for code in re.findall(r"^```python\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)
]


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


@pytest.mark.parametrize(
    ("name", "call"), [("Swarm", Swarm), ("swarm.deploy", Swarm.deploy), ("model.generate", Model.generate)]
)
def test_the_table_of_calls_has_the_defaults_of_the_code(name: str, call: Callable[..., Any]) -> None:
    text = (ROOT / "docs" / "USING.md").read_text()
    row = re.search(rf"^\| `{re.escape(name)}\(([^`]*)\)`", text, re.MULTILINE)
    assert row is not None
    stated = dict(part.split("=", 1) for part in row[1].split(", ") if "=" in part)
    real = {p.name: p.default for p in inspect.signature(call).parameters.values() if p.default is not p.empty}
    assert {each: ast.literal_eval(value) for each, value in stated.items()} == real


def test_one_stop_string_needs_no_list() -> None:
    asked: list[Ask] = []

    class Deployed:
        default_strategy = DEFAULT

        async def generate(self, _: str, ask: Ask) -> None:
            asked.append(ask)

    model = AsyncModel(cast("DeployedModel", Deployed()), lambda: None)
    trio.run(partial(model.generate, PROMPT, stop="###"))
    trio.run(partial(model.generate, PROMPT, stop=["#", "!"]))
    assert [ask.stop for ask in asked] == [("###",), ("#", "!")]


def test_a_model_that_is_closed_leaves_its_leases_once_no_other_is_of_the_same_deployment(tmp_path: Path) -> None:
    parted = list[bytes]()

    class Bringing:
        drafts = SimpleNamespace(soon=lambda _: None)

        async def bring(self, checkpoint: Checkpoint, *_: object) -> Any:
            return SimpleNamespace(route=SimpleNamespace(deployment=checkpoint.path.name.encode()), draft=None)

        def part(self, deployment: bytes) -> None:
            parted.append(deployment)

    async def main() -> None:
        swarm = AsyncSwarm("x", data_dir=tmp_path)
        swarm._client = cast("Any", Bringing())
        first, second, other = [await swarm.deploy(make_checkpoint(tmp_path / n), privacy="plain") for n in "aab"]
        await first.aclose()
        await first.aclose()
        with pytest.raises(InputError, match="the model is closed"):
            await first.chat()
        async with other:
            pass
        assert parted == [b"b"], "of the first there is another"
        with trio.CancelScope() as scope:
            scope.cancel()
            await second.aclose()

    trio.run(main)
    assert parted == [b"b", b"a"]


def test_who_is_interrupted_does_not_wait_for_a_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left, waited = threading.Event(), list[bool]()

    def download(_: object) -> None:
        waited.append(left.wait(10))

    async def main() -> None:
        swarm = AsyncSwarm("x", data_dir=tmp_path)
        swarm._client = cast("Any", object())
        with trio.move_on_after(1):
            await swarm.deploy("someone/some-model", privacy="plain")

    monkeypatch.setattr(Checkpoint, "open", download)
    run(main, seed=0)
    assert waited == []
    left.set()


def local_answer(folder: Path, new_tokens: int) -> str:
    checkpoint = Checkpoint.open(folder)
    tokenizer = Tokenizer.open(checkpoint.tokenizer_file)
    ids = LocalModel(checkpoint).generate(tokenizer.encode(PROMPT), new_tokens, stop_ids=checkpoint.config.eos_ids)
    return tokenizer.decode(ids)


@pytest.mark.parametrize(("document", "code"), SNIPPETS, ids=[f"{name}-{i}" for i, (name, _) in enumerate(SNIPPETS)])
def test_the_documents_snippets_run(
    document: str, code: str, swarm: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real = code.replace('"ADDRESS"', repr(swarm.bootstrap)).replace('"MODEL"', repr(str(demo_checkpoint())))
    assert real != code
    file = tmp_path / f"{document}.py"
    file.write_text(real)
    runpy.run_path(str(file))
    assert len(capsys.readouterr().out.split()) > 3


def test_there_are_snippets() -> None:
    assert {name for name, _ in SNIPPETS} == {"README.md", "USING.md"}


def test_sync(swarm: Cluster, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", seed=41)
    with Swarm(swarm.bootstrap) as client:
        model = client.deploy(folder, workers=3)
        result = model.generate(PROMPT, max_new_tokens=10)
        assert result.text == "".join(model.stream(PROMPT, max_new_tokens=10)) == local_answer(folder, 10)
        warm = SamplingParams(temperature=1.5, seed=3)
        assert model.generate(PROMPT, sampling=warm).ids == model.generate(PROMPT, sampling=warm).ids
        for _ in model.stream(PROMPT, max_new_tokens=100):
            break  # leaving early stops the request
        assert model.generate(PROMPT, max_new_tokens=10).ids == result.ids
        with pytest.raises(InputError, match="context"):
            list(model.stream(PROMPT * 80))
        with Swarm(swarm.bootstrap) as beside:  # a second client with the same data folder, at the same time
            assert beside.deploy(folder, workers=3).generate(PROMPT, max_new_tokens=10).ids == result.ids
        with Swarm(swarm.bootstrap, data_dir=tmp_path / "other") as second:
            assert second.deploy(folder).generate(PROMPT, max_new_tokens=10).ids == result.ids
    assert _running(swarm) == 0


def test_async(swarm: Cluster, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", seed=42)

    async def main() -> tuple[str, str]:
        async with AsyncSwarm(swarm.bootstrap) as client:
            model = await client.deploy(folder, privacy="plain")
            result = await model.generate(PROMPT, max_new_tokens=10)
            return result.text, "".join([piece async for piece in model.stream(PROMPT, max_new_tokens=10)])

    assert trio.run(main) == (local_answer(folder, 10),) * 2


def test_what_the_owner_of_a_deployment_chose_is_not_asked_for_otherwise(swarm: Cluster, tmp_path: Path) -> None:
    folder, guest = make_checkpoint(tmp_path / "m", seed=43), tmp_path / "guest"
    peer = load_identity(guest / "client").peer
    with Swarm(swarm.bootstrap, data_dir=tmp_path / "home") as client:
        owned = client.deploy(folder, privacy="plain", dtype="bfloat16", workers=2)
        words = ["-m", str(folder), "--privacy", "plain", "--dtype", "bfloat16", "--data-dir", str(tmp_path / "home")]
        granted = CliRunner().invoke(app, ["grant", peer, *words, "--json"])
        token = json.loads(granted.stdout)["token"]
        with Swarm(swarm.bootstrap, data_dir=guest, capability=token) as other:
            with pytest.raises(InputError, match="here bfloat16: leave the dtype out"):
                other.deploy(folder, privacy="plain", dtype="float32")
            with pytest.raises(InputError, match="leave workers out"):
                other.deploy(folder, privacy="plain", workers=2)
            for model in other.deploy(folder, privacy="plain"), other.deploy(folder, privacy="plain", dtype="bfloat16"):
                answer = model.generate(PROMPT, max_new_tokens=10)
                assert answer.ids == owned.generate(PROMPT, max_new_tokens=10).ids


def test_errors_come_as_themselves(swarm: Cluster) -> None:
    with pytest.raises(InputError, match="/p2p/"), Swarm("nonsense"):
        pass
    with pytest.raises(TransportError), Swarm("/ip4/127.0.0.1/tcp/9/p2p/" + swarm.workers[0].peer):
        pass
    with pytest.raises(InputError, match="with Swarm"):
        Swarm(swarm.bootstrap).deploy("model")
    with Swarm(swarm.bootstrap) as client, pytest.raises(InputError, match="ee"):
        client.deploy(demo_checkpoint(), privacy="magic")


def _running(net: Cluster) -> float:
    total = 0.0
    for worker in net.workers:
        with urllib.request.urlopen(worker.metrics, timeout=5) as reply:
            text = reply.read().decode()
        found = re.search(r"^vllm:num_requests_running (\S+)$", text, re.MULTILINE)
        assert found
        total += float(found.group(1))
    return total
