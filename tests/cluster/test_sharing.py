"""Two real clients and real workers: one hears from the other, over gossip, which strategy paid, and keeps it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import trio
from typer.testing import CliRunner

from client.metalearning.comparing import RUNS_MIN, compared
from client.metalearning.record import Record
from node.app_client import open_client
from node.client import ClientOptions
from node.groups import ungrouped
from node.history import History
from node.identity import load_identity
from node.paths import history_file, reports_file
from node.sharing import read_kept
from protocol.ids import PeerId
from protocol.reports import pen_of
from protocol.strategy import parse
from simnet.cluster import Cluster
from sotto.__main__ import app
from tests.helpers.records import RECORD, numbered
from tests.helpers.swarm import DEADLINE_S

PAID = "speculation=lookup"


def ran(number: int, strategy: str, token_s: float) -> Record:
    measured = replace(RECORD.measured, tokens=32, ttft_s=token_s, token_s=token_s)
    task = replace(RECORD.task, exact=False)
    return numbered(number, strategy=parse(strategy), measured=measured, task=task)


def history(folder: Path, records: list[Record]) -> None:
    with History(history_file(folder)) as file:
        file.add(records)


def test_one_client_learns_from_anothers_requests(swarm: Cluster, tmp_path: Path) -> None:
    known, new, silent = (tmp_path / name for name in ("known", "new", "silent"))
    experience = [
        ran(number, (PAID, "default")[number % 2], (0.01, 0.03)[number % 2]) for number in range(2 * RUNS_MIN)
    ]
    for folder in (known, silent):
        history(folder, experience)
    history(new, [ran(1000, "default", 0.03)])
    where = next(iter(compared(experience)))
    author = pen_of(load_identity(known / "client")).peer

    def options(folder: Path, share: bool = True) -> ClientOptions:
        return ClientOptions(folder, (swarm.bootstrap,), discover_s=5.0, share_records=share)

    async def main() -> set[PeerId]:
        with trio.fail_after(DEADLINE_S):
            async with (
                open_client(options(new)) as hears,
                open_client(options(silent, False)),
                open_client(options(known)),
            ):
                assert hears.sharing is not None
                while author not in hears.sharing.hearsay:
                    await trio.sleep(0.05)
                word = hears.choosing.chooser.peers.word(where)  # type: ignore[union-attr]  # set by sharing
        assert word is not None
        assert -1.12 < word.log_ratio < -1.08, "the log of a third"
        return {signer for signer, *_ in read_kept(reports_file(new), RECORD.at_ms * 2)}

    with ungrouped():
        assert trio.run(main) == {author}, "who does not share is not heard, and what was heard is kept"
    assert not reports_file(silent).exists()

    def explained(*words: str) -> dict[str, dict[str, float]]:
        said = json.loads(CliRunner().invoke(app, ["explain", "--data-dir", str(new), "--json", *words]).stdout)
        return {each["strategy"]: each for each in said["strategies"]}

    assert explained("--share-records")[PAID]["from_peers"] > 0.02
    assert {each["from_peers"] for each in explained().values()} == {0.0}
