"""When to leave a server alone. Pure: the time is an argument."""

from dataclasses import dataclass

FAILURES = 3  # in a row, after which a server is left alone


@dataclass(slots=True)
class Breaker:
    """Counts failures in a row; after FAILURES of them it is open.

    While it is open nobody may ask; when its time is over one caller may (the probe), and the
    others wait for what becomes of it. Each probe that fails doubles the time, up to `longest_s`.
    """

    shortest_s: float
    longest_s: float
    failures: int = 0
    until: float = 0.0
    probing: bool = False

    @property
    def open(self) -> bool:
        """Whether calls fail at once, but for a probe now and then."""
        return self.failures >= FAILURES

    def allow(self, now: float) -> bool:
        """Whether to ask at `now`; True obliges the caller to say how it went."""
        if not self.open:
            return True
        if self.probing or now < self.until:
            return False
        self.probing = True
        return True

    def succeeded(self) -> None:
        """The server answered."""
        self.failures = 0
        self.probing = False

    def failed(self, now: float) -> bool:
        """It did not; True where this opens the breaker."""
        was_open = self.open
        if was_open and not self.probing:
            return False  # a straggler that had begun before
        self.probing = False
        self.failures += 1
        if not self.open:
            return False
        doubled = self.shortest_s * 2.0 ** min(self.failures - FAILURES, 16)
        self.until = now + min(doubled, self.longest_s)
        return not was_open
