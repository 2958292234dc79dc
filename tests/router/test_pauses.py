"""The pauses between tries; time is a number, and luck a seed."""

import random

from kvtier.router.pauses import Pauses


def make(seed: int = 0) -> Pauses:
    return Pauses(0.2, 1.0, 10.0, random.Random(seed))


def test_pauses_grow_to_a_limit_with_jitter():
    pauses = make()
    slept = [pauses.next_s() for _ in range(10_000)]
    for pause, most in zip(slept, [0.2, 0.4, 0.8, *[1.0] * 9997], strict=True):
        assert most / 2 <= pause <= most
    assert len(set(slept)) > 9000
    assert slept != [make(1).next_s() for _ in range(10_000)]


def test_what_ends_before_it_has_lasted_was_in_vain():
    pauses = make()
    for now in range(0, 400, 40):
        assert not pauses.holds(now)
        assert not pauses.holds(now + 9.9)
        pauses.next_s()
    assert pauses.next_s() >= 0.5


def test_what_has_lasted_begins_anew():
    pauses = make()
    for _ in range(5):
        pauses.next_s()
    assert not pauses.holds(100.0)
    assert pauses.holds(110.0)
    assert pauses.next_s() <= 0.2
    assert not pauses.holds(111.0), "the next one has its own time"


def test_where_there_is_little_hope_the_pause_is_long_at_once():
    pauses = make()
    pauses.slow()
    assert pauses.next_s() >= 0.5
    assert pauses.holds(0.0) is False
    assert pauses.holds(10.0)
    assert pauses.next_s() <= 0.2
