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
from typing import Final

_DOUBT: Final = 8.0  # of a difference of nearly three times its error one half is believed
_ERROR: Final = (1.4826 * 1.2533) ** 2  # of a median, from the median deviation: Huber, 1981


def standing_out(factors: Collection[float], usual: float, enough: int) -> float:
    """The median of some factors, drawn to the `usual` one as far as chance explains it.

    Fewer than `enough` of them are drawn to it the more.
    """
    logs = [log(each) for each in factors]
    own, centre = median_low(logs), log(usual)
    apart = (own - centre) ** 2
    error = _ERROR * median_low([abs(each - own) for each in logs]) ** 2 / len(logs)
    share = min(1.0, len(logs) / enough)
    if error:
        share *= apart / (apart + _DOUBT * error)
    return exp(share * own + (1 - share) * centre)
