"""How long to wait before something is tried again: ever longer, until it has lasted."""

import random
from typing import Final

_MOST_TRIES: Final = 16  # that make a difference to a pause


class Pauses:
    """Those before the tries of one thing: twice as long each time, with jitter. Times in seconds.

    Args:
        first_s: The pause after something that has lasted.
        last_s: The longest.
        lasting_s: How long a try must hold to have been worth it; one that ends sooner, however
            well it began, was in vain.
        rng: Takes up to half of each pause off, so that many don't come at once.
    """

    def __init__(
        self, first_s: float, last_s: float, lasting_s: float, rng: random.Random
    ) -> None:  # fmt: skip
        self.tries = 0  # in vain, in a row
        self._first_s = first_s
        self._last_s = last_s
        self._lasting_s = lasting_s
        self._rng = rng
        self._since: float | None = None  # when the present try began to hold

    def holds(self, now: float) -> bool:
        """The present try does; whether it has now lasted."""
        if self._since is None:
            self._since = now
        if now - self._since < self._lasting_s:
            return False
        self.tries = 0
        return True

    def slow(self) -> None:
        """The next pause is as long as any: there is little hope."""
        while self.tries < _MOST_TRIES and self._pause_s() < self._last_s:
            self.tries += 1

    def next_s(self) -> float:
        """How long to wait now that the present try has ended."""
        pause = self._pause_s()
        self.tries = min(self.tries + 1, _MOST_TRIES)
        self._since = None
        return pause * self._rng.uniform(0.5, 1.0)

    def _pause_s(self) -> float:
        return min(self._last_s, self._first_s * 2.0**self.tries)
