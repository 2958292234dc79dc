"""How many requests wait for one that is placed now: lambda of the score, as the load has it."""

from typing import Final

_WEIGHT: Final = 0.01  # of the latest in the running share
_BUSIEST: Final = 0.99


class Behind:
    """Learns lambda from how many of the workers were busy at each decision.

    It is the mean number that waits in an M/M/1 queue which is busy for that share of the time,
    `share**2 / (1 - share)`, at most `most`. Where nobody waits, a second of work that is saved
    is a second for one request; near saturation it is a second for many, and warmth is worth more.
    """

    def __init__(self, most: float) -> None:
        self._most = most
        self._share = 0.0
        self._seen = 0

    def see(self, busy: int, workers: int) -> None:
        """At a decision `busy` of the `workers` had prompts to compute."""
        if workers:
            self._seen += 1
            weight = max(_WEIGHT, 1 / self._seen)
            self._share += weight * (busy / workers - self._share)

    @property
    def value(self) -> float:
        """Lambda now."""
        share = min(_BUSIEST, self._share)
        return min(self._most, share * share / (1 - share))
