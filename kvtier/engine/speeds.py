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
        self._bytes_per_s: dict[Tier, float] = {}

    def measure(self, sources: Sequence[Tier], seconds: float) -> None:
        """Learn from a read whose blocks came from `sources`, if one tier had them all."""
        if len(sources) < 2 or seconds <= 0:
            return
        tier = sources[0]
        if any(each is not tier for each in sources):
            return
        speeds = self._speeds.setdefault(tier, Newest(_RATES))
        speeds.measure(len(sources) * self._block_nbytes / seconds)
        if speeds.usual:
            self._bytes_per_s[tier] = speeds.usual

    def bytes_per_s(self) -> dict[Tier, float]:
        """Of each tier that is known, waiting included."""
        return dict(self._bytes_per_s)
