"""How fast a tier's loads have been, as their readers see it."""

from typing import Final

FORGET_S: Final = 30.0  # then a tier is tried again before it is judged
_DECAY: Final = 0.8
_STRETCH_S: Final = 1.0  # of being busy without a pause, as one


class Speed:
    """Seconds that a block takes from one tier: the time in which it was busy, by blocks.

    All times are seconds of one monotonic clock.
    """

    def __init__(self) -> None:
        self._under_way = 0
        self._since = 0.0  # since when something is under way
        self._loaded = 0  # in this stretch of being busy
        self._blocks = 0.0  # in earlier ones, the newest counting most
        self._seconds = 0.0
        self._at = float("-inf")

    def begin(self, now: float) -> None:
        """A load has been started."""
        if not self._under_way:
            self._since, self._loaded = now, 0
        self._under_way += 1

    def end(self, now: float, *, ok: bool) -> None:
        """A load has ended."""
        self._under_way -= 1
        self._loaded += ok
        if (self._under_way and now - self._since < _STRETCH_S) or not self._loaded:
            return
        self._blocks = self._blocks * _DECAY + self._loaded
        self._seconds = self._seconds * _DECAY + (now - self._since)
        self._at = now
        self._since, self._loaded = now, 0

    def seconds_a_block(self, now: float) -> float:
        """Of late; 0 where nothing was measured in the last FORGET_S."""
        if not self._blocks or now - self._at > FORGET_S:
            return 0.0
        return self._seconds / self._blocks
