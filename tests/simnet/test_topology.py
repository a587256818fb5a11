"""Files that describe clusters: what they say, and how each mistake is named."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest

import simnet.topology
from protocol.errors import InputError
from simnet.cluster import WorkerSpec
from simnet.shape import CLIENT, Shape, Wiring, load_wiring
from simnet.topology import PROFILES, parse_topology, profile, read_topology

USING = (Path(__file__).parents[2] / "docs" / "USING.md").read_text(encoding="utf-8")
GOOD = """
seed = 7
link_default = { rtt_ms = 40, mbit_s = 100 }
[defaults]
memory = "1GiB"
threads = 2
[[worker]]
name = "near"
[[worker]]
name = "far"
memory = "600MiB"
kv_memory = "100MiB"
options = ["--log-level", "debug"]
[[link]]
between = ["far", "client"]
rtt_ms = 120.5
jitter_ms = 5
[[link]]
between = ["near", "far"]
mbit_s = 0
"""


def test_a_file_says_everything() -> None:
    topology = parse_topology(GOOD.encode(), "x.toml")
    assert topology.workers == (
        WorkerSpec("1GiB", "512MiB", 2, "near"),
        WorkerSpec("600MiB", "100MiB", 2, "far", ("--log-level", "debug")),
    )
    wiring = topology.wiring
    assert wiring.seed == 7
    assert wiring.shape(CLIENT, "far") == wiring.shape("far", CLIENT) == Shape(120.5, 5.0, 100.0)
    assert wiring.shape("near", "far") == Shape(40.0, 0.0, 0.0)
    assert wiring.shape(CLIENT, "near") == Shape(40.0, 0.0, 100.0)
    assert list(wiring.pairs()) == [(CLIENT, "near"), (CLIENT, "far"), ("near", "far")]


def test_the_least_that_a_file_says() -> None:
    topology = parse_topology(b'[[worker]]\nname = "only"\n', "x.toml")
    assert topology.workers == (WorkerSpec(name="only"),)
    assert topology.wiring.shape(CLIENT, "only") == Shape()


ONE = '[[worker]]\nname = "a"\n'
TWO = ONE + '[[worker]]\nname = "b"\n'


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("x =", "is not TOML"),
        ("", r"0 \[\[worker\]\] tables; between 1 and 64"),
        ("".join(f'[[worker]]\nname = "w{n}"\n' for n in range(65)), "65 "),
        ("worker = 3", "'worker' must be a list"),
        ("worker = [3]", r"\[\[worker\]\] number 1 must be a table"),
        (ONE + "speed = 3\n", r"\[\[worker\]\] number 1: 'speed' is not known here: use name, memory"),
        ("worlds = 3\n" + ONE, "'worlds' is not known here: use defaults, worker"),
        ("[[worker]]\n", "number 1: 'name' must be small letters"),
        ('[[worker]]\nname = "../x"\n', "'name' must be small letters"),
        ('[[worker]]\nname = "client"\n', "'name' must be small letters"),
        (ONE + ONE, "two workers are named 'a'"),
        (ONE + "memory = 5\n", "'memory' must be text in quotes"),
        (ONE + 'memory = "much"\n', "'memory' is wrong: 'much' is not a size"),
        ('[defaults]\nmemory = "much"\n' + ONE, r"\[defaults\]: 'memory' is wrong"),
        (ONE + 'memory = "1GiB"\nkv_memory = "1GiB"\n', "'kv_memory' is 1GiB, and must be less than memory"),
        (ONE + "threads = 0\n", "'threads' must be between"),
        (ONE + "threads = true\n", "'threads' must be a whole number"),
        (ONE + "threads = 1.5\n", "'threads' must be a whole number"),
        (ONE + "options = [1]\n", "'options' must be a list of words"),
        (TWO + '[[link]]\nbetween = ["a"]\n', r"\[\[link\]\] number 1: 'between' must name two of client, a, b"),
        (TWO + '[[link]]\nbetween = ["a", "a"]\n', "'between' must name two"),
        (TWO + '[[link]]\nbetween = ["a", "z"]\n', "'between' must name two"),
        (TWO + '[[link]]\nbetween = ["a", ["b"]]\n', "'between' must name two"),
        (TWO + '[[link]]\nbetween = ["a", "b"]\n[[link]]\nbetween = ["b", "a"]\n', "stands here already"),
        (TWO + '[[link]]\nbetween = ["a", "b"]\nrtt_ms = -1\n', "'rtt_ms' must be between 0 and 10000"),
        (TWO + '[[link]]\nbetween = ["a", "b"]\nrtt_ms = nan\n', "'rtt_ms' must be between"),
        (TWO + '[[link]]\nbetween = ["a", "b"]\nmbit_s = "9"\n', "'mbit_s' must be a number"),
        ("link_default = { rtt = 3 }\n" + ONE, r"\[link_default\]: 'rtt' is not known here: use rtt_ms"),
    ],
)
def test_a_mistake_is_named(text: str, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint) as found:
        parse_topology(text.encode(), "x.toml")
    assert str(found.value).startswith("x.toml")


@pytest.mark.parametrize("text", [*re.findall(r"```toml\n(.*?)```", USING, re.DOTALL), simnet.topology.__doc__])
def test_the_examples_in_the_documents_hold(text: str) -> None:
    example = "\n".join(line for line in text.splitlines() if line.startswith("    ") or text in USING)
    topology = parse_topology(textwrap.dedent(example).encode(), "example")
    assert [worker.name for worker in topology.workers] == ["near", "far"]
    assert topology.wiring.shape(CLIENT, "far").rtt_ms == 120


@pytest.mark.parametrize("name", PROFILES)
def test_profiles_hold(name: str) -> None:
    topology = profile(name)
    assert len(topology.workers) >= 3
    assert all(topology.wiring.shape(a, b) for a, b in topology.wiring.pairs())


def test_unknown_profiles_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="lan, wan, mixed"):
        profile("moon")
    with pytest.raises(InputError, match=r"nothing\.toml"):
        read_topology(tmp_path / "nothing.toml")


def test_a_wiring_is_kept_in_its_folder(tmp_path: Path) -> None:
    assert load_wiring(tmp_path) is None
    wiring = parse_topology(GOOD.encode(), "x.toml").wiring
    wiring.save(tmp_path)
    assert load_wiring(tmp_path) == wiring


def test_links_of_machines_that_are_not_there() -> None:
    wiring = Wiring(("a", "b"), Shape(), {})
    with pytest.raises(InputError, match="no machine 'z': name two of client, a, b"):
        wiring.with_link("a", "z", Shape())
    with pytest.raises(InputError, match="two ends"):
        wiring.with_link("a", "a", Shape())
