"""How much longer a worker's requests wait than was believed, told from chance.

What was believed is wrong by another factor each time: a request that came when the one before it
was half done waited half as long. If workers that are alike were ranked by the medians of their
last few such factors, chance would send prompts away from where they are warm. So a worker is
taken to be like its fleet as far as its difference is small against its own noise: the James-Stein
idea (Efron and Morris, 1975), in logarithms, with medians in place of means.
"""

from collections.abc import Collection
from math import exp, log
from statistics import median_low
from typing import Final, NamedTuple

_DOUBT: Final = 8.0  # of a difference of nearly three times its error one half is believed
_ERROR: Final = (1.4826 * 1.2533) ** 2  # of a median, from the median deviation: Huber, 1981


class Factors(NamedTuple):
    """What is known of a worker's last factors, at least one."""

    middle: float  # the logarithm of their median
    error: float  # of that, squared
    seen: int

    @classmethod
    def of(cls, factors: Collection[float]) -> "Factors":
        """Of these."""
        logs = [log(each) for each in factors]
        middle = median_low(logs)
        deviation = median_low([abs(each - middle) for each in logs])
        return cls(middle, _ERROR * deviation**2 / len(logs), len(logs))

    def standing_out(self, usual: float, enough: int) -> float:
        """The median, drawn to the `usual` factor as far as chance explains the difference.

        Fewer than `enough` factors are drawn to it the more.
        """
        centre = log(usual)
        apart = (self.middle - centre) ** 2
        share = min(1.0, self.seen / enough)
        if self.error:
            share *= apart / (apart + _DOUBT * self.error)
        return exp(share * self.middle + (1 - share) * centre)
