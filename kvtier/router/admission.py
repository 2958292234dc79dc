"""Who may be served now, who waits, and who is sent away with a time to come again."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Final

from kvtier import metrics
from kvtier.errors import Overloaded

RETRY_S: Final = (0.1, 30.0)  # the hint's limits
_KEEP: Final = 0.9  # of the mean of what was seen, at each new figure
FORGET_S: Final = 30.0  # after so long with places free the pace before says nothing any more


class Admission:
    """At most `places` requests under way, and `queue` more that wait, first come first served.

    A request is refused rather than queued when its deadline would pass before its turn comes, as
    far as the pace of the last requests tells: the pace while all places were taken, which is
    forgotten when some were free for FORGET_S. Lives on one loop; time is passed in as `clock`.
    """

    def __init__(self, places: int, queue: int, clock: Callable[[], float]) -> None:
        self._places = places
        self._queue = queue
        self._clock = clock
        self._running = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._gap_s = 0.0  # mean time between two places that became free while all were taken
        self._freed_at = 0.0  # the last of them, or when the last place was taken
        self._spare_at = 0.0  # since when there are places free

    @asynccontextmanager
    async def place(self, deadline: float, *, wait: bool) -> AsyncIterator[None]:
        """A place for as long as the context lasts, at once or, with `wait`, when it is free.

        Raises:
            Overloaded: No place, and none to wait for before `deadline` on the clock.
        """
        if self._running >= self._places:
            await self._turn(deadline, wait)  # whoever leaves hands its place on
        else:
            self._take()
        metrics.RUNNING.set(self._running)
        try:
            yield
        finally:
            self._leave()

    def expected_s(self) -> float:
        """When somebody who comes now would get a place, by the pace of the last ones."""
        return self._gap_s * (len(self._waiting) + 1)

    def _take(self) -> None:
        self._running += 1
        if self._running >= self._places:
            self._freed_at = self._clock()
            if self._freed_at - self._spare_at > FORGET_S:
                self._gap_s = 0.0

    async def _turn(self, deadline: float, wait: bool) -> None:
        queued = len(self._waiting)
        if not wait or queued >= self._queue:
            full = f" and {queued} waiting, which is max_waiting" if wait and self._queue else ""
            self._refuse(f"router: {self._places} requests under way, which is max_requests{full}")
        if self.expected_s() > deadline - self._clock():
            self._refuse(
                f"router: {queued} requests wait, so its turn would come in about "
                f"{self.expected_s():.1f} s, after its deadline"
            )
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        metrics.WAITING.set(len(self._waiting))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # it came just now: hand it on
                self._leave()
            else:
                with suppress(ValueError):  # a place that became free passed it over already
                    self._waiting.remove(turn)
            raise
        finally:
            metrics.WAITING.set(len(self._waiting))

    def _refuse(self, line: str) -> None:
        metrics.SHED.inc()
        low, high = RETRY_S
        raise Overloaded(line, min(high, max(low, self.expected_s())))

    def _leave(self) -> None:
        now = self._clock()
        full = self._running >= self._places
        if full:  # the pace of requests that found places says nothing
            gap_s = now - self._freed_at
            self._gap_s = _KEEP * self._gap_s + (1 - _KEEP) * gap_s if self._gap_s else gap_s
            self._freed_at = now
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._running -= 1
        metrics.RUNNING.set(self._running)
        if full:
            self._spare_at = now
