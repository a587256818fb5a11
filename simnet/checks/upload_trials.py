"""Uploads that are killed, with real processes: each goes on where it was, and nothing that was written is sent again.

A trial has one worker and one client (upload_client.py). SIGKILL goes to one of them when a number of pieces drawn from
the seed has been sent; both are started again; and so on. Before each start the worker's files are read against the
piece lists, as a judge of its own: what is whole there must not be sent by the client that follows.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from models.checkpoint import Checkpoint
from node.identity import load_identity
from node.sealing import seal_into, sealed_place
from node.store import read_piece_list
from protocol.ids import ShardDigest
from protocol.limits import PIECE_BYTES
from protocol.pieces import PieceList
from simnet import cluster
from simnet.cluster import Cluster, WorkerProcess, WorkerSpec

POLL_S = 0.002
END_S = 120.0
DTYPE = "float32"

Piece = tuple[ShardDigest, int]


@dataclass(frozen=True, slots=True)
class Attempt:
    """One run of the client. `victim`: worker, client, or "" when it ran to its end."""

    victim: str
    before: int  # pieces that were on the worker's disk when it began
    sent: int
    sent_again: int  # of those that were on disk


@dataclass(frozen=True, slots=True)
class TrialReport:
    attempts: tuple[Attempt, ...]
    pieces: int  # of the whole model
    whole: bool  # every piece is on the worker's disk in the end
    sent_after_restart: int  # SIGKILL to the worker when all was there: what a client sent to the one that came back

    @property
    def sent_again(self) -> int:
        return sum(attempt.sent_again for attempt in self.attempts)

    @property
    def kills_midway(self) -> int:
        """Kills after which pieces were still missing."""
        return sum(attempt.before < self.pieces for attempt in self.attempts[1:])

    @property
    def passed(self) -> bool:
        return self.whole and not self.sent_again and not self.sent_after_restart


def run_trial(folder: Path, model: Path, seed: int, kills: int) -> TrialReport:
    """Bring `model`, in the plain tier, to a worker through `kills` kills. `folder` stays for whoever wants to look.

    Raises InputError when a worker does not start, RuntimeError when a client fails for another reason than a kill.
    """
    chance = random.Random(f"{seed}/upload")
    attempts: list[Attempt] = []
    with _trial(folder, model) as trial:
        for kills_left in range(kills, 0, -1):
            missing = trial.pieces - len(trial.on_disk())
            share = 2 * missing // (kills_left + 1)  # on average half of it is sent, so the last kill finds some left
            attempts.append(trial.attempt(chance.choice(("worker", "client")), chance.randint(1, max(1, share))))
        attempts.append(trial.attempt())
        whole = len(trial.on_disk()) == trial.pieces
        trial.kill_worker()
        return TrialReport(tuple(attempts), trial.pieces, whole, trial.attempt().sent)


@dataclass(slots=True)
class _Trial:
    """The processes of a trial, and the files by which it is judged."""

    folder: Path
    model: Path
    lists: dict[ShardDigest, PieceList]
    net: Cluster

    @property
    def worker(self) -> WorkerProcess:
        return self.net.workers[0]

    @property
    def pieces(self) -> int:
        return sum(pieces.count for pieces in self.lists.values())

    def attempt(self, victim: str = "", after: int = 0) -> Attempt:
        """Start what is down, and kill `victim` when the client has sent `after` pieces; "" lets it end."""
        if not self.worker.alive:
            self.net = cluster.restart(self.net, self.worker.name)
        before, log = self.on_disk(), self.folder / "sent"
        log.unlink(missing_ok=True)
        child = self._client(log)
        try:
            if victim:
                _wait_until(lambda: child.poll() is not None or len(_sent(log)) >= after)
                child.kill() if victim == "client" else self.kill_worker()
            child.wait(END_S)
        finally:
            child.kill()
            child.wait()
        if not victim and child.returncode:
            raise RuntimeError(f"the client failed: {(self.folder / 'client.log').read_text()[-2000:]}")
        sent = _sent(log)
        return Attempt(victim, len(before), len(sent), sum(piece in before for piece in sent))

    def on_disk(self) -> set[Piece]:
        """The pieces that are whole on the worker's disk."""
        home = Path(self.worker.folder)
        found: set[Piece] = set()
        for digest, pieces in self.lists.items():
            for path in (home / "shards" / f"{digest.hex()}.safetensors", home / "partial" / digest.hex()):
                found |= {(digest, index) for index in _whole_pieces(path, pieces)}
        return found

    def kill_worker(self) -> None:
        os.kill(self.worker.pid, signal.SIGKILL)
        _wait_until(lambda: not self.worker.alive)

    def _client(self, log: Path) -> subprocess.Popen[bytes]:
        arguments = [str(self.folder / "data"), self.worker.bootstrap, str(self.model), str(log)]
        with (self.folder / "client.log").open("wb") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "simnet.checks.upload_client", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )


@contextmanager
def _trial(folder: Path, model: Path) -> Iterator[_Trial]:
    """The model sealed and one worker up, which is stopped in the end, whichever it is then."""
    checkpoint = Checkpoint.open(str(model))
    place = sealed_place(folder / "data" / "sealed", checkpoint, DTYPE, None)
    owner = load_identity(folder / "data" / "client").peer
    sealed = seal_into(place, checkpoint, DTYPE, None, owner)
    lists: dict[ShardDigest, PieceList] = {}
    for index in range(checkpoint.config.num_blocks):
        entry = sealed.entry(index)
        pieces = entry and read_piece_list(sealed.shard(entry.digest), entry.digest)
        if pieces:
            lists[pieces.digest] = pieces
    spec = WorkerSpec(memory="1GiB", kv_memory="128MiB")
    with cluster.running(folder / "workers", [spec]) as net:
        yield _Trial(folder, model, lists, net)


def _whole_pieces(path: Path, pieces: PieceList) -> Iterator[int]:
    if path.exists():
        with path.open("rb") as file:
            yield from (index for index in range(pieces.count) if pieces.holds(index, file.read(PIECE_BYTES)))


def _sent(log: Path) -> list[Piece]:
    """What the client wrote down."""
    if not log.exists():
        return []
    lines = [line.split() for line in log.read_text().splitlines()]
    return [(ShardDigest(bytes.fromhex(digest)), int(index)) for digest, index in lines]


def _wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + END_S
    while not true() and time.monotonic() < deadline:
        time.sleep(POLL_S)
