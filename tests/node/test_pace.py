"""What a store's calls are taken to say, on a clock that the test turns."""

import pytest

from kvtier.node.pace import FORGET_S, LEAST_ROWS, Pace


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def call(pace: Pace, clock: Clock, seconds: float, blocks: int, nbytes: int) -> None:
    pace.begin()
    clock.now += seconds
    pace.end(blocks, nbytes)


def test_nothing_is_said_of_what_was_hardly_seen() -> None:
    clock = Clock()
    pace = Pace(clock)
    call(pace, clock, 99.0, 1, 1000)  # the first opens the connection: it does not count
    for _ in range(LEAST_ROWS):
        assert not pace.known
        call(pace, clock, 0.5, 2, 2000)
    assert pace.known
    assert pace.cost().of(1000) == pytest.approx(0.25)


def test_frames_of_two_sizes_tell_the_bytes_from_the_call() -> None:
    clock = Clock()
    pace = Pace(clock)
    for _ in range(20):
        call(pace, clock, 0.004 + 1000 * 1e-6, 1, 1000)
    assert pace.cost().block_s == 0, "of one size: all of it may be the bytes"
    for _ in range(20):
        call(pace, clock, 0.004 + 600 * 1e-6, 1, 600)
    cost = pace.cost()
    assert (cost.block_s, cost.byte_s) == (pytest.approx(0.004), pytest.approx(1e-6))
    for _ in range(400):
        call(pace, clock, 0.004 + 600 * 1e-6, 1, 600)
    assert pace.cost().block_s == pytest.approx(0.004, rel=0.05), "known, though no longer seen"
    clock.now += 10 * FORGET_S
    assert pace.cost().block_s < 1e-5, "and doubted again"
    assert pace.cost().of(600) == pytest.approx(0.0046)


def test_calls_at_once_count_once() -> None:
    clock = Clock()
    pace = Pace(clock)
    for _ in range(10):
        pace.begin()
        pace.begin()
        clock.now += 0.1
        pace.end(1, 1000)
        pace.end(1, 1000)
    assert pace.cost().of(1000) == pytest.approx(0.05)


def test_a_store_that_never_rests_is_seen_too() -> None:
    clock = Clock()
    pace = Pace(clock)
    pace.begin()
    for _ in range(100):
        pace.begin()
        clock.now += 0.3
        pace.end(3, 3000)
    assert pace.known
    assert pace.cost().of(1000) == pytest.approx(0.1)


def test_a_failed_call_says_nothing() -> None:
    clock = Clock()
    pace = Pace(clock)
    for _ in range(10):
        call(pace, clock, 0.1, 1, 1000)
        call(pace, clock, 60.0, 0, 0)
    assert pace.cost().of(1000) == pytest.approx(0.1)


def test_larger_frames_that_seem_faster_are_noise() -> None:
    clock = Clock()
    pace = Pace(clock)
    for _ in range(10):
        call(pace, clock, 0.1, 1, 2000)
        call(pace, clock, 0.2, 1, 1000)
    cost = pace.cost()
    assert cost.byte_s == 0
    assert cost.block_s == pytest.approx(0.15, rel=0.05)
