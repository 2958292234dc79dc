"""Lambda follows the load."""

import pytest

from kvtier.core.behind import Behind


def seen(*shares: tuple[int, int], most: float = 4.0) -> float:
    behind = Behind(most)
    for busy, workers in shares:
        behind.see(busy, workers)
    return behind.value


def test_where_nobody_is_busy_nobody_waits_behind():
    assert seen() == 0
    assert seen(*[(0, 8)] * 50) == 0


def test_it_is_what_waits_in_a_queue_that_is_busy_so_often():
    assert seen(*[(4, 8)] * 50) == pytest.approx(0.5)
    assert seen(*[(6, 8)] * 50) == pytest.approx(2.25)
    assert seen(*[(6, 8)] * 50, most=1.0) == 1


def test_all_busy_is_the_most_and_no_division_by_nothing():
    assert seen((8, 8), (8, 8)) == 4
    assert seen((8, 8), most=1e6) == pytest.approx(98.01)
    assert seen((0, 0)) == 0


def test_what_was_is_forgotten_after_some_hundreds_of_decisions():
    behind = Behind(4.0)
    for _ in range(1000):
        behind.see(8, 8)
    behind.see(0, 8)
    assert behind.value == 4, "one quiet moment is no quiet hour"
    for _ in range(500):
        behind.see(0, 8)
    assert behind.value < 0.01
