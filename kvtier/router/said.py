"""What the log says of one member: each thing once, and again only where it is news."""

import logging
import re

from kvtier.router.absence import Absence
from kvtier.router.feed import FeedGap

log = logging.getLogger(__name__)


class Said:
    """One member's; `name` is what it is called in a line. Times are passed in, in seconds."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._absence = Absence()
        self._blamed = ""
        self._refused = ""  # in which way its feed was, last time

    def away(self, why: str, now: float) -> None:
        """It cannot be reached."""
        away_s = self._absence.missed(now)
        if away_s is not None:
            how = f"still away after {away_s:.0f} s" if away_s else "away"
            log.info("%s is %s: %s", self._name, how, why)

    def back(self, now: float) -> None:
        """It takes requests."""
        away_s = self._absence.met(now)
        if away_s is not None:
            log.info("%s is there, after %.1f s", self._name, away_s)

    def late(self, after_s: float) -> None:
        """It has not told yet all that it holds."""
        log.warning(
            "%s: has not told all that it holds within %g s; not waited for", self._name, after_s
        )

    def blame(self, why: str) -> None:
        """What a person must change for it to be reached; empty: nothing that is known."""
        if why != self._blamed:
            self._blamed = why
            if why:
                log.warning("%s: %s", self._name, why)

    def gap(self, gap: FeedGap) -> None:
        """Its feed is watched anew."""
        if _way(gap) != self._refused:
            log.warning("%s: %s; watching anew", self._name, gap)

    def refused(self, gap: FeedGap) -> bool:
        """Its feed breaks the protocol; whether it did so in the same way before."""
        if _way(gap) == self._refused:
            return True
        self.gap(gap)
        self._refused = _way(gap)
        return False

    def lasts(self) -> None:
        """It was followed for a good while: whatever was wrong with it has been mended."""
        if self._refused:
            log.info("%s: its feed is in order again", self._name)
        self._refused = self._blamed = ""


def _way(gap: FeedGap) -> str:
    """How a feed broke; the numbers change with what its source holds."""
    return re.sub(r"\d+", "0", str(gap))
