"""How fast an engine's restores from each tier have been, as routers are told of it."""

from collections.abc import Sequence
from typing import Final

from kvtier.core.tiers import Tier
from kvtier.engine.newest import Newest

_RATES: Final = 8  # newest measurements of a tier's speed that count


class TierSpeeds:
    """Learned by one thread; any thread may ask.

    Args:
        block_nbytes: Of the engine's blocks.
    """

    def __init__(self, block_nbytes: int) -> None:
        self._block_nbytes = block_nbytes
        self._speeds: dict[Tier, Newest] = {}

    def measure(self, sources: Sequence[Tier], seconds: float) -> None:
        """Learn from a read whose blocks came from `sources`, if one tier had them all."""
        if len(sources) < 2 or seconds <= 0:
            return
        tier = sources[0]
        if sources.count(tier) < len(sources):
            return
        if tier not in self._speeds:
            self._speeds[tier] = Newest(_RATES)
        self._speeds[tier].measure(len(sources) * self._block_nbytes / seconds)

    def bytes_per_s(self) -> dict[Tier, float]:
        """Of each tier that is known, waiting included."""
        usual = {tier: speeds.usual for tier, speeds in [*self._speeds.items()]}
        return {tier: speed for tier, speed in usual.items() if speed}
