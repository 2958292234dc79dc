"""What is usual of something measured again and again, as routers are told of it."""

from collections import deque
from statistics import median
from typing import Final

FEW: Final = 3  # measurements: fewer may all be of a machine that was busy with something else


class Newest:
    """The median of the newest `keep` measurements."""

    def __init__(self, keep: int) -> None:
        self._measured: deque[float] = deque(maxlen=keep)

    def measure(self, value: float) -> None:
        """One more."""
        self._measured.append(value)

    @property
    def usual(self) -> float:
        """0 where there are fewer than FEW. Worked out when it is asked for, by any thread."""
        measured = [*self._measured]
        # Not the mean: other work on the machine makes a few very slow.
        return median(measured) if len(measured) >= FEW else 0.0
