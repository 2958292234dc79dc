"""What waits teach the router: how fast queues empty, and what decoding does to prefills."""

from dataclasses import replace
from itertools import pairwise
from math import inf, nan
from random import Random

import hypothesis.strategies as st
import pytest
from hypothesis import given

from kvtier.core.audience import Warmth
from kvtier.core.drag import MOST, WINDOW, Drag
from kvtier.core.learned import ENOUGH, FORGET_S, LEAST_WAIT_S, MOST_DRAIN, Learned, Sample
from kvtier.core.score import DEFAULT_RATES, Candidate, Choice, Rates, rank

TOLD = Rates(
    prefill_tokens_per_s=1000.0, host_bytes_per_s=1e9, disk_bytes_per_s=1e9, shared_bytes_per_s=1e9
)
DRAG = replace(TOLD, decode_drag=0.02)


def waited(times: float, believed_s: float = 1.0) -> Sample:
    """A request that waited so many times as long as was believed."""
    return Sample(1, 0.1, believed_s=believed_s, waited_s=times * believed_s)


def ranked(learned: Learned, now: float = 0.0, **workers: int) -> list[Choice]:
    """These workers, by the tokens that wait there, for a prompt of 1,000 tokens."""
    candidates = [
        Candidate(name, Warmth(), waiting, learned.rates(name, TOLD, now))
        for name, waiting in workers.items()
    ]
    return rank(
        candidates, prompt_tokens=1000, block_tokens=100, block_nbytes=1000, behind=0.0,
        tie=lambda: 0.5,
    )  # fmt: skip


def waits(learned: Learned, now: float = 0.0, **workers: int) -> dict[str, float]:
    return {each.name: each.wait_s for each in ranked(learned, now, **workers)}


def test_a_router_that_has_learned_nothing_takes_tokens_at_their_word():
    assert waits(Learned(), a=500, b=2000) == {"a": 0.5, "b": 2.0}


def test_a_queue_that_empties_half_as_fast_is_known_after_enough_requests():
    learned, believed = Learned(), [1.0]
    for _ in range(ENOUGH):
        learned.observe("slow", waited(2.0), 0.0)
        learned.observe("usual", waited(1.0), 0.0)
        believed.append(waits(learned, slow=1000, usual=1000)["slow"])
    assert all(one < two for one, two in pairwise(believed))
    assert believed[-1] == pytest.approx(2.0)
    (best, _) = ranked(learned, slow=1000, usual=1900)
    assert best.name == "usual"
    (best, _) = ranked(Learned(), slow=1000, usual=1900)
    assert best.name == "slow"
    assert best.believed_s == best.wait_s
    assert ranked(learned, slow=1000)[0].believed_s == pytest.approx(1.0)


def test_a_queue_that_changes_its_pace_is_known_within_twenty_requests():
    learned = Learned()
    for times in [1.0] * 40 + [2.0] * 20:
        learned.observe("w", waited(times), 0.0)
    assert waits(learned, w=1000)["w"] == pytest.approx(2.0)


def test_one_request_alone_says_little():
    learned = Learned()
    learned.observe("w", waited(1000.0), 0.0)
    assert waits(learned, w=1000)["w"] < 2.0
    for _ in range(ENOUGH):
        learned.observe("w", waited(1.0), 0.0)
    assert waits(learned, w=1000)["w"] == pytest.approx(1.0)


@pytest.mark.parametrize("seed", range(5))
def test_workers_that_are_alike_count_alike_however_much_chance_there_is(seed: int):
    """The one before was computed by any part when a request came."""
    learned, rng = Learned(), Random(seed)
    names = [f"w{n}" for n in range(8)]
    for name in names:
        for _ in range(40):
            learned.observe(name, waited(rng.uniform(0.0, 1.0)), 0.0)
    found = waits(learned, **dict.fromkeys(names, 1000))
    assert max(found.values()) < 1.6 * min(found.values())
    for _ in range(40):
        learned.observe("w0", waited(3 * rng.uniform(0.0, 1.0)), 0.0)
    found = waits(learned, **dict.fromkeys(names, 1000))
    assert found["w0"] > 1.1 * max(wait for name, wait in found.items() if name != "w0")


def serve(rates: dict[str, float], requests: int = 300) -> dict[str, float]:
    """The share of requests that each worker gets; queues empty at so many times what is believed.

    Prompts of 1,000 tokens come four times as fast as one worker computes them; time is counted.
    """
    learned, rng = Learned(), Random(1)
    free = dict.fromkeys(rates, 0.0)
    got = dict.fromkeys(rates, 0)
    under_way: list[tuple[float, str, float, float]] = []
    for number in range(requests):
        now = number * 0.25
        for at, name, believed_s, since in sorted(under_way):
            if at <= now:
                learned.observe(
                    name,
                    Sample(1000, 1.0, believed_s=believed_s, waited_s=at - since - 1.0),
                    at,
                )
        under_way = [each for each in under_way if each[0] > now]
        candidates = [
            Candidate(
                name, Warmth(), sum(1000 for _, to, *_ in under_way if to == name),
                learned.rates(name, TOLD, now),
            )
            for name in rates
        ]  # fmt: skip
        best = rank(
            candidates, prompt_tokens=1000, block_tokens=100, block_nbytes=1000, behind=0.0,
            tie=rng.random,
        )[0]  # fmt: skip
        first = max(now, free[best.name]) + 1.0
        free[best.name] = max(now, free[best.name]) + 1.0 / rates[best.name]
        under_way.append((first, best.name, best.believed_s, now))
        got[best.name] += 1
    return {name: count / requests for name, count in got.items()}


def test_in_a_mixed_fleet_each_gets_what_its_queue_can_take():
    share = serve({"a": 1.0, "b": 1.0, "c": 0.5, "d": 0.5, "e": 1.0})
    assert max(share["c"], share["d"]) < 0.75 * min(share["a"], share["b"], share["e"])
    alike = serve({"a": 1.0, "b": 1.0, "c": 1.0, "d": 1.0, "e": 1.0})
    assert max(alike.values()) < 1.2 * min(alike.values())


def test_one_that_comes_new_is_taken_to_be_like_the_others():
    learned = Learned()
    for name in ("a", "b", "c"):
        for _ in range(ENOUGH):
            learned.observe(name, waited(2.0), 0.0)
    assert waits(learned, a=1000, new=1000) == {"a": 2.0, "new": 2.0}


def test_replicas_and_workers_learn_each_for_themselves():
    one, two = Learned(), Learned()
    for _ in range(ENOUGH):
        one.observe("a", waited(4.0), 0.0)
        one.observe("b", waited(1.0), 0.0)
    assert waits(one, a=1000, b=1000) == {"a": 4.0, "b": 1.0}
    assert waits(two, a=1000, b=1000) == {"a": 1.0, "b": 1.0}


def test_what_was_learned_of_a_queue_is_forgotten():
    learned = Learned()
    for _ in range(ENOUGH):
        learned.observe("w", waited(4.0), 0.0)
    assert waits(learned, FORGET_S - 1, w=1000)["w"] == pytest.approx(4.0)
    assert waits(learned, FORGET_S, w=1000)["w"] == 1.0
    assert learned.rates("w", TOLD, FORGET_S) is TOLD


@pytest.mark.parametrize(
    "nonsense",
    [
        Sample(1, 0.1, believed_s=1.0, waited_s=nan),
        Sample(1, 0.1, believed_s=1.0, waited_s=inf),
        Sample(1, 0.1, believed_s=nan, waited_s=1.0),
        Sample(1, 0.1, believed_s=inf, waited_s=1.0),
        Sample(1, 0.1, believed_s=-1.0, waited_s=1.0),
        Sample(1, 0.1, believed_s=LEAST_WAIT_S / 2, waited_s=60.0),
        Sample(1, 0.0, believed_s=1.0, waited_s=60.0),
    ],
)
def test_nonsense_teaches_nothing(nonsense: Sample):
    learned = Learned()
    for _ in range(3 * ENOUGH):
        learned.observe("w", nonsense, 0.0)
    assert learned.rates("w", TOLD, 0.0) == TOLD


def test_outliers_do_not_move_it_and_nothing_moves_it_out_of_its_bounds():
    learned = Learned()
    for times in [1.0] * 10 + [1000.0, -1000.0] * 3:
        learned.observe("w", waited(times), 0.0)
    assert waits(learned, w=1000)["w"] == pytest.approx(1.0)
    for _ in range(50):
        learned.observe("w", waited(1e6), 0.0)
        learned.observe("fast", waited(-1e6), 0.0)
    found = waits(learned, w=1000, fast=1000)
    assert found["w"] == pytest.approx(MOST_DRAIN)
    assert found["fast"] == pytest.approx(1 / MOST_DRAIN)


SAMPLES = st.builds(
    Sample,
    computed_tokens=st.floats(),
    prefill_s=st.floats(),
    load_s=st.floats(),
    decoding=st.integers(0, 2**32),
    drag=st.floats(0, 1),
    believed_s=st.floats(),
    waited_s=st.floats(),
)


@given(st.lists(SAMPLES, max_size=40))
def test_whatever_is_told_leaves_rates_that_can_be_used(samples: list[Sample]):
    learned = Learned()
    for sample in samples:
        learned.observe("w", sample, 0.0)
    rates = learned.rates("w", DRAG, 0.0)
    assert rates.drain == 0 or 1 / MOST_DRAIN <= rates.drain * 1.001 <= 1.002 * MOST_DRAIN
    assert 0 < rates.decode_drag <= MOST
    (choice,) = ranked(learned, w=1000)
    assert 0 <= choice.seconds < inf


def prefilled(learned: Learned, drag: float, decoding: int, noise: float = 1.0) -> None:
    """A prompt of 1,000 tokens on a worker that computes 2,000 a second where nobody decodes."""
    seconds = 0.5 * (1 + drag * decoding) * noise
    learned.observe("w", Sample(1000, seconds, decoding=decoding, drag=0.02), 0.0)


def test_what_decoding_costs_is_learned():
    learned, rng = Learned(), Random(1)
    for _ in range(WINDOW):
        prefilled(learned, 0.1, rng.randrange(30), rng.uniform(0.9, 1.1))
    assert learned.rates("w", DRAG, 0.0).decode_drag == pytest.approx(0.1, rel=0.25)


def test_until_enough_is_known_of_decoding_it_costs_what_is_usual():
    learned = Learned()
    for decoding in range(WINDOW - 1):
        prefilled(learned, 0.2, decoding)
    assert learned.rates("w", DRAG, 0.0).decode_drag == DRAG.decode_drag
    alike = Learned()
    for _ in range(2 * WINDOW):
        prefilled(alike, 0.2, 8)
    assert alike.rates("w", DRAG, 0.0).decode_drag == DRAG.decode_drag


def test_a_speed_is_the_one_without_what_is_decoded_beside():
    """It was counted twice: in the speed, and again in the score."""
    learned = Learned()
    for decoding in (50, 40, 60) * 8:
        prefilled(learned, 0.02, decoding)
    assert learned.rates("w", DRAG, 0.0).prefill_tokens_per_s == pytest.approx(2000)


def test_what_decoding_costs_is_forgotten_with_the_speed():
    learned = Learned()
    for decoding in range(WINDOW):
        prefilled(learned, 0.2, decoding)
    assert learned.rates("w", DRAG, 0.0).decode_drag > 0.1
    later = FORGET_S + 1
    for decoding in range(WINDOW - 1):
        learned.observe("w", Sample(1000, 0.5, decoding=decoding), later)
    assert learned.rates("w", DRAG, later).decode_drag == DRAG.decode_drag


def test_one_that_says_nothing_is_drawn_to_the_fleet_as_it_is_without_decoding():
    learned, silent = Learned(), Rates(decode_drag=0.02)
    for _ in range(3 * ENOUGH):
        learned.observe("a", Sample(1000, 2.0, decoding=50, drag=0.02), 0.0)
    learned.observe("new", Sample(1000, 1.0), 0.0)
    assert learned.rates("new", silent, 0.0).prefill_tokens_per_s == pytest.approx(1000)


def test_a_line_from_noise_alone_is_hardly_believed():
    drag, rng = Drag(), Random(1)
    for _ in range(WINDOW):
        drag.add(rng.choice((3, 4)), rng.uniform(0.5, 2.0))
    assert drag.value(0.02) == pytest.approx(0.02, abs=0.03)
    for decoding in range(WINDOW):  # the more decode, the faster it is: that cannot be
        drag.add(decoding, 1.0 / (1 + decoding))
    assert 0 < drag.value(0.02) < 0.02


def test_usual_rates_are_those_of_a_queue_that_keeps_its_word():
    assert DEFAULT_RATES.drain == 1.0
