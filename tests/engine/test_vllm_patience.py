"""How long an engine's steps may wait for answers, and which blocks a second request has."""

import pytest

from kvtier.engine.vllm.patience import BUSY_S, IDLE_S, MAX_PAUSE_S, PAUSE_S, WAIT_S, Patience
from kvtier.engine.vllm.sightings import Sightings


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def waits(patience: Patience, clock: Clock, each_s: float) -> float:
    """All that one step waits where every answer takes so long."""
    before = clock.now
    while limit_s := patience.limit_s:
        took = min(limit_s, each_s)
        clock.now += took
        patience.waited(took, answered=each_s <= limit_s)
    return clock.now - before


def step(patience: Patience, clock: Clock, computing_s: float) -> None:
    patience.step(idle=not computing_s)
    clock.now += computing_s


def test_a_step_waits_for_many_quick_answers_but_not_for_long(clock):
    patience = Patience(clock)
    for computing_s, most in ((0.5, BUSY_S), (0.0, IDLE_S), (0.5, BUSY_S), (0.01, 0.001)):
        step(patience, clock, computing_s)
        assert most / 2 < waits(patience, clock, most / 20) <= most * 1.001
        assert patience.limit_s < most / 1000, "this step has waited all it may"


def vain(patience: Patience, clock: Clock, seconds: float) -> list[float]:
    """The waits of so long a time in which no answer comes."""
    start, found = clock.now, []
    while clock.now < start + seconds:
        step(patience, clock, 0.1)
        if waited := waits(patience, clock, 60.0):
            found.append(waited)
    return found


def test_an_engine_that_computes_waits_in_vain_less_and_less_often(clock):
    patience = Patience(clock)
    for _ in range(2):
        assert vain(patience, clock, 15 * PAUSE_S) == pytest.approx([BUSY_S] * 4)
        assert len(vain(patience, clock, 20 * MAX_PAUSE_S)) <= 21
        while not waits(patience, clock, BUSY_S / 10):  # an answer: it is back
            step(patience, clock, 0.1)


def test_an_idle_engine_waits_in_every_step_though_in_vain(clock):
    patience = Patience(clock)
    for _ in range(3):
        step(patience, clock, 0.0)
        assert waits(patience, clock, 60.0) == pytest.approx(WAIT_S)


def test_a_crowd_whose_last_answer_comes_late_costs_no_pause(clock):
    patience = Patience(clock)
    for _ in range(3):
        step(patience, clock, 0.1)
        assert waits(patience, clock, BUSY_S * 0.9)


def names(*numbers: int, group: int = 0) -> list[bytes]:
    return [n.to_bytes(32, "big") + group.to_bytes(4, "big") for n in numbers]


def test_a_block_is_known_again_from_the_second_offer_on():
    seen = Sightings()
    assert seen.again(names(1, 2)) == [False, False]
    assert seen.again(names(2, 3, 2)) == [True, False, True]
    assert seen.again(names(1, 3)) == [True, True]
    assert seen.again(names(1, group=1)) == [False], "another group's block is another block"


def test_what_was_offered_long_ago_is_forgotten_and_what_is_offered_again_is_not():
    seen = Sightings(remembered=100)
    seen.again(names(7, 8))
    for number in range(1000, 3000, 50):
        assert not any(seen.again(names(*range(number, number + 50))))
        assert seen.again(names(7)) == [True]
    assert seen.again(names(8)) == [False]
    assert seen.remembered <= 200
