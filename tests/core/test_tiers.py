"""Tier names and limits."""

import pytest

from kvtier.core.tiers import Tier, TierSpec


def test_tiers_are_ordered_from_warm_to_cold_and_named_for_people():
    assert sorted(Tier) == [Tier.VRAM, Tier.HOST, Tier.DISK, Tier.SHARED]
    assert [tier.label for tier in Tier] == ["vram", "host", "disk", "shared"]


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"capacity": 0, "drain_at": 0}, "disk tier: capacity is 0"),
        ({"capacity": 1, "drain_at": -1}, "disk tier: drain_at is -1"),
        ({"capacity": 1, "drain_at": 0, "queue": 0}, "disk tier: queue is 0"),
    ],
)
def test_a_limit_without_sense_is_named(limits, message):
    with pytest.raises(ValueError, match=message):
        TierSpec(tier=Tier.DISK, **limits)


def test_only_the_shared_tier_is_shared():
    specs = [TierSpec(tier=tier, capacity=1, drain_at=0) for tier in Tier]
    assert [spec.shared for spec in specs] == [False, False, False, True]
