"""Peers' reports, weighed: a crowd weighs no more for being many, trust is earned and lost, and room is bounded."""

from __future__ import annotations

import pytest

from client.metalearning.comparing import Compared, Place
from client.metalearning.hearsay import BELIEVED_MS, PEERS_KEPT, Hearsay
from client.metalearning.online import ERROR_DEVIATION
from protocol.ids import PeerId
from protocol.reports import Comparison, Report, strategy_tag

KIND, ELSEWHERE = bytes(7), bytes([1]) * 7
LOOKUP, WIRE = "speculation=lookup", "wire=int8"
HERE: Place = (KIND, LOOKUP)


def peer(number: int) -> PeerId:
    return PeerId(f"peer {number}")


def says(*told: tuple[Place, int], at_ms: int = 1, error: int = 1) -> Report:
    return Report(at_ms, tuple(Comparison(kind, strategy_tag(name), ratio, error, 4) for (kind, name), ratio in told))


def test_nobody_says_nothing() -> None:
    assert Hearsay().word(HERE) is None
    one = Hearsay()
    one.hear(peer(1), says((HERE, 10)))
    assert one.word((ELSEWHERE, LOOKUP)) is None


@pytest.mark.parametrize("many", [1, 3, 200])
def test_a_crowd_weighs_what_one_prediction_does(many: int) -> None:
    crowd = Hearsay()
    for number in range(many):
        crowd.hear(peer(number), says((HERE, -20)))
    word = crowd.word(HERE)
    assert word is not None
    assert word.log_ratio == -0.2
    assert word.deviation == pytest.approx(ERROR_DEVIATION, rel=0.01)


def test_who_agrees_with_what_was_measured_outweighs_any_crowd() -> None:
    own = {(ELSEWHERE, name): Compared(0.1, 0.02, 8) for name in (LOOKUP, WIRE)}
    hearsay = Hearsay(own)
    for number in range(5):
        hearsay.hear(peer(number), says((HERE, 10), *(((ELSEWHERE, name), 12) for name in (LOOKUP, WIRE))))
    for number in range(100, 240):
        hearsay.hear(peer(number), says((HERE, -300)))
    word = hearsay.word(HERE)
    assert word is not None
    assert word.log_ratio == 0.1


def test_who_contradicts_what_was_measured_is_not_heard() -> None:
    hearsay = Hearsay()
    hearsay.hear(peer(1), says((HERE, -200), ((ELSEWHERE, WIRE), -100)))
    assert hearsay.word(HERE) is not None
    hearsay.judge_by({(ELSEWHERE, WIRE): Compared(0.1, 0.02, 8)})
    assert hearsay.word(HERE) is None


def test_an_honest_difference_is_no_contradiction() -> None:
    hearsay = Hearsay({HERE: Compared(0.1, 0.05, 8)})
    hearsay.hear(peer(1), says((HERE, 25), error=5))
    assert hearsay.word(HERE) is not None


def test_the_median_ignores_the_lesser_half_and_says_that_they_differ() -> None:
    hearsay = Hearsay()
    for number in range(5):
        hearsay.hear(peer(number), says((HERE, 10)))
    united = hearsay.word(HERE)
    for number in range(10, 14):
        hearsay.hear(peer(number), says((HERE, -300)))
    split = hearsay.word(HERE)
    assert united is not None
    assert split is not None
    assert united.log_ratio == split.log_ratio == 0.1
    assert split.deviation > 2 * united.deviation


def test_the_unsure_weigh_less() -> None:
    hearsay = Hearsay()
    hearsay.hear(peer(1), says((HERE, 10), error=1))
    hearsay.hear(peer(2), says((HERE, -100), error=100))
    hearsay.hear(peer(3), says((HERE, -100), error=100))
    word = hearsay.word(HERE)
    assert word is not None
    assert word.log_ratio == 0.1


def test_only_the_newest_report_of_a_peer_counts() -> None:
    hearsay = Hearsay()
    assert hearsay.hear(peer(1), says((HERE, 10), at_ms=5))
    assert not hearsay.hear(peer(1), says((HERE, 90), at_ms=4))
    assert hearsay.hear(peer(1), says((HERE, 20), at_ms=6))
    word = hearsay.word(HERE)
    assert word is not None
    assert word.log_ratio == 0.2
    assert len(hearsay) == 1


def test_a_flood_takes_the_room_of_strangers_only() -> None:
    hearsay = Hearsay({HERE: Compared(0.1, 0.02, 8)})
    hearsay.hear(peer(0), says((HERE, 10)))
    hearsay.hear(peer(1), says(((ELSEWHERE, WIRE), 10)))
    for number in range(2, 2 + 2 * PEERS_KEPT):
        hearsay.hear(peer(number), says(((ELSEWHERE, WIRE), -300), at_ms=number))
    assert len(hearsay) == PEERS_KEPT
    assert peer(0) in hearsay
    assert peer(1) not in hearsay


def test_old_reports_are_let_go() -> None:
    hearsay = Hearsay()
    hearsay.hear(peer(1), says((HERE, 10), at_ms=1))
    hearsay.hear(peer(2), says((HERE, 10), at_ms=1000))
    hearsay.forget(BELIEVED_MS + 500)
    assert len(hearsay) == 1
    assert peer(2) in hearsay
