"""An observer of requests that remembers."""

from __future__ import annotations

from client.observer import ClientObserver


class Notes(ClientObserver):
    """Keeps what it hears of requests, in order."""

    def __init__(self) -> None:
        self.notes: list[tuple[str, object]] = []

    def request_started(self, prompt_tokens: int) -> None:
        self.notes.append(("started", prompt_tokens))

    def first_token(self, seconds: float) -> None:
        self.notes.append(("first", round(seconds, 6)))

    def next_token(self, seconds: float) -> None:
        self.notes.append(("next", round(seconds, 6)))

    def request_finished(self, finish_reason: str, generated_tokens: int, seconds: float) -> None:
        self.notes.append(("finished", (finish_reason, generated_tokens, round(seconds, 6))))

    def request_failed(self, kind: str, generated_tokens: int) -> None:
        self.notes.append(("failed", (kind, generated_tokens)))
