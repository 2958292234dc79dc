"""How fast each worker was with its last requests, so that a mixed fleet needs no tuning.

What a unit costs on a worker (seconds a token, seconds a byte, seconds a second of believed wait)
is the median of its last requests: one that was held up does not count. As long as there are fewer
than ENOUGH of them, the worker is thought to be partly what is usual: by its own word, else by
what all workers' requests taught, and as long as there are few of those too, by `DEFAULT_RATES`.
So no single measurement sends a prompt away from where it is warm. (Shrinkage: Efron and Morris,
1975; in logarithms, as a speed is wrong by a factor.)

How fast a queue empties (`Rates.drain`) is what a request waited for its turn against what stood
before it when it was sent, by the tokens that were known to wait and the worker's speed. Whatever
makes these two differ goes in: work that nobody told of, batches that go faster than one after the
other, the half of a long prefill that is done already when the next prompt comes. As this differs
much from one request to the next, a worker counts as its fleet as far as it does not stand out of
its own noise (kvtier.core.drain).

What is learned counts for FORGET_S after the last request that taught it. Then the worker's own
word, or else what is usual, counts again: a worker that was slow once gets no requests that could
show that it is fast now, so its past must not be held against it for ever.
"""

from collections import deque
from collections.abc import Collection
from dataclasses import fields
from math import exp, isfinite, log
from statistics import median_low
from typing import Final, NamedTuple

from kvtier.core.drag import Drag
from kvtier.core.drain import Factors
from kvtier.core.score import DEFAULT_RATES, Rates
from kvtier.core.tiers import Tier

FORGET_S: Final = 30.0
ENOUGH: Final = 8  # requests, from which on only they count
MOST_DRAIN: Final = 8.0  # times as fast, or as slow, as believed
LEAST_WAIT_S: Final = 0.05  # of a believed wait: beside a shorter one the way there counts
_NEWEST: Final = 9  # requests that count
_NEWEST_WAITS: Final = 33  # they differ more, by what of the first in the queue was done already
_AFRESH_S: Final = 1.0  # so long the other workers' requests may go unnoticed
_LEAST_TOKENS: Final = 128  # of a prefill: fewer take about as long as one, and teach no speed
_LEAST_NBYTES: Final = 1 << 20  # of a load, likewise
_LEAST_S: Final = 0.001  # a shorter time says nothing about a speed

_OF_TIER: Final = {
    Tier.HOST: "host_bytes_per_s",
    Tier.DISK: "disk_bytes_per_s",
    Tier.SHARED: "shared_bytes_per_s",
}
_RATES: Final = tuple(each.name for each in fields(Rates) if each.init)


class Sample(NamedTuple):
    """What one request took on a worker, up to its first token.

    The last four are what its router believed when it sent it there, and how long it waited then
    besides its own load and prefill.
    """

    computed_tokens: float  # as many at the start of a prompt (`breakeven.as_first`)
    prefill_s: float
    loaded: tuple[tuple[Tier, int], ...] = ()  # bytes from each lower tier
    load_s: float = 0.0
    decoding: int = 0  # requests
    drag: float = 0.0  # `Rates.decode_drag`
    believed_s: float = 0.0  # `Choice.believed_s`
    waited_s: float = 0.0


class _Costs(NamedTuple):
    newest: deque[float]  # seconds a unit
    last: float  # when the newest came


class _Made(NamedTuple):
    told: Rates
    until: float
    rates: Rates


class _Worker:
    """The newest costs by the rate's name, and the rates that were last made of them."""

    def __init__(self) -> None:
        self.costs: dict[str, _Costs] = {}
        self.drag = Drag()
        self.waits: Factors | None = None  # of what "drain" costs
        self.made: _Made | None = None

    def teach(self, name: str, amount: float, seconds: float, now: float) -> bool:
        """Whether it was learned from."""
        if not (0 < amount < 1e18 and _LEAST_S <= seconds < 1e6):
            return False
        most = _NEWEST_WAITS if name == "drain" else _NEWEST
        newest = self.newest(name, now) or deque(maxlen=most)
        newest.append(seconds / amount)
        if name == "drain":
            self.waits = Factors.of(newest)
        self.costs[name] = _Costs(newest, now)
        self.made = None
        return True

    def newest(self, name: str, now: float) -> deque[float] | None:
        """The costs that count at `now`."""
        known = self.costs.get(name)
        return known.newest if known is not None and now - known.last < FORGET_S else None


class Learned:
    """What requests taught about each worker. Time is passed in."""

    def __init__(self) -> None:
        self._workers: dict[str, _Worker] = {}
        self._fleet: dict[str, float] = {}  # `_usual` by the rate's name, as it was at `_fleet_at`
        self._fleet_at = 0.0

    def observe(self, worker: str, sample: Sample, now: float) -> None:
        """A request on `worker` got its first token.

        A load from several tiers at once tells the speed of none.
        """
        known = self._workers.setdefault(worker, _Worker())
        self._fleet.clear()
        if sample.computed_tokens >= _LEAST_TOKENS:
            self._prefilled(known, sample, now)
        if len(sample.loaded) == 1:
            ((tier, nbytes),) = sample.loaded
            if tier in _OF_TIER and nbytes >= _LEAST_NBYTES:
                known.teach(_OF_TIER[tier], nbytes, sample.load_s, now)
        believed_s = sample.believed_s
        told = sample.prefill_s > 0  # or its own work would look like waiting
        if told and believed_s >= LEAST_WAIT_S and isfinite(sample.waited_s):
            shortest, longest = believed_s / MOST_DRAIN, believed_s * MOST_DRAIN
            waited_s = min(max(sample.waited_s, shortest), longest)
            known.teach("drain", believed_s, waited_s, now)

    def _prefilled(self, known: _Worker, sample: Sample, now: float) -> None:
        """Its speed is the one without the requests that were in decode meanwhile."""
        if known.newest("prefill_tokens_per_s", now) is None:
            known.drag = Drag()
        amount = sample.computed_tokens * (1 + sample.drag * sample.decoding)
        if known.teach("prefill_tokens_per_s", amount, sample.prefill_s, now):
            known.drag.add(sample.decoding, sample.prefill_s / sample.computed_tokens)

    def rates(self, worker: str, told: Rates, now: float) -> Rates:
        """`told`, the worker's own word, with what was learned in its place."""
        known = self._workers.get(worker)
        if known is None:
            return told
        made = known.made
        if made is None or made.told is not told or now >= made.until:
            made = self._make(known, told, now)
            if not known.costs:
                del self._workers[worker]
                return told
            known.made = made
        return made.rates

    def keep_only(self, workers: Collection[str]) -> None:
        """All others are gone."""
        for worker in self._workers.keys() - set(workers):
            del self._workers[worker]

    def _make(self, known: _Worker, told: Rates, now: float) -> _Made:
        """Its rates now, and how long they are true; forgets what is past."""
        rates = {name: getattr(told, name) for name in _RATES}
        until = now + _AFRESH_S
        for name, costs in list(known.costs.items()):
            newest = known.newest(name, now)
            if newest is None:
                del known.costs[name]
                continue
            until = min(until, costs.last + FORGET_S)
            found: Collection[float] = newest
            if name == "drain" and known.waits is not None:
                rates[name] = 1 / known.waits.standing_out(self._usual_wait(now), ENOUGH)
                continue
            if name == "prefill_tokens_per_s":
                rates["decode_drag"] = share = known.drag.value(told.decode_drag)
                found = known.drag.alone(share, _NEWEST)
            usual = 0.0
            if len(found) < ENOUGH:
                usual = 1 / rates[name] if rates[name] else self._usual(name, now)
            rates[name] = 1 / _shrunk(found, usual)
        return _Made(told, until, Rates(**rates))

    def _usual_wait(self, now: float) -> float:
        """Seconds that a believed second takes on the worker in the middle of the fleet."""
        fleet = self._fleet_of(now)
        if "drain" not in fleet:
            known = [
                each.waits
                for each in self._workers.values()
                if each.waits is not None and each.newest("drain", now) is not None
            ]
            share = min(1.0, sum(each.seen for each in known) / ENOUGH)
            fleet["drain"] = exp(share * median_low(each.middle for each in known))
        return fleet["drain"]

    def _usual(self, name: str, now: float) -> float:
        """What a unit costs in this fleet; found once for all workers of a ranking."""
        fleet = self._fleet_of(now)
        if name not in fleet:
            workers = (each.newest(name, now) for each in self._workers.values())
            costs = [cost for newest in workers if newest for cost in newest]
            fleet[name] = _shrunk(costs, 1 / getattr(DEFAULT_RATES, name))
        return fleet[name]

    def _fleet_of(self, now: float) -> dict[str, float]:
        if now != self._fleet_at:
            self._fleet.clear()
            self._fleet_at = now
        return self._fleet


def _shrunk(costs: Collection[float], usual: float) -> float:
    """The median of at least one cost, drawn to what is `usual` while there are not ENOUGH."""
    # The lower of two: what goes wrong with a measurement makes it too long.
    own = median_low(costs)
    share = min(1.0, len(costs) / ENOUGH)
    return own if share == 1 else exp(share * log(own) + (1 - share) * log(usual))
