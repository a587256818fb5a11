"""Choices that hold for a deployment, not for a request: the precision of the weights, and room for keys and values.

Another precision must be sealed, brought to workers and loaded: that is its switching cost, which the work that is
expected on the deployment has to earn back. Expected is what the user says, or as much as in the last HORIZON_DAYS. A
token's time is predicted from the bytes that are read for it, and corrected by what own requests in that precision
took. More room for keys and values needs no new weights, and so no such reckoning: it is what own requests needed.

Nothing here switches anything: whoever deploys asks, before it deploys. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from client.metalearning.features import WEIGHT_BYTES, ModelFeatures, RouteFeatures
from client.metalearning.price import Goal
from client.metalearning.record import Record
from client.placement.costs import BLOCK_SOFTWARE_S, HOP_SOFTWARE_S
from client.placement.needs import whole_pages

HORIZON_DAYS = 14.0
HALF_LIFE_DAYS = 14.0  # of what an own request says of a precision
TRUST = 1.0  # deviations by which a gain must exceed nothing
PREDICTED_DEVIATION = 0.2  # of the logarithm of a token's time before any request in that precision
NOISE = 0.15  # of one request's
SHARED = 4.0  # requests that outweigh what the other precisions say
ROOM_SHARE = 0.95  # of own requests fit into the room
DAY_MS = 86_400_000


@dataclass(frozen=True, slots=True)
class Rates:
    """Bytes per second as measured by this client: sealing, and bringing to workers (sending, storing and loading).
    The defaults are a slow machine and a home's uplink."""

    seal_bytes_s: float = 50e6
    bring_bytes_s: float = 2.5e6

    def switch_s(self, weight_bytes: int, *, sealed: bool, held: bool) -> float:
        """Seconds until a deployment of so many bytes stands. `sealed`: here; `held`: by workers, ready to be used."""
        seal_s = 0.0 if sealed else weight_bytes / self.seal_bytes_s
        return 0.0 if held else seal_s + weight_bytes / self.bring_bytes_s


@dataclass(frozen=True, slots=True)
class Option:
    """One precision. `token_s`: a token of one stream; `spread`: one deviation of its logarithm. `switch_s`: until it
    stands, 0 for what stands. `hops`: workers that it takes."""

    weights: str
    token_s: float
    switch_s: float
    spread: float = PREDICTED_DEVIATION
    hops: int = 1


@dataclass(frozen=True, slots=True)
class Verdict:
    """`weights` should be deployed, beside `base`, which stands, or loses nothing. `pays_after`: tokens after which
    each precision has earned its switch back; None for never. `tokens` is what was expected."""

    weights: str
    base: str
    tokens: float
    options: tuple[Option, ...]
    pays_after: Mapping[str, float | None]

    def reason(self) -> str:
        """In words for the user."""
        after, expected = self.pays_after.get(self.weights), f"{self.tokens:.0f} are expected"
        if self.weights != self.base:
            pays = "at once" if not after else f"after {after:.0f} tokens"
            return f"{self.weights} instead of {self.base}: it pays {pays}, and {expected}"
        others = [f"{name} would pay after {at:.0f} tokens" for name, at in self.pays_after.items() if at is not None]
        return f"{self.weights}: " + (f"{', '.join(others)}, and {expected}" if others else "no other would be faster")


def decide(options: Sequence[Option], stands: str | None, tokens: float, goal: Goal = "latency") -> Verdict:
    """Which precision to deploy for so many tokens of answers. `options` are those that fit, and that the user allows.

    For `goal` cost each worker's time counts. Another than what stands, or loses nothing, must gain more than the
    doubt. Raises ValueError without an option.
    """
    base = next((each for each in options if each.weights == stands), options[0] if options else None)
    if base is None:
        raise ValueError("no precision is possible")

    def paid(option: Option) -> Option:
        """With the time of all workers, where that is what counts."""
        times = option.hops if goal == "cost" else 1
        return replace(option, switch_s=times * option.switch_s, token_s=times * option.token_s)

    def total_s(option: Option) -> float:
        return paid(option).switch_s + tokens * paid(option).token_s

    def doubt_s(option: Option) -> float:
        return tokens * math.hypot(paid(option).token_s * option.spread, paid(base).token_s * base.spread)

    worth = [each for each in options if total_s(base) - total_s(each) > TRUST * doubt_s(each)]
    best = min(worth, key=total_s, default=base)
    after = {each.weights: pays_after(paid(base), paid(each)) for each in options if each.weights != base.weights}
    return Verdict(best.weights, base.weights, tokens, tuple(options), after)


def pays_after(base: Option, other: Option) -> float | None:
    """Tokens after which `other`, its switch included, took less time than `base`; None for never."""
    dearer_s, gain_s = other.switch_s - base.switch_s, base.token_s - other.token_s
    if gain_s <= 0:
        return None
    return max(0.0, dearer_s / gain_s)


def predicted_token_s(model: ModelFeatures, route: RouteFeatures, weights: str) -> float:
    """A token over `route` if its workers held the model in `weights`: reading takes as long as there are bytes,
    the wire and the software what they take."""
    software_s = model.layers * BLOCK_SOFTWARE_S
    reading_s = max(0.0, route.compute_us * 1e-6 - software_s)
    share = WEIGHT_BYTES[weights] / model.weight_bytes if model.weight_bytes else 1.0
    return route.rtt_ms / 1000 + route.hops * HOP_SOFTWARE_S + software_s + reading_s * share


def corrected(options: Sequence[Option], records: Sequence[Record], now_ms: int) -> tuple[Option, ...]:
    """`options` with what own requests of the same model took beside what was predicted. Requests without guesses over
    a whole wire count, for that is what is predicted; old ones less. What one precision shows, the others are believed
    to share until they were tried."""
    seen: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        strategy, token_s = record.strategy, record.measured.token_s
        plain = strategy.speculation == "off" and strategy.wire == "float32" and record.task.concurrency == 1
        predicted_s = predicted_token_s(record.model_features, record.route, strategy.weights)
        if plain and token_s and predicted_s > 0 and record.measured.is_whole and not record.simulated:
            age_days = max(0, now_ms - record.at_ms) / DAY_MS
            seen.setdefault(strategy.weights, []).append(
                (0.5 ** (age_days / HALF_LIFE_DAYS), math.log(token_s / predicted_s))
            )
    common = _mean([pair for pairs in seen.values() for pair in pairs])
    return tuple(_corrected(option, seen.get(option.weights, []), common) for option in options)


def expected_tokens(records: Sequence[Record], now_ms: int) -> float:
    """Of answers, until the deployment may have ended: as many as lately."""
    return float(sum(each.measured.tokens for each in records if now_ms - each.at_ms <= HORIZON_DAYS * DAY_MS))


def kv_room_tokens(records: Sequence[Record]) -> int:
    """Room that almost all own requests would have fitted into, those under way beside them included: whole pages, one
    at least. It costs no switch; what is leased, nobody else can use."""
    needs = sorted(
        (each.task.prompt_tokens + each.task.max_new_tokens) * each.task.concurrency
        for each in records
        if not each.measured.error
    )
    if not needs:
        return whole_pages(1)
    return whole_pages(needs[math.ceil(ROOM_SHARE * len(needs)) - 1])


def _mean(pairs: Sequence[tuple[float, float]]) -> float:
    weight = sum(weight for weight, _ in pairs)
    return sum(weight * value for weight, value in pairs) / weight if weight else 0.0


def _corrected(option: Option, pairs: Sequence[tuple[float, float]], common: float) -> Option:
    weight = sum(weight for weight, _ in pairs)
    error = (sum(weight * value for weight, value in pairs) + SHARED * common) / (weight + SHARED)
    left = SHARED / (weight + SHARED)
    spread = math.hypot(PREDICTED_DEVIATION * left, NOISE * (1 - left) / math.sqrt(max(weight, 1.0)))
    return replace(option, token_s=option.token_s * math.exp(error), spread=spread)
