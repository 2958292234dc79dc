"""What a log says of a member that is away: at once, then ever more rarely, and at its end."""

from typing import Final

AGAIN_S: Final = 60.0  # until it is said a second time; then twice as long each time
RAREST_S: Final = 3600.0
EXPECTED_S: Final = AGAIN_S  # for which somebody who is away may be restarting and is counted on


class Absence:
    """One member's. Time is passed in, in seconds."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._next = 0.0
        self._pause_s = AGAIN_S

    @property
    def over(self) -> bool:
        """Whether it is there, as far as is known."""
        return self._since is None

    def missed(self, now: float) -> float | None:
        """It is away: for how many seconds, where that is to be said now."""
        if self._since is None:
            self._since, self._next, self._pause_s = now, now, AGAIN_S
        if now < self._next:
            return None
        self._next = now + self._pause_s
        self._pause_s = min(RAREST_S, 2 * self._pause_s)
        return now - self._since

    def met(self, now: float) -> float | None:
        """It is there: after how many seconds, where it was away."""
        since, self._since = self._since, None
        return None if since is None else now - since
