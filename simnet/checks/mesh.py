"""`sotto sim check mesh`: a mesh that holds among strangers, tried with real processes.

Each check states a claim in its first line. Figures are what was counted and measured, for people to judge.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import trio

from client.asking import ANSWER_S, ask
from client.errors import HopRefused
from models.checkpoint import Checkpoint
from node.bringing import DeployOptions
from node.client import Client
from node.keys import default_key
from node.model import Ask, DeployedModel
from node.p2p.mesh import Mesh, MeshConfig, open_mesh
from node.sealing import seal_into
from node.worker_socket import ask_worker
from protocol.adverts import TOPIC
from protocol.channel import Channel
from protocol.errors import SottoError, TransportError
from protocol.ids import DeploymentId, SessionId, peer_id_of
from protocol.invites import parse_invite
from protocol.membership import SwarmKey
from protocol.messages import (
    CONTROL,
    LINK,
    SESSION,
    SHARD,
    Attach,
    Attached,
    Message,
    Ping,
    RefusalReason,
    ReleaseSpan,
    SessionFailed,
    SpanReleased,
)
from protocol.strategy import Strategy
from simnet.checks import hostile
from simnet.checks.core import Check, CheckFailed, Figures, Scene, require
from simnet.checks.daemons import Daemon, command, daemon, with_client, with_observer
from simnet.checks.upload_trials import run_trial
from simnet.random_model import RandomModel

PROMPT = "The interpreter"
SEEN_S = 20.0
KILLS_PER_TRIAL = 4
P99_RATIO_MAX = 2.0
UNREAD_PINGS_MIN = 10_000
REQUEST_TOKENS = 16
UPLOADED = RandomModel(256, 2048, 6, 8, 4)  # six shards of four pieces, or seven in float32


def join_by_invite(scene: Scene) -> Figures:
    """A worker joins a private swarm by one command, and both serve a member's prompt."""
    with daemon(scene.folder / "a", "worker", "--private") as first:
        invite = command("invite", "--data-dir", str(first.folder), as_json=False)
        started = time.monotonic()
        with daemon(scene.folder / "b", "join", invite) as second:

            async def member(client: Client) -> tuple[float, int]:
                await _both_seen(client, first, second)
                seen_s = time.monotonic() - started
                ready = await _deployed(client, scene.model, workers=2)
                return seen_s, len((await ready.generate(PROMPT, Ask(8, ignore_eos=True))).ids)

            seen_s, tokens = with_client(scene.folder / "data", invite, member)
    require(tokens == 8, f"{tokens} tokens came instead of 8")
    return {"joined_and_seen_s": round(seen_s, 2), "invite_characters": len(invite), "tokens_through_both": tokens}


def private_swarm_is_closed(scene: Scene) -> Figures:
    """A stranger sees no worker of a private swarm, reads no advert, and is refused on each protocol."""
    with daemon(scene.folder / "a", "worker", "--private") as first:
        invite = command("invite", "--data-dir", str(first.folder), as_json=False)
        key = SwarmKey(parse_invite(invite).secret)

        async def look(client: Client) -> int:
            await trio.sleep(5)
            return len(client.watch.view.members)

        strangers_see = with_observer(scene.folder / "stranger", first.address, look)
        members_see = with_observer(scene.folder / "member", invite, look)
        refused, heard = trio.run(_as_stranger, first, key)
    require(strangers_see == 0, f"a stranger sees {strangers_see} workers")
    require(members_see == 1, f"a member sees {members_see} workers instead of 1")
    require(heard["opened"] == 0, "a stranger could read an advert")
    require(heard["sealed"] > 0, "no sealed advert was heard: there was nothing to hide")
    require(all(refused.values()), f"a stranger was served: {refused}")
    return {"workers_seen_by_a_stranger": strangers_see, "refused": refused, "sealed_adverts_heard": heard["sealed"]}


def uploads_resume(scene: Scene) -> Figures:
    """An upload whose worker or client is killed at random goes on, and nothing that was verified is sent again."""
    model = UPLOADED.write(scene.folder / "model", scene.model, torch.float32)
    kills, midway, again, sent, pieces = 0, 0, 0, 0, 0
    while kills < scene.rounds:
        count = min(KILLS_PER_TRIAL, scene.rounds - kills)
        seed = scene.random.randrange(1 << 30)
        report = run_trial(scene.folder / f"trial-{seed}", model, seed, count)
        kills, pieces = kills + count, pieces + report.pieces
        midway += report.kills_midway
        again += report.sent_again
        sent += sum(attempt.sent for attempt in report.attempts)
        scene.say(f"{kills} of {scene.rounds} kills, {midway} of them midway, {again} pieces sent again")
        require(report.passed, f"seed {seed}: {report}")
    require(midway > scene.rounds // 3, f"only {midway} of {kills} kills came in the middle of an upload")
    return {"kills": kills, "kills_midway": midway, "verified_pieces_sent_again": again, "pieces_sent": sent,
            "pieces_of_all_models": pieces}  # fmt: skip


def restart_serves_from_disk(scene: Scene) -> Figures:
    """A worker that is stopped and started again serves what it held, without an upload."""
    folder, data = scene.folder / "a", scene.folder / "data"

    async def use(client: Client) -> tuple[tuple[int, ...], int]:
        sent = 0

        def count(progress: Any) -> None:
            nonlocal sent
            sent = max(sent, progress.present_bytes)

        ready = await _deployed(client, scene.model, on_upload=count)
        return (await ready.generate(PROMPT, Ask(8, ignore_eos=True))).ids, sent

    with daemon(folder, "worker") as first:
        ids, sent = with_client(data, first.address, use)
    started = time.monotonic()
    with daemon(folder, "worker") as second:
        ids_again, sent_again = with_client(data, second.address, use)
    require(sent > 0, "nothing was uploaded the first time")
    require(sent_again == 0, f"{sent_again} bytes were uploaded to a worker that had them")
    require(ids == ids_again, "the worker that came back answers otherwise")
    return {"uploaded_bytes": sent, "uploaded_again_bytes": sent_again,
            "answer_after_restart_s": round(time.monotonic() - started, 2)}  # fmt: skip


def quotas_refuse(scene: Scene) -> Figures:
    """Requests, sessions, disk and memory beyond an owner's quotas are refused with the reason, and others go on."""
    # A plan goes by weights, and passes over a worker without disk for these; shards are longer, which it cannot know.
    quotas = ["--quota=peer-requests=5", "--quota=peer-sessions=3", f"--disk={_shard_bytes(scene) - 1}"]
    with daemon(scene.folder / "a", "worker", *quotas) as worker:
        figures = {
            "rate": trio.run(_requests_refused, worker),
            "sessions": trio.run(_sessions_refused, worker),
            "disk": _deploying_refused(scene, worker, RefusalReason.DISK),
        }
    with daemon(scene.folder / "b", "worker", "--quota=owner-memory-share=0.00001") as worker:
        figures["memory"] = _deploying_refused(scene, worker, RefusalReason.MEMORY)
    return {"refused": figures}


def pause_drains(scene: Scene) -> Figures:
    """A paused worker tells the swarm at once, finishes what is open, refuses what is new, and comes back."""
    with daemon(scene.folder / "a", "worker") as worker:

        async def use(client: Client) -> Figures:
            ready = await _deployed(client, scene.model)
            paused_at: list[float] = []

            def pause(_: str) -> None:
                if not paused_at:
                    ask_worker(worker.folder, {"do": "pause"})
                    paused_at.append(trio.current_time())

            result = await ready.generate(PROMPT, Ask(200, ignore_eos=True), pause)
            drained = len(result.ids)
            view = client.watch.wait_for(lambda view: not view.members[worker.peer].advert.accepting)
            with trio.fail_after(SEEN_S):
                await view
            told_s = trio.current_time() - paused_at[0]
            reason = await _refusal_of(ready)
            sessions = await _sessions_left(worker)
            ask_worker(worker.folder, {"do": "resume"})
            with trio.fail_after(SEEN_S):
                await client.watch.wait_for(lambda view: view.members[worker.peer].advert.accepting)
            again = len((await ready.generate(PROMPT, Ask(8, ignore_eos=True))).ids)
            return {"tokens_of_the_open_request": drained, "told_within_s": round(told_s, 2), "new_work": reason,
                    "sessions_after_draining": sessions, "tokens_after_resume": again}  # fmt: skip

        figures = with_client(scene.folder / "data", worker.address, use)
    expected = {"tokens_of_the_open_request": 200, "new_work": "paused", "sessions_after_draining": 0,
                "tokens_after_resume": 8}  # fmt: skip
    require(expected.items() <= figures.items(), f"expected {expected}", figures)
    return figures


def hostile_peer_is_borne(scene: Scene) -> Figures:
    """400 silent connections, and malformed frames as often as they are let in, at most double a request's p99."""
    plan = hostile.Plan(seed=scene.random.randrange(99))
    with daemon(scene.folder / "a", "worker") as worker:

        async def use(client: Client) -> dict[str, Any]:
            ready = await _deployed(client, scene.model)
            ask = Ask(REQUEST_TOKENS, ignore_eos=True, strategy=Strategy())
            return await hostile.measure(worker.address, plan, partial(ready.generate, PROMPT, ask))

        figures = with_client(scene.folder / "data", worker.address, use)
    before, during = figures["before"], figures["during"]
    ratios = {kind: round(during[kind]["p99"] / before[kind]["p99"], 2) for kind in before}
    failed = {kind: sum(figures[when][kind]["failed"] for when in ("before", "during", "after")) for kind in before}
    whole: Figures = {"p99_ratio": ratios, "honest_requests_failed": failed, **figures}
    require(not any(failed.values()), f"honest requests failed: {failed}", whole)
    made = figures["attack"]
    least = {"silent": plan.silent, "malformed": plan.malformed, "unread pings": UNREAD_PINGS_MIN}
    weak = {what: made.get(what, 0) for what, count in least.items() if made.get(what, 0) < count}
    require(not weak, f"the attacker found no time for an attack: {weak}", whole)
    judged = {kind: ratios[kind] for kind in ("request", "ping", "fresh")}  # a newcomer waits its turn (THREATS.md)
    require(all(ratio <= P99_RATIO_MAX for ratio in judged.values()), f"p99 grew by {judged}", whole)
    return whole


CHECKS: Mapping[str, Check] = {
    check.__name__: check
    for check in (
        join_by_invite,
        private_swarm_is_closed,
        uploads_resume,
        restart_serves_from_disk,
        quotas_refuse,
        pause_drains,
        hostile_peer_is_borne,
    )
}


async def _both_seen(client: Client, *workers: Daemon) -> None:
    with trio.move_on_after(SEEN_S) as late:
        await client.watch.wait_for(lambda view: {worker.peer for worker in workers} <= set(view.members))
    if late.cancelled_caught:
        raise CheckFailed(f"after {SEEN_S:g} s the swarm is seen as {sorted(client.watch.view.members)}")


async def _deployed(client: Client, model: Path, workers: int = 1, on_upload: Any = lambda _: None) -> DeployedModel:
    options = DeployOptions(hops_min=workers, on_upload=on_upload)
    return await client.bring(Checkpoint.open(model), "float32", default_key(client.options.data_dir), options)


async def _as_stranger(worker: Daemon, key: SwarmKey) -> tuple[dict[str, bool], dict[str, int]]:
    """Which protocols refuse a stranger; and what it hears on the topic's name, which neighbours tell."""
    heard = {"sealed": 0, "opened": 0}
    async with open_mesh(MeshConfig(random.randbytes(32), ())) as mesh:
        await mesh.connect(worker.address)
        topic = await mesh.subscribe(key.topic(TOPIC), lambda _: True)
        refused = {protocol: await _is_refused(mesh, worker, protocol) for protocol in (CONTROL, SHARD, SESSION, LINK)}
        with trio.move_on_after(SEEN_S):
            message = await topic.receive()
            heard["sealed"] += 1
            heard["opened"] += worker.addrs[0].encode() in message.data
    return refused, heard


async def _is_refused(mesh: Mesh, worker: Daemon, protocol: str) -> bool:
    try:
        with trio.fail_after(SEEN_S):
            stream = await mesh.open(worker.peer, worker.addrs, protocol)
            await stream.send(bytes(64))
            return not await stream.receive(1)
    except TransportError:
        return True


async def _requests_refused(worker: Daemon) -> int:
    """How many of many requests are refused for coming too fast; one that comes later is served."""
    refused = 0
    async with open_mesh(MeshConfig(random.randbytes(32), ())) as mesh:
        channel = Channel(await mesh.open(worker.peer, worker.addrs, CONTROL), CONTROL)
        request = ReleaseSpan(DeploymentId(bytes(16)), False, b"")
        for _ in range(60):
            refused += await _reason(channel, request) == RefusalReason.RATE
        await trio.sleep(2)
        require(await _reason(channel, request) != RefusalReason.RATE, "a peer that waited was refused all the same")
    require(0 < refused < 60, f"{refused} of 60 requests were refused: {worker.peer}")
    return refused


async def _reason(channel: Channel, request: Message) -> str:
    try:
        await ask(channel.remote, channel, request, SpanReleased, ANSWER_S)
    except HopRefused as refused:
        return refused.reason
    return ""


async def _sessions_refused(worker: Daemon) -> int:
    """How many of ten sessions of one peer are refused."""
    async with open_mesh(MeshConfig(random.randbytes(32), ())) as mesh:
        channel = Channel(await mesh.open(worker.peer, worker.addrs, SESSION), SESSION)
        for number in range(10):
            await channel.send(Attach(SessionId(number.to_bytes(16, "big"))))
        answers = [await channel.receive() for _ in range(10)]
        kinds = [answer[0] for answer in answers if answer is not None]
        pong = Channel(await mesh.open(worker.peer, worker.addrs, CONTROL), CONTROL)
        await pong.call(Ping(bytes(8)))
    refused = [kind for kind in kinds if isinstance(kind, SessionFailed) and kind.reason == RefusalReason.SESSIONS]
    require(sum(isinstance(kind, Attached) for kind in kinds) == 3, f"expected 3 sessions of 10: {kinds}")
    require(len(refused) == 7, f"expected 7 refusals: {kinds}")
    return len(refused)


def _shard_bytes(scene: Scene) -> int:
    """What the shards of the model take on a disk."""
    checkpoint, key, owner = Checkpoint.open(scene.model), default_key(scene.folder / "sized"), peer_id_of(bytes(32))
    folder = seal_into(scene.folder / "sized" / "model", checkpoint, "float32", key, owner)
    entries = map(folder.entry, range(folder.info.num_blocks))
    return sum(entry.shard_bytes for entry in entries if entry is not None)


def _deploying_refused(scene: Scene, worker: Daemon, reason: RefusalReason) -> str:
    async def use(client: Client) -> str:
        try:
            await _deployed(client, scene.model)
        except HopRefused as refused:
            return refused.reason
        return ""

    said = with_client(scene.folder / f"data-{reason}", worker.address, use)
    require(said == reason, f"expected the reason {reason!r}, got {said!r}")
    return said


async def _sessions_left(worker: Daemon) -> int:
    """How many sessions the worker has once the last one had a moment to end."""
    sessions = -1
    with trio.move_on_after(SEEN_S):
        while (sessions := int(ask_worker(worker.folder, {"do": "status"})["sessions"])) > 0:
            await trio.sleep(0.1)
    return sessions


async def _refusal_of(ready: DeployedModel) -> str:
    try:
        await ready.generate(PROMPT, Ask(1))
    except HopRefused as refused:
        return refused.reason
    except SottoError as error:
        return str(error)
    return "served"
