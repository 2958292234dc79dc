"""What completed requests teach the router about its workers."""

import pytest

from kvtier.core.learned import FORGET_S, Learned, Sample
from kvtier.core.score import Rates
from kvtier.core.tiers import Tier

TOLD = Rates(prefill_tokens_per_s=500.0, host_bytes_per_s=1e9)


def test_speeds_come_from_requests_and_follow_them():
    learned = Learned()
    learned.observe("w", Sample(1000, 1.0, ((Tier.HOST, 10**9),), 0.5), 0.0)
    rates = learned.rates("w", TOLD, 1.0)
    assert rates.prefill_tokens_per_s == pytest.approx(1000)
    assert rates.host_bytes_per_s == pytest.approx(2e9)
    assert rates.disk_bytes_per_s == 0
    for second in range(20):  # it becomes four times as slow
        learned.observe("w", Sample(1000, 4.0), float(second))
    assert learned.rates("w", TOLD, 20.0).prefill_tokens_per_s == pytest.approx(250, rel=0.01)
    assert learned.rates("other", TOLD, 20.0) is TOLD


def test_a_slow_past_is_forgotten():
    learned = Learned()
    learned.observe("w", Sample(1000, 6000.0), 0.0)
    assert learned.rates("w", TOLD, FORGET_S - 1).prefill_tokens_per_s < 1
    assert learned.rates("w", TOLD, FORGET_S) == TOLD
    learned.observe("w", Sample(1000, 1.0), FORGET_S + 1)  # nothing of the past is in the mean
    assert learned.rates("w", TOLD, FORGET_S + 2).prefill_tokens_per_s == pytest.approx(1000)
    learned.keep_only(["w", "other"])
    assert learned.rates("w", TOLD, FORGET_S + 2) is not TOLD
    learned.keep_only(["other"])
    assert learned.rates("w", TOLD, FORGET_S + 2) is TOLD


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
