"""How fast an engine has been, for the routers that choose among engines."""

from typing import Final

from kvtier.core.breakeven import as_first
from kvtier.core.tiers import Tier
from kvtier.engine.newest import Newest
from kvtier.engine.sequence import Started

LEAST_TOKENS: Final = 64  # fewer say nothing about speed
KEPT: Final = 9  # newest measurements that count
MOSTLY: Final = 0.9  # of what was restored came from one tier: then its time was that tier's


class Speeds:
    """Medians of prefill in tokens a second, and of restores from each tier in bytes.

    Prefill is as at the start of a prompt, see `kvtier.core.breakeven.as_first`.
    """

    def __init__(self, bytes_per_token: int, doubles_at: float = 0.0) -> None:
        self._bytes_per_token = bytes_per_token
        self._doubles_at = doubles_at
        self._prefill = Newest(KEPT)
        self._restore: dict[Tier, Newest] = {}

    @property
    def prefill(self) -> float:
        """Tokens a second; 0: not known yet."""
        return self._prefill.usual

    def measure(self, started: Started) -> None:
        """One request has begun to answer."""
        if started.computed_tokens >= LEAST_TOKENS and started.prefill_s > 0:
            start = started.prompt_tokens - started.computed_tokens
            tokens = as_first(start, started.prompt_tokens, self._doubles_at)
            self._prefill.measure(tokens / started.prefill_s)
        below = {tier: n for tier, n in started.restored.items() if tier is not Tier.VRAM}
        tokens = sum(below.values())
        if tokens < LEAST_TOKENS or started.restore_s <= 0:
            return
        tier = max(below, key=lambda each: below[each])
        if below[tier] >= MOSTLY * tokens:
            rate = tokens * self._bytes_per_token / started.restore_s
            self._restore.setdefault(tier, Newest(KEPT)).measure(rate)

    def restore(self, tier: Tier) -> float:
        """Bytes a second from this tier; 0: not known yet."""
        known = self._restore.get(tier)
        return known.usual if known is not None else 0.0
