"""The command line: what it prints, where, and how it says what is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import psutil
import pytest
from typer.main import get_command
from typer.testing import CliRunner, Result

from models.checkpoint import Checkpoint
from models.local import LocalModel
from models.tokenizer import Tokenizer
from node.grants import Grants, read_token
from simnet.cluster import Cluster, WorkerProcess, default_folder
from sotto.__main__ import app
from sotto.commands.common import bootstrap_addrs
from tests.helpers.tiny_models import make_checkpoint

COMMANDS = [
    ["demo"],
    ["worker"],
    ["invite"],
    ["join"],
    ["doctor"],
    ["run"],
    ["submit"],
    ["chat"],
    ["history"],
    ["explain"],
    *(["history", name] for name in ("export", "import")),
    ["seal"],
    ["peers"],
    ["place"],
    ["id"],
    ["grant"],
    ["revoke"],
    *(["worker", name] for name in ("pause", "resume", "status")),
    *(["key", name] for name in ("new", "show", "export", "import")),
    *(["sim", name] for name in ("up", "status", "link", "kill", "freeze", "thaw", "restart", "down")),
    *(
        ["bench", name]
        for name in ("dataplane", "placement", "engine", "growth", "serve", "precision", "products", "speculation")
    ),
    ["sim", "check", "mesh"],
    ["select"],
]
PROMPT = "the quiet brook"


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands take the workers that speak first, as many as they were told to."""
    monkeypatch.setattr("node.client.SETTLE_S", 0.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("cli") / "model", seed=31)


def sotto(*words: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, list(words), input=stdin)


def test_compute_threads_sleep_while_they_wait() -> None:
    """Before torch is loaded, since OpenMP reads it then; what the user says counts more."""
    code = (
        "import os, sys, typer; from sotto.__main__ import app; "
        "app.command('probe')(lambda: print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)); app(['probe'])"
    )
    for said, expected in ({}, "passive False"), ({"OMP_WAIT_POLICY": "active"}, "active False"):
        environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | said
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected


def one_object(result: Result) -> dict[str, object]:
    """`--json`: one object on standard output and nothing else."""
    lines = result.stdout.splitlines()
    assert len(lines) == 1, result.stdout
    value = json.loads(lines[0])
    assert isinstance(value, dict)
    return value


def complaint(result: Result) -> str:
    """One line on standard error that says what is wrong, nothing on standard output, exit status 1."""
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("sotto: ")]
    assert len(lines) == 1
    assert result.stderr.splitlines()[-1] == lines[0]
    return lines[0]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_explains_with_an_example(command: list[str]) -> None:
    result = sotto(*command, "--help")
    assert result.exit_code == 0
    assert f"Example: sotto {' '.join(command)}" in " ".join(result.stdout.split())


def test_join_takes_every_option_of_worker_and_a_token_in_place_of_an_address() -> None:
    def options(command: str) -> set[str]:
        found = get_command(app).commands[command]  # type: ignore[attr-defined]
        return {name for parameter in found.params for name in (*parameter.opts, *parameter.secondary_opts)}

    assert options("join") == options("worker") - {"--bootstrap", "-b"} | {"token"}


def test_version() -> None:
    result = sotto("--version")
    assert (result.exit_code, result.stdout) == (0, f"{version('sotto')}\n")
    assert "sotto demo" in sotto("--help").stdout


@pytest.mark.parametrize("words", [["worker"], ["worker", "status"], ["join"], ["invite"], ["doctor"]])
def test_the_folder_of_a_worker_is_named(words: list[str]) -> None:
    command = get_command(app)
    for word in words:
        command = command.commands[word]  # type: ignore[attr-defined]
    folder = next(each for each in command.params if each.name == "data_dir")
    assert "sotto/worker" in folder.help  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["run", "submit"])
def test_kv_room_can_be_leased_where_the_documents_say_so(name: str) -> None:
    command = get_command(app).commands[name]  # type: ignore[attr-defined]
    assert any("--kv-tokens" in parameter.opts for parameter in command.params)


def test_commands_share_the_options_of_requests_and_have_defaults_of_their_own() -> None:
    def defaults(name: str) -> dict[str, object]:
        params = get_command(app).commands[name].params  # type: ignore[attr-defined]
        return {max(parameter.opts, key=len): parameter.default for parameter in params}

    run, submit, chat = defaults("run"), defaults("submit"), defaults("chat")
    assert run.keys() - submit.keys() == {"prompt", "--trace"}
    assert submit.keys() - run.keys() == {"prompts", "--output", "--overwrite", "--concurrency"}
    assert run.keys() - chat.keys() == {"prompt", "--trace", "--kv-tokens"}
    assert chat.keys() - run.keys() == {"--system", "--context"}
    assert {name for name in run.keys() & submit.keys() if run[name] != submit[name]} == {"--objective"}
    assert {name for name in run.keys() & chat.keys() if run[name] != chat[name]} == {"--max-new-tokens"}


def test_help_loads_no_torch_and_import_loads_no_key_code() -> None:
    code = "import sys, sotto, sotto.__main__; print([m for m in sys.modules if m in ('torch', 'trio', 'equivariant')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.usefixtures("hurried")
def test_run_streams_the_unsealed_models_answer(swarm: Cluster, model: Path) -> None:
    checkpoint = Checkpoint.open(model)
    tokenizer = Tokenizer.open(checkpoint.tokenizer_file)
    want = LocalModel(checkpoint).generate(tokenizer.encode(PROMPT), 12, stop_ids=checkpoint.config.eos_ids)
    words = ["run", "-m", str(model), "-b", swarm.bootstrap, "-n", "12", PROMPT]
    sealed = sotto(*words, "--workers", "3")
    assert sealed.exit_code == 0, sealed.output
    assert sealed.stdout.rstrip("\n") == tokenizer.decode(want).rstrip("\n")
    assert "blocks 0 to 0" in sealed.stderr  # the placement, before the upload
    assert one_object(sotto(*words, "--json"))["ids"] == want
    assert one_object(sotto(*words, "--json", "--privacy", "plain"))["ids"] == want


@pytest.mark.usefixtures("hurried")
def test_a_seed_gives_the_same_answer_and_another_another(swarm: Cluster, model: Path) -> None:
    words = ["run", "-m", str(model), "-b", swarm.bootstrap, "--json", "--temperature", "1.5", PROMPT]
    first, again, other = (one_object(sotto(*words, "--seed", seed))["ids"] for seed in ("1", "1", "2"))
    assert first == again != other


@pytest.mark.usefixtures("hurried")
def test_a_stop_string_ends_the_answer(swarm: Cluster, model: Path) -> None:
    words = ["run", "-m", str(model), "-b", swarm.bootstrap, "--json", PROMPT]
    text = str(one_object(sotto(*words))["text"])
    stop = text[3:5]
    assert one_object(sotto(*words, "--stop", stop))["text"] == text[: text.index(stop)]


@pytest.mark.usefixtures("hurried")
def test_submit_answers_each_line_in_order(swarm: Cluster, model: Path, tmp_path: Path) -> None:
    prompts = [{"prompt": PROMPT, "id": 7}, {"prompt": PROMPT * 80}, {"prompt": "a worker"}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in prompts))
    out = tmp_path / "out.jsonl"
    words = ["submit", str(tmp_path / "in.jsonl"), "-o", str(out), "-m", str(model), "-b", swarm.bootstrap, "-n", "5"]
    result = sotto(*words, "--json")
    assert result.exit_code == 1  # one could not be answered
    assert one_object(result) == {"answered": 2, "failed": 1, "not_reached": 0, "over_budget": 0, "output": str(out)}
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert [answer["prompt"] for answer in answers] == [line["prompt"] for line in prompts]
    assert answers[0]["id"] == 7
    assert "context" in answers[1]["error"]
    assert all(len(answers[index]["ids"]) <= 5 and "text" in answers[index] for index in (0, 2))


def test_peers_and_place(swarm: Cluster, model: Path) -> None:
    peers = one_object(sotto("peers", "-b", swarm.bootstrap, "--json"))["peers"]
    assert isinstance(peers, list)
    assert {row["peer"] for row in peers} >= {worker.peer for worker in swarm.workers}
    assert {(row["accepting"], row["relayed"]) for row in peers} == {(True, False)}
    assert all(0 <= row["load_percent"] <= 100 for row in peers)
    plan = one_object(sotto("place", str(model), "-b", swarm.bootstrap, "--workers", "3", "--json"))["hops"]
    assert isinstance(plan, list)
    assert [(hop["start"], hop["end"]) for hop in plan] == [(0, 1), (1, 2), (2, 3)]
    assert sotto("peers", "-b", swarm.bootstrap).exit_code == 0


@pytest.mark.usefixtures("hurried")
def test_place_says_whether_the_swarm_helps(swarm: Cluster, model: Path) -> None:
    """A tiny model on workers of this very machine: honestly, it does not."""
    words = ["place", str(model), "-b", swarm.bootstrap, "--workers", "3", "--kv-tokens", "64"]
    found = one_object(sotto(*words, "--json"))
    assert found["swarm_helps"] is False
    assert str(found["why"]).startswith("no: this machine alone would be ")
    parts = found["parts_ms"]
    assert isinstance(parts, dict)
    assert sum(parts.values()) == pytest.approx(found["predicted_ms_per_token"])
    assert found["lower_bound_ms"] <= found["predicted_ms_per_token"]  # type: ignore[operator]
    assert isinstance(found["one_worker"], dict)
    assert found["measured"] is None
    shown = sotto(*words)
    assert shown.exit_code == 0, shown.output
    for words_shown in ("blocks 0 to 0", "bottleneck", "one worker alone: ", "this machine alone: ", "swarm help? no"):
        assert words_shown in shown.stdout
    rate = one_object(sotto(*words, "--json", "--objective", "throughput"))
    assert (rate["objective"], rate["concurrency"]) == ("throughput", 16)
    assert rate["predicted_tokens_per_second"] > 1000 / rate["predicted_ms_per_token"]  # type: ignore[operator]


@pytest.mark.usefixtures("hurried")
def test_place_measures_what_it_predicts(swarm: Cluster, model: Path) -> None:
    words = ["place", str(model), "-b", swarm.bootstrap, "--workers", "3", "--kv-tokens", "64", "--measure"]
    measured = one_object(sotto(*words, "--json"))["measured"]
    assert isinstance(measured, dict)
    assert measured["ms_per_token"] > 0
    assert measured["predicted_ms_per_token"] > 0
    assert [hop["compute_ms"] > 0 for hop in measured["hops"]] == [True] * 3
    again = sotto(*words)
    assert again.exit_code == 0, again.output
    assert "measured: " in again.stdout
    assert "hop 2: " in again.stdout
    answer = one_object(sotto("run", "-m", str(model), "-b", swarm.bootstrap, "-n", "4", "--json", PROMPT))
    assert answer["predicted_ms_per_token"] > 0  # type: ignore[operator]
    assert answer["measured_ms_per_token"] > 0  # type: ignore[operator]


def test_keys(tmp_path: Path) -> None:
    made = one_object(sotto("key", "new", "work", "--json"))
    secret = Path(str(made["file"])).read_bytes()
    assert Path(str(made["file"])).stat().st_mode & 0o777 == 0o600
    shown = sotto("key", "show", "work")
    assert str(made["fingerprint"]) in shown.stdout
    assert "exists already" in complaint(sotto("key", "new", "work"))
    file = str(tmp_path / "work.key")
    exported = sotto("key", "export", "work", file, stdin="correct horse\ncorrect horse\n")
    assert exported.exit_code == 0, exported.output
    assert sotto("key", "import", file, "copy", "--passphrase", "correct horse").exit_code == 0
    assert one_object(sotto("key", "show", "copy", "--json"))["fingerprint"] == made["fingerprint"]
    assert "passphrase" in complaint(sotto("key", "import", file, "bad", "--passphrase", "wrong"))
    assert secret not in Path(file).read_bytes()
    for result in (shown, exported):
        assert secret.hex() not in result.output
    assert "opens every deployment under it" in exported.stderr


@pytest.mark.parametrize("tier", ["ee", "plain"])
def test_who_grants_a_sealed_model_is_told_what_its_key_opens(model: Path, tier: str) -> None:
    made = one_object(sotto("key", "new", "work", "--json"))
    guest = sotto("id").stdout.strip()
    words = ("-m", str(model), "--privacy", tier, *(["--key", "work"] if tier == "ee" else []))
    assert sotto("seal", str(model), *words[2:]).exit_code == 0
    granted = sotto("grant", guest, *words)
    assert granted.exit_code == 0, granted.output
    told = f"root key {made['fingerprint']} too: it opens every deployment under it"
    assert (told in granted.stderr) == (tier == "ee")
    token = str(one_object(sotto("grant", guest, *words, "--json"))["token"])
    leasing = sotto("run", PROMPT, "-b", "x", *words, "--capability", token, "--kv-tokens", "64")
    assert "leave --kv-tokens out" in complaint(leasing)


def test_what_is_revoked_while_nobody_answers_is_remembered(model: Path, tmp_path: Path) -> None:
    guest = sotto("id").stdout.strip()
    assert sotto("seal", str(model)).exit_code == 0
    token = read_token(str(one_object(sotto("grant", guest, "-m", str(model), "--json"))["token"]))
    nobody = f"/ip4/127.0.0.1/tcp/9/p2p/{guest}"
    assert f"{token.serial} is revoked is remembered" in complaint(sotto("revoke", token.serial, "-b", nobody))
    grants = Grants(tmp_path / "data" / "sotto" / "client" / "grants")
    assert grants.revoked(token.capability.deployment, 0) == (token.capability.serial,)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["seal", "/nowhere/model", "-o", "out"], "/nowhere/model"),
        (["run", "hello"], "sotto sim up"),
        (["run", "hello", "-b", "localhost:4001"], "/p2p/"),
        (["run", "hello", "-b", "x", "--privacy", "magic"], "plain, ee"),
        (["run", "hello", "-b", "x", "--dtype", "int1"], "float32"),
        (["run", "hello", "-b", "x", "--top-p", "1.5"], "top_p"),
        (["run", "hello", "-b", "x", "--metrics", "here"], "HOST:PORT"),
        (["run", "hello", "-b", "x", "--key", "none"], "sotto key new"),
        (["run", "hello", "-b", "x", "--privacy", "plain", "--key", "work"], "plain uses no key"),
        (["run", "hello", "-b", "x", "--expect-tokens", "9"], "leave it out, or use --strategy auto,lossy"),
        (["run", "hello", "-b", "x", "--draft", "/nowhere/draft"], "/nowhere/draft: no such folder"),
        (["run", "hello", "-b", "x", "-n", "100000"], "exceed the model's context"),
        (["run", "hello", "-b", "x", "--stop", ""], "at least one character"),
        (["submit", "/nowhere.jsonl", "-o", "out"], "/nowhere.jsonl"),
        (["peers", "-b", "/ip4/127.0.0.1/tcp/9"], "/p2p/"),
        (["place", "-b", "x", "--objective", "speed"], "latency, throughput"),
        (["key", "show", "nobody"], "sotto key new nobody"),
        (["key", "new", "../../etc"], "no key name"),
        (["sim", "status"], "sotto sim up"),
        (["sim", "down"], "sotto sim up"),
        (["worker", "--memory", "lots"], "512MiB"),
        (["worker", "--memory", "1GiB", "--kv-memory", "2GiB"], "--kv-memory"),
        (["worker", "--device", "abacus"], "cpu or cuda"),
        (["worker", "--schedule", "noon"], "22:00-07:00"),
        (["worker", "--quota", "colour=blue"], "peer-bandwidth"),
        (["worker", "pause"], "no worker runs"),
        (["worker", "pause", "--for", "ever"], "30m"),
        (["grant", "bob"], "'sotto run' does it, or give the --dtype"),
        (["revoke", "0" * 32], "give the whole token"),
        (["run", "hello", "-b", "x", "--capability", "rubbish"], "copy the whole token"),
        (["worker", "--listen", "4001"], "/ip4/"),
        (["worker", "--announce", "/ip4/0.0.0.0/tcp/4517"], "nobody can dial"),
        (["worker", "--announce", f"/dns4/{'x' * 128}/tcp/4517"], "at most 128"),
        (["worker", "--announce", "/dns4/worker.example/tcp/4517"], "announce its IP address"),
        (["worker", "--log-level", "verbose"], "info, warning or error"),
        (["worker", *["--announce", "/ip4/192.0.2.7/tcp/4517"] * 5], "give the best ones"),
        (["worker", "-b", "/ip4/192.0.2.7/tcp/4517"], "/p2p/"),
        (["invite"], "no worker runs"),
        (["invite", "-b", "/ip4/192.0.2.7/tcp/4517"], "/p2p/"),
        (["join", "sotto1AGyTxAiI"], "copy it again"),
        (["peers", "-b", "sotto1AGyTxAiI"], "copy it again"),
        (["run", "hello", "-b", "sotto9later"], "update sotto"),
        (["run", "\udcff", "-b", "x"], "not valid Unicode"),
        (["chat", "--system", "\udcff", "-b", "x"], "not valid Unicode"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_error_is_one_line_that_says_what_to_do(words: list[str], says: str) -> None:
    assert says in complaint(sotto(*words))
    if words[0] not in ("worker", "join"):
        failed = sotto(*words, "--json")
        assert failed.exit_code == 1
        assert says in str(one_object(failed)["error"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["history", "-w", "model=a", "export", "x.csv"], "--where counts behind the word"),
        (["history", "--data-dir", "d", "--last", "3", "import", "x.csv"], "history import ... --last ..."),
        (["worker", "--data-dir", "d", "status"], "write 'sotto worker status ... --data-dir ...'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_option_before_a_subcommand_is_not_lost_in_silence(words: list[str], says: str) -> None:
    assert says in complaint(sotto(*words))


def test_a_simulated_network_is_looked_for_only_while_it_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SOTTO_SWARM", raising=False)
    folder, started = default_folder(), psutil.Process().create_time()
    folder.mkdir(parents=True)
    here = WorkerProcess(
        pid=os.getpid(),
        started=started,
        name="a",
        folder="a",
        command=(),
        peer="12D3KooWHere",
        addrs=("/ip4/127.0.0.1",),
    )
    Cluster(folder, (here,)).save()
    assert bootstrap_addrs(None) == (here.bootstrap,)
    Cluster(folder, (replace(here, started=started - 1),)).save()  # before the machine was started again
    assert bootstrap_addrs(None) == ()


def test_a_bad_line_of_prompts_is_named_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    assert "line 2" in complaint(sotto("submit", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out")))


def test_a_truncated_checkpoint_is_named(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "model.safetensors" in complaint(sotto("seal", str(folder), "-o", str(tmp_path / "s")))


def test_an_unsupported_family_is_named_with_the_supported_ones(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"})
    )
    said = complaint(sotto("seal", str(folder), "-o", str(tmp_path / "s"))).lower()
    assert "gpt2" in said
    assert all(family in said for family in ("llama", "mistral", "qwen2", "qwen3"))


def test_sealing_with_the_wrong_key(model: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert sotto("key", "new", name).exit_code == 0
    words = ["seal", str(model), "-o", str(tmp_path / "s")]
    sealed = one_object(sotto(*words, "--key", "one", "--json"))
    assert (sealed["blocks"], sealed["tier"]) == (3, "ee")
    assert "wrong key" in complaint(sotto(*words, "--key", "two"))


def test_a_worker_whose_port_is_taken(swarm: Cluster, tmp_path: Path) -> None:
    taken = swarm.workers[0].addrs[0]
    command = [sys.executable, "-m", "sotto", "worker", "--listen", taken, "--metrics", "off"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ})
    assert done.returncode == 1
    assert done.stdout == ""
    assert taken.rsplit("/", 1)[1] in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--strategy", "speed=11"], "no part of a strategy"),
        (["--strategy", "wire=int3"], "wire must be one of float32, bfloat16, int8"),
        (["--strategy", "weights=int4"], "leave it out"),
        (["--dtype", "int4"], "unknown --dtype 'int4': use one of float32, bfloat16, int8"),
        (["--dtype", "float16"], "unknown --dtype 'float16': use one of float32, bfloat16, int8"),
        (["--strategy", "speculation=draft", "-m", "{model}"], "name one with --draft PATH"),
        (["--strategy", "weights=int8", "--dtype", "bfloat16"], "contradict each other"),
        (["--exact", "--dtype", "int8"], "--exact is an answer as in float32"),
        (["--exact", "--strategy", "weights=bfloat16"], "weights=bfloat16 loses precision"),
    ],
)
def test_a_strategy_that_cannot_be_meant_is_refused_before_anything_starts(
    words: list[str], why: str, model: Path, tmp_path: Path
) -> None:
    words = [word.format(model=model) for word in words]
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n')
    for command in (["run", PROMPT], ["submit", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl")]):
        result = sotto(*command, "-b", "/ip4/127.0.0.1/tcp/1", *words)
        assert why in complaint(result)


def test_run_takes_a_strategy_and_refuses_what_cannot_be_had(swarm: Cluster, model: Path) -> None:
    words = ["run", "-m", str(model), "-b", swarm.bootstrap, "-n", "12", PROMPT, "--json"]
    plain = one_object(sotto(*words))["ids"]
    assert one_object(sotto(*words, "--strategy", "speculation=lookup,prefill_chunk=2"))["ids"] == plain
    error = str(one_object(sotto(*words, "--strategy", "weights=int4"))["error"])
    assert "weights=int4 is not supported by this version" in error
    error = str(one_object(sotto(*words, "--exact", "--strategy", "wire=int8"))["error"])
    assert "wire=int8 loses precision" in error
    assert one_object(sotto(*words, "--exact"))["ids"] == plain


def test_run_shows_where_the_time_went(swarm: Cluster, model: Path) -> None:
    words = ["run", "-m", str(model), "-b", swarm.bootstrap, "-n", "12", "--workers", "3", PROMPT, "--trace"]
    traced = one_object(sotto(*words, "--json"))
    trace, hops = traced["trace"], traced["trace"]["hops"]  # type: ignore[index]
    assert trace["decode_steps"] == len(traced["ids"]) - 1  # type: ignore[arg-type,index]
    assert [(hop["start"], hop["end"], hop["address"]) for hop in hops] == [
        (0, 1, "direct"),
        (1, 2, "direct"),
        (2, 3, "direct"),
    ]
    parts = [hop[part]["median_us"] for hop in hops for part in ("compute", "software")]
    assert all(part > 0 for part in parts)
    # Of each step a part; medians of several parts may come from different steps, and need not add up to less.
    assert max(parts) < trace["step"]["median_us"]  # type: ignore[index]
    assert all(0 < hop["idle_share"] < 1 and hop["prompt_us"] > 0 for hop in hops)
    shown = sotto(*words)
    assert "direct" in shown.stderr
    assert "this client" in shown.stderr
    assert "trace" not in one_object(sotto(*words[:-1], "--json"))
