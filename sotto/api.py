"""The Python API: `Swarm` for plain code, `AsyncSwarm` on trio. Four lines from nothing to text:

    with Swarm(bootstrap) as swarm:
        model = swarm.deploy("path/or/hub-id")
        for piece in model.stream("The Python language"):
            print(piece, end="")

`Swarm` keeps the client on a thread of its own, so its methods may be called from any thread. Errors are those of
protocol.errors and models.errors; their messages say what to do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from functools import partial
from pathlib import Path
from types import TracebackType

import trio

from client.generate import GenerationResult
from models.checkpoint import Checkpoint
from models.sampling import SamplingParams
from node.app_client import open_client
from node.bringing import DeployOptions
from node.chat import ChatOptions, open_chat
from node.client import Client, ClientOptions
from node.defaults import KV_TOKENS
from node.grants import read_token
from node.keys import key_of
from node.model import Ask, DeployedModel
from node.paths import data_dir as default_data_dir
from protocol.errors import InputError
from protocol.ids import DeploymentId
from protocol.strategy import Auto, Strategy, parse_choice
from sotto.chat import AsyncChat, Chat
from sotto.portal import Portal

__all__ = ["AsyncChat", "AsyncModel", "AsyncSwarm", "Chat", "Model", "SamplingParams", "Swarm"]


def _ask(
    max_new_tokens: int, sampling: SamplingParams | None, stop: Sequence[str], strategy: Strategy | Auto, recover: bool
) -> Ask:
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    return Ask(max_new_tokens, sampling or SamplingParams(), stops, strategy=strategy, recover=recover)


class AsyncModel:
    """A deployed model, on trio. Made by AsyncSwarm.deploy. Its memory at workers is leased until it is closed, or the
    swarm is: `async with await swarm.deploy(...) as model`, or `aclose`."""

    def __init__(self, model: DeployedModel, part: Callable[[], None]) -> None:
        self._deployed: DeployedModel | None = model
        self._part = part  # with what is leased for it

    async def __aenter__(self) -> AsyncModel:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Give up what workers lease for it, unless another model of this swarm is of the same deployment. Requests and
        chats under way go on, in memory that nobody leases. Idempotent; works in a cancelled scope too."""
        if self._deployed is not None:
            self._deployed = None
            self._part()

    @property
    def _model(self) -> DeployedModel:
        if self._deployed is None:
            raise InputError("the model is closed: deploy it again")
        return self._deployed

    async def generate(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 64,
        sampling: SamplingParams | None = None,
        stop: Sequence[str] = (),
        strategy: str = "auto",
        recover: bool = True,
    ) -> GenerationResult:
        """The whole answer: `.text`, `.ids`, `.finish_reason`, times. `recover`: when workers are lost, go on over
        others; else that is an error, at once. Raises InputError, RouteUnavailable..."""
        ask = _ask(max_new_tokens, sampling, stop, self._chosen(strategy), recover)
        return await self._model.generate(prompt, ask)

    def _chosen(self, strategy: str) -> Strategy | Auto:
        return parse_choice(strategy, self._model.default_strategy)

    async def stream(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 64,
        sampling: SamplingParams | None = None,
        stop: Sequence[str] = (),
        strategy: str = "auto",
        recover: bool = True,
    ) -> AsyncGenerator[str, None]:
        """The answer's text in pieces as they become certain. Close it (contextlib.aclosing) to stop early. `recover`:
        as in `generate`."""
        ask = _ask(max_new_tokens, sampling, stop, self._chosen(strategy), recover)
        async with self._model.ask(prompt, ask) as answer:
            async for piece in answer.pieces:
                yield piece

    async def chat(self, system: str | None = None, *, context_tokens: int = KV_TOKENS) -> AsyncChat:
        """A chat in the model's own template, over one session: `async with await model.chat() as chat`."""
        return AsyncChat(await open_chat(self._model, ChatOptions(system, context_tokens)))


class AsyncSwarm:
    """A client of the swarm that `bootstrap` leads to, on trio: `async with AsyncSwarm(addr) as swarm`.

    `bootstrap`: addresses, or an invite; none of them: a public swarm of the local network.
    `data_dir` holds the user's identity, keys and sealed models; any number of clients may use it. `capability`: a
    token from the owner of another deployment, for a client that uses that one. `share_records`: tell the swarm how
    strategies compared in your requests, and heed what others tell (docs/SCHEDULER.md).
    """

    def __init__(
        self,
        *bootstrap: str,
        data_dir: Path | str | None = None,
        capability: str | None = None,
        share_records: bool = False,
    ) -> None:
        folder = default_data_dir(None if data_dir is None else Path(data_dir))
        token = None if capability is None else read_token(capability)
        self._options = ClientOptions(folder, bootstrap, capability=token, share_records=share_records)
        self._context = open_client(self._options)
        self._client: Client | None = None
        self._in_use = Counter[DeploymentId]()  # models that are not closed

    async def __aenter__(self) -> AsyncSwarm:
        self._client = await self._context.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return await self._context.__aexit__(kind, error, trace)

    async def deploy(
        self,
        model: str | Path,
        *,
        privacy: str = "ee",
        dtype: str | None = None,
        key: str | None = None,
        workers: int = 1,
    ) -> AsyncModel:
        """Seal `model` (a folder in Hugging Face layout, or a hub id), place and upload it, unless it is there already.

        `privacy`: "ee" or "plain"; `dtype` of the sealed blocks (default: "float32"); `key`: the name of a root key
        (default: "default", made on first use); `workers`: spread over at least so many. With a capability the model is
        used as its owner deployed it: another `dtype`, or `workers`, is refused. Raises InputError, ModelError,
        RouteUnavailable, Refused, TransportError.
        """
        if self._client is None:
            raise InputError("the swarm is not open: use it as 'async with AsyncSwarm(...) as swarm'")
        root = key_of(privacy, key, self._options.data_dir)
        opening = partial(Checkpoint.open, model)
        checkpoint = await trio.to_thread.run_sync(opening, abandon_on_cancel=True)  # type: ignore[call-arg]  # old stubs; a download resumes
        ready = await self._client.bring(checkpoint, dtype, root, DeployOptions(hops_min=workers))
        self._in_use[ready.route.deployment] += 1
        self._client.drafts.soon(ready.draft)
        return AsyncModel(ready, partial(self._closed, self._client, ready.route.deployment))

    def _closed(self, client: Client, deployment: DeploymentId) -> None:
        """A model of `deployment` is."""
        self._in_use[deployment] -= 1
        if not self._in_use[deployment]:
            client.part(deployment)


class Model:
    """A deployed model, for plain code. Made by Swarm.deploy. Its memory at workers is leased until it is closed, or
    the swarm is: `with swarm.deploy(...) as model`, or `close`."""

    def __init__(self, portal: Portal[AsyncSwarm], model: AsyncModel) -> None:
        self._portal = portal
        self._model = model

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """See AsyncModel.aclose. Nothing is left to do when the swarm is closed already."""
        if not self._portal.closed:
            self._portal.call(self._model.aclose)

    def generate(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 64,
        sampling: SamplingParams | None = None,
        stop: Sequence[str] = (),
        strategy: str = "auto",
        recover: bool = True,
    ) -> GenerationResult:
        """The whole answer: `.text`, `.ids`, `.finish_reason`, times. `recover`: when workers are lost, go on over
        others; else that is an error, at once. Raises InputError, RouteUnavailable..."""
        work = partial(
            self._model.generate,
            prompt,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop=stop,
            strategy=strategy,
            recover=recover,
        )
        return self._portal.call(work)

    def stream(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 64,
        sampling: SamplingParams | None = None,
        stop: Sequence[str] = (),
        strategy: str = "auto",
        recover: bool = True,
    ) -> Iterator[str]:
        """The answer's text in pieces as they become certain. Leaving the loop early stops the request. `recover`: as
        in `generate`."""
        pieces = partial(
            self._model.stream,
            prompt,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop=stop,
            strategy=strategy,
            recover=recover,
        )

        async def produce(emit: Callable[[str], None]) -> None:
            async with aclosing(pieces()) as stream:
                async for piece in stream:
                    emit(piece)

        return self._portal.stream(produce)

    def chat(self, system: str | None = None, *, context_tokens: int = KV_TOKENS) -> Chat:
        """A chat in the model's own template, over one session: `with model.chat() as chat`."""
        work = partial(self._model.chat, system, context_tokens=context_tokens)
        return Chat(self._portal, self._portal.call(work))


class Swarm:
    """A client of the swarm that `bootstrap` leads to: `with Swarm(addr) as swarm`.

    `bootstrap`: addresses, or an invite; none of them: a public swarm of the local network.
    `data_dir` holds the user's identity, keys and sealed models; any number of clients may use it. `capability`: a
    token from the owner of another deployment, for a client that uses that one. `share_records`: tell the swarm how
    strategies compared in your requests, and heed what others tell (docs/SCHEDULER.md).
    """

    def __init__(
        self,
        *bootstrap: str,
        data_dir: Path | str | None = None,
        capability: str | None = None,
        share_records: bool = False,
    ) -> None:
        self._portal = Portal(
            partial(AsyncSwarm, *bootstrap, data_dir=data_dir, capability=capability, share_records=share_records)
        )
        self._swarm: AsyncSwarm | None = None

    def __enter__(self) -> Swarm:
        self._swarm = self._portal.open()
        return self

    def __exit__(self, *_: object) -> None:
        self._portal.close()

    def deploy(
        self,
        model: str | Path,
        *,
        privacy: str = "ee",
        dtype: str | None = None,
        key: str | None = None,
        workers: int = 1,
    ) -> Model:
        """See AsyncSwarm.deploy."""
        if self._swarm is None:
            raise InputError("the swarm is not open: use it as 'with Swarm(...) as swarm'")
        work = partial(self._swarm.deploy, model, privacy=privacy, dtype=dtype, key=key, workers=workers)
        return Model(self._portal, self._portal.call(work))
