"""How long the steps of an engine may wait for answers, where a step more would cost longer."""

from collections.abc import Callable
from typing import Final

WAIT_S: Final = 0.002  # for one request's answer: what an empty step takes, at most
IDLE_S: Final = 0.016  # in all the waits of a step in which the engine has nothing to compute
BUSY_SHARE: Final = 0.1  # of what it computed in the step before, where it has,
BUSY_S: Final = 0.005  # and no more than this
PAUSE_S: Final = 1.0  # without waits in an engine that computes, after one in vain


class Patience:
    """The waits of one step after the other; no wait is made here.

    A request that waits for its answer until the next step loses a step to all its answers, and
    the engine one in which it could have computed more at once. So each step may wait a little;
    where no answer comes, no more in that step, and for a second only in idle ones: a daemon that
    hangs costs an engine that computes 2 ms a second.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._busy_from = clock()  # from when on an engine that computes may wait
        self.step(idle=False)

    def step(self, *, idle: bool) -> None:
        """A step begins to compute something, or has nothing to (`idle`); waits are of the next."""
        self._idle = idle
        self._began = self._clock()
        self._waited = 0.0
        self._over = False

    @property
    def limit_s(self) -> float:
        """How long the next wait may take; 0 where there may be none."""
        now = self._clock()
        if self._over or (now < self._busy_from and not self._idle):
            return 0.0
        computed = now - self._began - self._waited
        most = IDLE_S if self._idle else min(BUSY_S, computed * BUSY_SHARE)
        return min(WAIT_S, max(0.0, most - self._waited))

    def waited(self, seconds: float, *, answered: bool) -> None:
        """A wait has ended."""
        if not answered:
            self._over = True
            if not self._waited:  # the others have only what a crowd has left of it
                self._busy_from = self._clock() + PAUSE_S
        self._waited += seconds
