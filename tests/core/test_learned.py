"""What completed requests teach the router about its workers."""

import pytest

from kvtier.core.audience import Warmth
from kvtier.core.learned import ENOUGH, FORGET_S, Learned, Sample
from kvtier.core.score import DEFAULT_RATES, Candidate, Rates, rank
from kvtier.core.tiers import Tier

TOLD = Rates(prefill_tokens_per_s=500.0, host_bytes_per_s=1e9)


def taught(learned: Learned, worker: str, *samples: Sample, now: float = 0.0) -> Learned:
    for sample in samples:
        learned.observe(worker, sample, now)
    return learned


def test_speeds_come_from_requests_and_follow_them():
    learned = Learned()
    usual = Sample(1000, 1.0, ((Tier.HOST, 10**9),), 0.5)
    taught(learned, "w", *[usual] * ENOUGH)
    rates = learned.rates("w", TOLD, 1.0)
    assert rates.prefill_tokens_per_s == pytest.approx(1000)
    assert rates.host_bytes_per_s == pytest.approx(2e9)
    assert rates.disk_bytes_per_s == 0
    for second in range(20):  # it becomes four times as slow
        learned.observe("w", Sample(1000, 4.0), float(second))
    assert learned.rates("w", TOLD, 20.0).prefill_tokens_per_s == pytest.approx(250)
    assert learned.rates("other", TOLD, 20.0) is TOLD


def test_a_slow_past_is_forgotten():
    learned = taught(Learned(), "w", *[Sample(1000, 6000.0)] * ENOUGH)
    assert learned.rates("w", TOLD, FORGET_S - 1).prefill_tokens_per_s < 1
    assert learned.rates("w", TOLD, FORGET_S) == TOLD
    # Nothing of the past is in the median.
    taught(learned, "w", *[Sample(1000, 1.0)] * ENOUGH, now=FORGET_S + 1)
    assert learned.rates("w", TOLD, FORGET_S + 2).prefill_tokens_per_s == pytest.approx(1000)
    learned.keep_only(["w", "other"])
    assert learned.rates("w", TOLD, FORGET_S + 2) is not TOLD
    learned.keep_only(["other"])
    assert learned.rates("w", TOLD, FORGET_S + 2) is TOLD


def test_each_request_draws_a_worker_from_its_own_word_to_what_it_does():
    learned, before = Learned(), TOLD.prefill_tokens_per_s
    for _ in range(ENOUGH):
        learned.observe("w", Sample(1000, 0.5), 0.0)
        rate = learned.rates("w", TOLD, 0.0).prefill_tokens_per_s
        assert before < rate < 2001
        before = rate
    assert before == pytest.approx(2000)


def test_a_worker_that_says_nothing_is_drawn_to_the_fleet_and_few_to_the_usual():
    learned, silent = Learned(), Rates()
    learned.observe("a", Sample(1000, 10.0), 0.0)  # the only one: 100 tokens a second
    alone = learned.rates("a", silent, 0.0).prefill_tokens_per_s
    assert 1000 < alone < DEFAULT_RATES.prefill_tokens_per_s
    for other in ("b", "c"):
        taught(learned, other, *[Sample(1000, 2.0)] * ENOUGH)
    taught(learned, "d", Sample(1000, 2000.0))
    assert 150 < learned.rates("d", silent, 0.0).prefill_tokens_per_s < 500
    assert learned.rates("b", silent, 0.0).prefill_tokens_per_s == pytest.approx(500)


def test_rates_follow_a_new_word_and_the_passing_of_time_at_once():
    learned = taught(Learned(), "w", Sample(1000, 1.0))
    once = learned.rates("w", TOLD, 0.0)
    assert learned.rates("w", TOLD, 0.5) is once
    other = Rates(prefill_tokens_per_s=50.0, host_bytes_per_s=3e9, decode_drag=0.5)
    changed = learned.rates("w", other, 0.5)
    assert changed.prefill_tokens_per_s < once.prefill_tokens_per_s
    assert (changed.host_bytes_per_s, changed.decode_drag) == (3e9, 0.5)
    assert learned.rates("w", other, FORGET_S - 0.1) != other
    assert learned.rates("w", other, FORGET_S) == other


# Tokens a second, bytes a second from host memory, bytes of a token.
MACHINES = {"gpu": (10_000.0, 20e9, 131_072), "cpu": (700.0, 1e9, 46_080)}
TOKENS, BLOCK = 320, 16


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("before", [0, 1, 2, ENOUGH])
@pytest.mark.parametrize("wrong", ["warm's load", "warm's prefill", "cold's prefill"])
@pytest.mark.parametrize("factor", [0.2, 30.0, 300.0])
def test_no_single_measurement_sends_a_prompt_away_from_where_it_is_warm(
    machine: str, before: int, wrong: str, factor: float
) -> None:
    tokens_per_s, bytes_per_s, nbytes = MACHINES[machine]
    learned = Learned()

    def prefill(times: float = 1.0) -> Sample:
        return Sample(TOKENS, times * TOKENS / tokens_per_s)

    def load(times: float = 1.0) -> Sample:
        loaded = TOKENS * nbytes
        return Sample(1, 0.0, ((Tier.HOST, loaded),), times * loaded / bytes_per_s)

    for worker in ("warm", "cold"):
        taught(learned, worker, *[prefill()] * before, *[load()] * before)
    learned.observe(wrong.split("'")[0], (load if "load" in wrong else prefill)(factor), 0.0)
    candidates = [
        Candidate(name, warmth, rates=learned.rates(name, Rates(), 0.0))
        for name, warmth in (("warm", Warmth(host=TOKENS // BLOCK)), ("cold", Warmth()))
    ]
    best, _ = rank(
        candidates, prompt_tokens=TOKENS + 4, block_tokens=BLOCK, block_nbytes=nbytes * BLOCK,
        behind=0.0, tie=lambda: 0.5,
    )  # fmt: skip
    assert best.name == "warm"


def test_what_says_nothing_teaches_nothing():
    learned = Learned()
    mixed = ((Tier.HOST, 10**9), (Tier.DISK, 10**9))
    for sample in (Sample(0, 1.0), Sample(100, 0.0), Sample(100, float("nan")),
                   Sample(0, 0.0, mixed, 1.0), Sample(0, 0.0, ((Tier.VRAM, 5),), 1.0)):  # fmt: skip
        learned.observe("w", sample, 0.0)
    assert learned.rates("w", TOLD, 0.0) == TOLD


def test_a_few_computed_tokens_teach_no_speed() -> None:
    """A restored prompt's last tokens take about as long as one token does."""
    learned = Learned()
    learned.observe("w", Sample(40, 0.5), 0.0)
    assert learned.rates("w", TOLD, 1.0).prefill_tokens_per_s == TOLD.prefill_tokens_per_s


def test_a_small_load_teaches_no_speed() -> None:
    """Most of its time is the way there and back."""
    learned = taught(Learned(), "w", Sample(1, 0.0, ((Tier.HOST, 100_000),), 0.01))
    assert learned.rates("w", TOLD, 0.0) is TOLD
