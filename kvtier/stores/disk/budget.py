"""How much may be written a day, for the life of an SSD. Pure: the time is passed in."""

from typing import Final

DAY_S: Final = 86_400.0
_BURST_S: Final = 3_600.0  # saved up at most: a quiet night does not pay for a whole day


class WriteBudget:
    """A token bucket over bytes; it starts full, with an hour's worth.

    Args:
        bytes_per_day: What a day may cost; 0: no limit.
        now_s: Seconds of the clock that later calls read, too.
    """

    def __init__(self, bytes_per_day: int, now_s: float) -> None:
        self._rate = bytes_per_day / DAY_S
        self._most = self._left = self._rate * _BURST_S
        self._at_s = now_s

    def spend(self, nbytes: int, now_s: float) -> bool:
        """Whether `nbytes` may be written now; if so they are spent.

        One write may be larger than all that can be saved up: then a full bucket lets it through
        and is in debt for it.
        """
        if not self._rate:
            return True
        self._earn(now_s)
        if self._left < min(nbytes, self._most):
            return False
        self._left -= nbytes
        return True

    def charge(self, nbytes: int, now_s: float) -> None:
        """Bytes that had to be written without asking: headers erased, records moved."""
        if self._rate:
            self._earn(now_s)
            self._left -= nbytes

    def _earn(self, now_s: float) -> None:
        passed_s = max(0.0, now_s - self._at_s)  # a clock that jumps back earns nothing
        self._at_s = now_s
        self._left = min(self._most, self._left + passed_s * self._rate)
