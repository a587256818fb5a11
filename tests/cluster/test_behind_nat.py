"""Real daemons in homes behind real NAT: they find out, are reached through a relay, and are public once a port is
forwarded. Skipped where this process may not build network namespaces.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.home_networks import CORE_IP, HOST_IP, forward, homes, inside, permitted, router_ip
from tests.helpers.tiny_models import make_checkpoint

READY_S = 60.0
PORT = 4517

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not permitted(), reason="needs root, ip and nf_tables"),
]
SOTTO = (sys.executable, "-m", "sotto")


@contextmanager
def worker(namespace: str, folder: Path, *words: str) -> Iterator[Path]:
    """A worker in a namespace; the file in which it states itself."""
    command = [*SOTTO, "worker", "--data-dir", str(folder), "--memory", "600MiB", "--kv-memory", "150MiB"]
    command += ["--threads", "1", "--metrics", "off", *words]
    with folder.with_suffix(".log").open("wb") as log:
        child = subprocess.Popen(inside(namespace, *command), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        yield folder / "worker.json"
    finally:
        child.terminate()
        child.wait(20)


def stated(file: Path, reach: str | None = None) -> dict[str, Any]:
    """What a worker states, once it says that it is reached in this way."""
    deadline, state = time.monotonic() + READY_S, {}
    while time.monotonic() < deadline:
        if file.exists() and (state := json.loads(file.read_text())) and reach in (None, state["reach"]):
            return state
        time.sleep(0.1)
    raise AssertionError(f"never {reach}, the last was {state}")


def sotto(namespace: str, *words: str) -> dict[str, Any]:
    done = subprocess.run(inside(namespace, *SOTTO, *words, "--json"), capture_output=True, text=True, timeout=100)
    assert done.stdout, done.stderr
    value = json.loads(done.stdout)
    assert isinstance(value, dict)
    return value


def test_homes_behind_nat(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model")
    with ExitStack() as stack:
        core, routers, hosts = stack.enter_context(homes(3))
        open_file = stack.enter_context(worker(core, tmp_path / "open", "--listen", f"/ip4/{CORE_IP}/tcp/{PORT}"))
        relay = f"{stated(open_file)['addrs'][0]}/p2p/{stated(open_file)['peer']}"
        hidden = [
            stack.enter_context(worker(host, tmp_path / f"home{index}", "--bootstrap", relay, "--no-upnp"))
            for index, host in enumerate(hosts[:2])
        ]
        for file in hidden:
            addrs = stated(file, "relayed")["addrs"]
            assert f"/ip4/{HOST_IP}/tcp/{PORT}" in addrs, "neighbours in the same home may dial it"
            assert addrs[-1] == f"{relay}/p2p-circuit"

        client = ("-b", relay, "--data-dir", str(tmp_path / "client"))
        peers = {peer["peer"]: peer for peer in sotto(hosts[2], "peers", *client)["peers"]}
        assert set(peers) == {stated(file)["peer"] for file in (open_file, *hidden)}
        run = ("run", "-m", str(model), "--workers", "3", "--max-new-tokens", "8", "the quiet brook")
        first = sotto(hosts[2], *run, *client)
        assert len(first["ids"]) == 8

        checks = {each["check"]: each for each in sotto(hosts[2], "doctor", *client)["checks"]}
        assert checks["reachable"]["level"] == "warn"
        said = f"forward TCP port {PORT} of your router ({router_ip(2)} from outside) to {HOST_IP} port {PORT}"
        assert said in checks["reachable"]["remedy"]

        forward(routers[2], PORT)
        checks = {each["check"]: each for each in sotto(hosts[2], "doctor", *client)["checks"]}
        assert checks["reachable"]["level"] == "ok"
        assert f"/ip4/{router_ip(2)}/tcp/{PORT}" in checks["reachable"]["text"]
        public = stack.enter_context(worker(hosts[2], tmp_path / "home2", "--bootstrap", relay, "--no-upnp"))
        assert stated(public, "public")["addrs"][0] == f"/ip4/{router_ip(2)}/tcp/{PORT}"
