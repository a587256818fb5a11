"""How an owner talks to a running worker: `worker.sock` in its data folder, mode 0600, one JSON object per line.

  {"do": "pause", "for_s": 3600}   {"do": "resume"}   {"do": "status"}

Each is answered with the worker's status, or with {"error": "..."}. Only the user who runs the worker can open the
socket. What comes is parsed defensively all the same: a line is bounded, and nothing but these three is done.
"""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from protocol.errors import InputError
from protocol.ports import TaskStatus

log = logging.getLogger("sotto.worker")
LINE_BYTES_MAX = 4096
SILENCE_S = 30.0
CLIENTS_MAX = 8
PAUSE_S_MAX = 366 * 86_400.0
ANSWER_S = 5.0
CROWDED_S = 0.1  # before accepting again when the system has no room for another connection


@dataclass(frozen=True, slots=True)
class Controls:
    """What the socket can do to a worker. `pause(for_s)`: None is until `resume`."""

    pause: Callable[[float | None], None]
    resume: Callable[[], None]
    status: Callable[[], dict[str, Any]]


async def serve_controls(
    folder: Path, controls: Controls, *, task_status: TaskStatus = trio.TASK_STATUS_IGNORED
) -> None:
    """Serve until cancelled. A folder whose name is too long for a socket costs the controls, not the worker."""
    path = folder / "worker.sock"
    listener = _listener(path)
    task_status.started()
    if listener is None:
        return
    limiter = trio.CapacityLimiter(CLIENTS_MAX)
    try:
        async with trio.open_nursery() as nursery:
            while True:
                try:
                    client, _ = await listener.accept()
                except OSError as error:
                    log.debug("the control socket accepts nobody", extra={"reason": str(error)})
                    await trio.sleep(CROWDED_S)
                    continue
                nursery.start_soon(_serve, trio.SocketStream(client), controls, limiter)
    finally:
        listener.close()
        path.unlink(missing_ok=True)


def _listener(path: Path) -> trio.socket.SocketType | None:
    path.unlink(missing_ok=True)  # of a process that was killed: this one holds the folder's lock
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        listener.bind(str(path))
        listener.listen(CLIENTS_MAX)
    except OSError as error:
        listener.close()
        log.warning("no control socket", extra={"path": str(path), "reason": str(error)})
        return None
    finally:
        os.umask(before)
    return trio.socket.from_stdlib_socket(listener)


async def _serve(stream: trio.SocketStream, controls: Controls, limiter: trio.CapacityLimiter) -> None:
    async with stream, limiter:
        try:
            while (line := await _line(stream)) is not None:
                await stream.send_all(json.dumps(_answer(line, controls)).encode() + b"\n")
        except (trio.BrokenResourceError, trio.TooSlowError):
            return


async def _line(stream: trio.SocketStream) -> bytes | None:
    """The next line; None at the end, or when it is too long."""
    line = b""
    with trio.fail_after(SILENCE_S):
        while not line.endswith(b"\n"):
            data = await stream.receive_some(LINE_BYTES_MAX)
            if not data or len(line) + len(data) > LINE_BYTES_MAX:
                return None
            line += data
    return line


def _answer(line: bytes, controls: Controls) -> dict[str, Any]:
    try:
        request = json.loads(line)
    except (ValueError, RecursionError):
        return {"error": "not one JSON object on one line"}
    match request:
        case {"do": "pause", "for_s": int() | float() as for_s}:
            if not 0 < for_s <= PAUSE_S_MAX:
                return {"error": "for_s is a number of seconds, at most a year"}
            controls.pause(for_s)
        case {"do": "pause"} if "for_s" not in request:
            controls.pause(None)
        case {"do": "resume"}:
            controls.resume()
        case {"do": "status"}:
            pass
        case _:
            return {"error": "do is one of pause, resume, status"}
    return controls.status()


def ask_worker(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    """The running worker's answer to `request`. Blocks for ANSWER_S at most. Raises InputError."""
    path = folder / "worker.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(ANSWER_S)
        try:
            connection.connect(str(path))
            connection.sendall(json.dumps(request).encode() + b"\n")
            with connection.makefile("rb") as file:
                answer = json.loads(file.readline(16 * LINE_BYTES_MAX))
        except (FileNotFoundError, ConnectionRefusedError):
            raise InputError(
                f"no worker runs on {folder}: start it with 'sotto worker', or give its --data-dir"
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"the worker on {folder} does not answer ({error}): see its log") from None
    if not isinstance(answer, dict) or "error" in answer:
        said = answer.get("error") if isinstance(answer, dict) else answer
        raise InputError(f"the worker refused: {said}")
    return answer
