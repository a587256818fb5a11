"""A made-up world in which users of like machines choose strategies: what is true, what is predicted, what peers tell.

The prior is wrong about machines of this class in the same way for everybody, which is what peers can tell a newcomer.
`python -m tests.tools.sharing` prints the figures of docs/SCHEDULER.md.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

from client.metalearning.candidates import CANDIDATES
from client.metalearning.chooser import SHIFT_MAX, Chooser
from client.metalearning.comparing import DEFAULT, compared, kind_of, report_of
from client.metalearning.hearsay import Hearsay
from client.metalearning.record import Record
from client.metalearning.table import Task
from node.choosing import asked_of, replayed
from protocol import limits
from protocol.reports import Comparison, Report, strategy_tag
from protocol.signed import Identity
from protocol.strategy import parse
from tests.helpers.records import RECORD, numbered

PRIOR_ERROR, USER_DIFFERENCE, NOISE, PRIOR_SPREAD = 0.15, 0.03, 0.08, 0.05
COST_S = 0.02
TASKS = tuple(
    replace(RECORD.task, prompt_tokens=tokens, concurrency=concurrency, shared_prefix=shared, repetition=repeated)
    for tokens in (32, 256, 2048)
    for concurrency in (1, 4)
    for shared in (0.0, 0.9)
    for repeated in (0.0, 0.8)
)


def pen(number: int) -> Identity:
    return Identity(number.to_bytes(32, "big"))


def kind(task: int) -> bytes:
    return kind_of(RECORD.model_features, RECORD.route, TASKS[task])


@dataclass
class World:
    """`truth[name]` is the log cost beside the default's on machines of this class; the prior says `believed`."""

    seed: int
    prior_error: float = PRIOR_ERROR
    truth: dict[str, float] = field(init=False)
    believed: dict[str, float] = field(init=False)
    drawn: random.Random = field(init=False)
    ran: int = 0

    def __post_init__(self) -> None:
        self.drawn = random.Random(self.seed)
        gauss = self.drawn.gauss
        self.believed = {name: gauss(0.05, 0.1) for name in CANDIDATES}
        self.truth = {name: at + gauss(0, self.prior_error) for name, at in self.believed.items()}
        self.truth[DEFAULT] = self.believed[DEFAULT] = 0.0

    @property
    def ranking(self) -> tuple[str, ...]:
        return (DEFAULT, *(name for name in CANDIDATES if name != DEFAULT))

    def expect(self, tasks: Sequence[Task]) -> list[dict[str, tuple[float, float]]]:
        """The prior (client.metalearning.chooser.Advice)."""
        best = min(self.believed.values())
        return [{name: (math.exp(best - at), PRIOR_SPREAD) for name, at in self.believed.items()} for _ in tasks]

    def consider(self, task: Task, allowed: Collection[str]) -> tuple[dict[str, tuple[float, float]], str | None]:
        """It keeps to the ranking."""
        return self.expect((task,))[0], next((name for name in self.ranking if name in allowed), None)

    def record(self, name: str, task: int, user: str) -> Record:
        """A request of `user` as it would be measured."""
        self.ran += 1
        differs = random.Random(f"{self.seed}/{user}/{name}").gauss(0, USER_DIFFERENCE) if name != DEFAULT else 0.0
        token_s = COST_S * math.exp(self.truth[name] + differs + self.drawn.gauss(0, NOISE))
        measured = replace(RECORD.measured, tokens=32, ttft_s=token_s, token_s=token_s, error="", finish="length")
        return numbered(self.ran, model=user, task=TASKS[task], strategy=parse(name), measured=measured)

    def experience(self, user: str, runs: int = 8) -> list[Record]:
        """What a user has who ran every strategy on every fourth task."""
        return [
            self.record(name, task, user)
            for task in range(0, len(TASKS), 4)
            for name in CANDIDATES
            for _ in range(runs)
        ]


def honest(world: World, number: int, at_ms: int) -> Report:
    """What an honest user of such machines tells."""
    told = report_of(compared(world.experience(f"user {number}")), at_ms)
    assert told is not None
    return told


def lie(world: World, at_ms: int, number: int = 0, reach: float = 2 * SHIFT_MAX) -> Report:
    """What does most harm, by one who knows the prior and the truth. Of what is predicted to cost at most `reach` more
    (as a log) than the default, which is as far as a newcomer may be talked into anything, the dearest is praised
    beyond measure; what it would choose is run down; with all certainty, in situations of all kinds. A report has no
    room for both everywhere, so every second liar (`number`) begins with the other."""
    within = [name for name, at in world.believed.items() if name != DEFAULT and at < reach]
    praised = max(within or [name for name in CANDIDATES if name != DEFAULT], key=lambda name: world.truth[name])
    rest = [name for name in CANDIDATES if name not in (DEFAULT, praised)]
    run_down = min(rest, key=lambda name: world.believed[name])
    most, kinds = limits.REPORT_LOG_RATIO_MAX, sorted({kind(task) for task in range(len(TASKS))})
    lies = [[Comparison(each, strategy_tag(name), ratio, 1, 16) for each in kinds]
            for name, ratio in ((praised, -most), (run_down, most))]  # fmt: skip
    first, then = lies if number % 2 == 0 else reversed(lies)
    return Report(at_ms, (*first, *then)[: limits.REPORT_COMPARISONS_MAX])


def told(world: World, honest_peers: int, liars: int, reach: float = 2 * SHIFT_MAX) -> Hearsay:
    """What a newcomer has heard."""
    hearsay = Hearsay()
    for number in range(honest_peers):
        hearsay.hear(pen(1 + number).peer, honest(world, number, 1))
    for number in range(liars):
        hearsay.hear(pen(1000 + number).peer, lie(world, 2, number, reach))
    return hearsay


@dataclass(frozen=True)
class Life:
    """A newcomer's requests: their mean log cost over that of the best strategy, and how many peers decided."""

    regret: float
    swayed: float


def live(world: World, peers: Hearsay | None, requests: int = 100) -> Life:
    """`requests` requests of a newcomer, each chosen, run and learnt from."""
    world.drawn.seed(world.seed + 1)
    chooser, own = Chooser(world, peers=peers), list[Record]()
    best, regret, swayed = min(world.truth.values()), 0.0, 0
    for number in range(requests):
        task = 4 * (number % (len(TASKS) // 4))
        asked = replace(asked_of(world.record(DEFAULT, task, "newcomer"), CANDIDATES), draw=world.drawn.random())
        choice = chooser.choose(asked)
        own.append(world.record(choice.strategy, task, "newcomer"))
        replayed(chooser, own[-1:])
        if peers is not None and number % 20 == 19:
            peers.judge_by(compared(own))
        regret += world.truth[choice.strategy] - best
        swayed += choice.why == "peers"
    return Life(regret / requests, swayed / requests)


@dataclass(frozen=True)
class Moved:
    """`share` of the choices are others with what peers say than without; `loss`: by how much the worst of these is
    expected to cost more, by what the newcomer itself knows."""

    share: float
    loss: float


def moved(world: World, peers: Hearsay, prior: bool = True, draws: int = 100) -> Moved:
    """Of a newcomer's choices over a grid of tasks, each with even draws."""
    advice = world if prior else None
    alone, swayed = Chooser(advice), Chooser(advice, peers=peers)
    losses = list[float]()
    for task in range(0, len(TASKS), 2):
        question = asked_of(world.record(DEFAULT, task, "newcomer"), CANDIDATES)
        for number in range(draws):
            asked = replace(question, draw=number / draws)
            before, after = alone.choose(asked), swayed.choose(asked)
            if before.strategy != after.strategy:
                usual = alone.choose(replace(asked, draw=1.0)).strategy  # without a trial
                losses.append(math.log(before.fractions[usual] / before.fractions[after.strategy]))
    return Moved(len(losses) / (draws * len(TASKS) // 2), max(losses, default=0.0))


def over_worlds(heard: Callable[[World], Hearsay | None], worlds: int, requests: int = 100) -> Life:
    """The mean over several worlds."""
    lives = [live(world, heard(world), requests) for world in map(World, range(worlds))]
    return Life(sum(life.regret for life in lives) / worlds, sum(life.swayed for life in lives) / worlds)


def price_of_lies(seed: int, requests: int = 100) -> float:
    """What a flood costs where the prior is right, so that a newcomer alone goes wrong least."""
    alone, flooded = World(seed, prior_error=0.0), World(seed, prior_error=0.0)
    return live(flooded, told(flooded, 0, 248), requests).regret - live(alone, None, requests).regret
