"""Does the swarm help? The four answers, from predictions alone."""

from __future__ import annotations

import pytest

from client.placement import PlaceOptions, plan
from models.checkpoint import Checkpoint
from node.bringing import DeployOptions
from node.survey import Machine, survey, this_machine
from sotto.demo import demo_checkpoint
from tests.helpers.adverts import advert, view
from tests.helpers.placing import needs


@pytest.mark.parametrize(
    ("blocks_s", "free_bytes", "answer"),
    [(1e-6, 10, "fits"), (1.0, 1 << 40, "faster"), (1e-6, 1 << 40, "slower"), (None, 1 << 40, "even")],
)
def test_the_swarm_gives_room_or_speed_or_nothing(blocks_s: float | None, free_bytes: int, answer: str) -> None:
    swarm, model = view(advert(12), advert(12)), needs(*[4] * 6)
    options = PlaceOptions(client_s=0.001)
    placement = plan(swarm, model, options)
    same_s = placement.predicted_ms_per_token / 1000 - options.client_s
    machine = Machine(free_bytes, 6 * 4 << 20, same_s if blocks_s is None else blocks_s, options.client_s)
    found = survey(swarm, model, options, (placement, machine))
    assert found.helps == answer
    assert found.optimal
    assert found.alone is None
    assert placement.client_us == 1000


def test_what_is_deployed_is_placed_as_it_was_surveyed() -> None:
    surveyed = PlaceOptions("throughput", concurrency=8, hops_min=2, client_s=0.2)
    assert DeployOptions(2, "throughput", 8, client_s=0.2).where(frozenset()) == surveyed


def test_this_machine_is_measured_as_a_worker_measures_itself() -> None:
    config = Checkpoint.open(demo_checkpoint()).config
    small = this_machine(config, needs(*[1] * 4), 1)
    assert small.fits
    assert 0 < small.client_s < small.predicted_ms_per_token / 1000 < 1
    assert not this_machine(config, needs(*[1 << 24] * 4), 1).fits
