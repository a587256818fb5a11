"""How fast workers take shards in: measured from progress, remembered, and as none when the file is damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from client.deploy import DeployProgress
from node.links import PEERS_MAX, Inflow, note_links, read_links
from protocol.ids import PeerId

A, B = PeerId("a"), PeerId("b")
MB = 1_000_000


def heard(*steps: tuple[float, PeerId, str, int]) -> dict[PeerId, float]:
    """What follows from progress at these seconds: a peer, its stage and the bytes that are there."""
    now = [0.0]
    inflow = Inflow(lambda: now[0])
    for at, peer, stage, present in steps:
        now[0] = at
        inflow.heard(DeployProgress(peer, stage, present, 100 * MB))
    return inflow.mbit_s


def test_each_worker_has_its_own_time_and_bytes() -> None:
    found = heard(
        (0.0, A, "lease", 0),
        (1.0, A, "upload", 0),
        (2.0, A, "upload", MB),
        (2.5, B, "upload", MB),
        (4.0, A, "upload", 11 * MB),
        (4.0, A, "load", 11 * MB),
        (22.5, B, "load", 11 * MB),
    )
    assert found == {A: pytest.approx(40.0), B: pytest.approx(4.0)}


def test_what_a_worker_had_before_is_not_counted() -> None:
    assert heard((1.0, A, "upload", 80 * MB), (3.0, A, "load", 90 * MB)) == {A: pytest.approx(40.0)}


@pytest.mark.parametrize("present", [0, MB])
def test_little_says_nothing(present: int) -> None:
    assert heard((1.0, A, "upload", present), (2.0, A, "load", present + MB)) == {}


def test_a_second_upload_of_the_same_deployment_is_measured_by_itself() -> None:
    first = (1.0, A, "upload", MB), (2.0, A, "load", 11 * MB)
    assert heard(*first, (10.0, A, "upload", MB), (12.0, A, "load", 11 * MB)) == {A: pytest.approx(40.0)}


def test_the_last_measurement_stays_and_the_oldest_go(tmp_path: Path) -> None:
    assert read_links(tmp_path) == {}
    note_links(tmp_path, {A: 10.0, B: 20.0})
    note_links(tmp_path, {A: 30.0})
    assert read_links(tmp_path) == {A: 30.0, B: 20.0}
    note_links(tmp_path, {PeerId(f"p{number}"): 1.0 for number in range(PEERS_MAX - 1)})
    assert A in read_links(tmp_path)
    assert B not in read_links(tmp_path)


def test_where_nothing_was_measured_nothing_is_written(tmp_path: Path) -> None:
    note_links(tmp_path, {})
    assert not (tmp_path / "client").exists()


@pytest.mark.parametrize("text", ["", "[]", '{"a": -1}', '{"a": "x"}', '{"a": 1e999}', "{", '{"a": null}'])
def test_a_damaged_file_is_as_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "client").mkdir()
    (tmp_path / "client" / "links.json").write_text(text)
    assert read_links(tmp_path) == {}
