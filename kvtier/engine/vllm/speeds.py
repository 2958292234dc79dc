"""How fast an engine has been, for the routers that choose among engines."""

from typing import Final

from kvtier.core.tiers import Tier
from kvtier.engine.sequence import Started

LEAST_TOKENS: Final = 64  # fewer say nothing about speed
SHARE: Final = 0.2  # of the newest measurement in the mean
MOSTLY: Final = 0.9  # of what was restored came from one tier: then its time was that tier's


class Speeds:
    """Moving means of prefill in tokens a second, and of restores from each tier in bytes."""

    def __init__(self, bytes_per_token: int) -> None:
        self._bytes_per_token = bytes_per_token
        self.prefill = 0.0  # 0: not known yet
        self._restore: dict[Tier, float] = {}

    def measure(self, started: Started) -> None:
        """One request has begun to answer."""
        if started.computed_tokens >= LEAST_TOKENS and started.prefill_s > 0:
            self.prefill = _mean(self.prefill, started.computed_tokens / started.prefill_s)
        below = {tier: n for tier, n in started.restored.items() if tier is not Tier.VRAM}
        tokens = sum(below.values())
        if tokens < LEAST_TOKENS or started.restore_s <= 0:
            return
        tier = max(below, key=lambda each: below[each])
        if below[tier] >= MOSTLY * tokens:
            rate = tokens * self._bytes_per_token / started.restore_s
            self._restore[tier] = _mean(self._restore.get(tier, 0.0), rate)

    def restore(self, tier: Tier) -> float:
        """Bytes a second from this tier; 0: not known yet."""
        return self._restore.get(tier, 0.0)


def _mean(before: float, now: float) -> float:
    return now if not before else before + SHARE * (now - before)
