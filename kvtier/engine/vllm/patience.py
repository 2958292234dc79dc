"""How long the steps of an engine may wait for answers, where a step more would cost longer."""

from collections.abc import Callable
from typing import Final

WAIT_S: Final = 0.002  # for one answer where it has nothing to compute: as an empty step takes
IDLE_S: Final = 0.016  # in all the waits of a step in which the engine has nothing to compute
BUSY_SHARE: Final = 0.1  # of what it computed in the step before, where it has,
BUSY_S: Final = 0.005  # and no more than this
PAUSE_S: Final = 1.0  # without waits in an engine that computes, after one in vain,
MAX_PAUSE_S: Final = 30.0  # and twice as long after each one more, up to this


class Patience:
    """The waits of one step after the other; no wait is made here.

    A request that waits for its answer until the next step loses a step to all its answers, and
    the engine one in which it could have computed more at once. So each step may wait a little;
    where no answer comes, no more in that step, and for a second or more only in idle ones: a
    daemon that hangs costs an engine that computes 5 ms at most, less and less often. On cores that
    are all busy an answer takes as long as the scheduler of the system lets others compute, 3 ms.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._busy_from = clock()  # from when on an engine that computes may wait
        self._pause_s = PAUSE_S
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
        if self._idle:
            return min(WAIT_S, max(0.0, IDLE_S - self._waited))
        computed = now - self._began - self._waited
        return max(0.0, min(BUSY_S, computed * BUSY_SHARE) - self._waited)

    def waited(self, seconds: float, *, answered: bool) -> None:
        """A wait has ended."""
        if answered:
            self._pause_s = PAUSE_S
        else:
            self._over = True
            if not self._waited:  # the others have only what a crowd has left of it
                self._busy_from = self._clock() + self._pause_s
                if not self._idle:
                    self._pause_s = min(2 * self._pause_s, MAX_PAUSE_S)
        self._waited += seconds
