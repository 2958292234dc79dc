"""Where conversations went last, and when it counts."""

from kvtier.core.sessions import SESSION_S, Hint, Sessions, Standing, hint


def standing(name: str, seconds: float, draining: bool = False) -> Standing:
    return Standing(name, draining, seconds)


def test_the_last_place_counts_for_a_while():
    sessions = Sessions()
    sessions.place("s", "a", now=0.0)
    assert sessions.last("s", now=1.0) == "a"
    sessions.place("s", "b", now=10.0)
    assert sessions.last("s", now=SESSION_S + 9.9) == "b"
    assert sessions.last("s", now=SESSION_S + 10.0) == ""
    assert sessions.last("t", now=1.0) == ""


def test_sessions_are_bounded_and_the_longest_unused_go_first():
    sessions = Sessions(most=3)
    for n, name in enumerate("abcadefgh"):
        sessions.place(name, f"w{n}", now=float(n))
        assert len(sessions) <= 3
    assert [sessions.last(name, now=9.0) for name in "abfgh"] == ["", "", "w6", "w7", "w8"]
    sessions = Sessions(most=2)
    for n, name in enumerate("abac"):
        sessions.place(name, "w", now=float(n))
    assert [sessions.last(name, now=4.0) for name in "abc"] == ["w", "", "w"]


def test_a_crowd_that_is_over_is_forgotten_by_and_by():
    sessions = Sessions()
    for n in range(100):
        sessions.place(n, "w", now=0.0)
    sessions.place("next", "w", now=SESSION_S)
    assert 90 < len(sessions) < 101, "not all of it at once"
    for n in range(100):
        sessions.place("next", "w", now=SESSION_S + n)
    assert len(sessions) == 1


def test_a_hint_is_followed_where_it_costs_next_to_nothing():
    order = [standing("a", 1.0), standing("b", 1.005), standing("c", 1.04), standing("d", 1.06)]
    assert hint(order, "b") == Hint(1, decided=True)
    assert hint(order, "c") == Hint(2, decided=True)
    assert hint(order, "d") is None
    assert hint(order, "x") is None
    assert hint([], "a") is None
    short = [standing("a", 0.001), standing("b", 0.0055), standing("c", 0.0065)]
    assert hint(short, "b") == Hint(1, decided=True)
    assert hint(short, "c") is None


def test_a_hint_decides_nothing_where_its_worker_is_first_anyway():
    assert hint([standing("a", 1.0), standing("b", 1.04)], "a") == Hint(0, decided=False)
    assert hint([standing("a", 1.0)], "a") == Hint(0, decided=False)
    equals = [standing("a", 1.005), standing("b", 1.0)]
    assert hint(equals, "a") == Hint(0, decided=True), "luck put it first, or may not have"


def test_a_hint_does_not_lead_to_who_is_draining():
    order = [standing("a", 1.0), standing("b", 1.0, draining=True)]
    assert hint(order, "b") is None
    assert hint(order, "a") == Hint(0, decided=False), "nobody else takes requests"
    assert hint(order[1:], "b") is None
