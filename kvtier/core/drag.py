"""By how much each request in decode slows a worker's prefills, from the last of them.

A resistant line (Tukey, Exploratory Data Analysis, 1977) through seconds a token over the number
of requests in decode: the medians of the third with the fewest of these and of the third with the
most. How far it is believed depends on how far apart these thirds are: between 3 and 4 requests
chance does more than they do. Speeds are of the same line, so that where it is wrong what it says
of as many requests as usual is right.
"""

from collections import deque
from itertools import islice
from statistics import median_low
from typing import Final

WINDOW: Final = 48  # prefills
MOST: Final = 0.5
_LEAST: Final = 0.001  # 0 would mean that it is not known
_HALF: Final = 8.0  # requests between the thirds at which the line counts as much as the prior


class Drag:
    """The last prefills of one worker."""

    def __init__(self) -> None:
        self._newest: deque[tuple[int, float]] = deque(maxlen=WINDOW)
        self._line: tuple[float, float] | None = None  # how far it is believed, and its share

    def add(self, decoding: int, cost: float) -> None:
        """A prefill took `cost` seconds a token while so many requests were in decode."""
        self._newest.append((decoding, cost))
        self._line = None

    def alone(self, share: float, most: int) -> list[float]:
        """The newest costs, at most so many, as with nobody in decode if each adds `share`."""
        newest = islice(reversed(self._newest), most)
        return [cost / (1 + share * decoding) for decoding, cost in newest]

    def value(self, prior: float) -> float:
        """The share of its own time by which each of them lengthens a prefill: 0.001 to 0.5.

        `prior` where fewer than WINDOW prefills are known.
        """
        if self._line is None:
            self._line = self._draw()
        believed, share = self._line
        return believed * share + (1 - believed) * prior

    def _draw(self) -> tuple[float, float]:
        if len(self._newest) < WINDOW:
            return 0.0, 0.0
        ordered = sorted(self._newest)
        few, many = ordered[: WINDOW // 3], ordered[-(WINDOW // 3) :]
        low, high = (median_low(decoding for decoding, _ in third) for third in (few, many))
        apart = high - low
        if not apart:
            return 0.0, 0.0
        cheap, dear = (median_low(cost for _, cost in third) for third in (few, many))
        slope = (dear - cheap) / apart
        alone = median_low(cost - slope * decoding for decoding, cost in ordered)
        line = slope / alone if alone > 0 else MOST
        return apart * apart / (apart * apart + _HALF * _HALF), min(MOST, max(_LEAST, line))
