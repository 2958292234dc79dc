"""How fast each worker was with its last requests, so that a mixed fleet needs no tuning.

What is learned counts for FORGET_S after the last request that taught it. Then the worker's own
word, or else what is usual, counts again: a worker that was slow once gets no requests that could
show that it is fast now, so its past must not be held against it for ever.
"""

from collections.abc import Collection
from typing import Final, NamedTuple

from kvtier.core.score import Rates
from kvtier.core.tiers import Tier

FORGET_S: Final = 30.0
_WEIGHT: Final = 0.3  # of the latest request in the running mean
_LEAST_TOKENS: Final = 128  # of a prefill: fewer take about as long as one, and teach no speed
_LEAST_S: Final = 0.001  # a shorter time says nothing about a speed

_OF_TIER: Final = {
    Tier.HOST: "host_bytes_per_s",
    Tier.DISK: "disk_bytes_per_s",
    Tier.SHARED: "shared_bytes_per_s",
}


class Sample(NamedTuple):
    """What one request took on a worker, up to its first token."""

    computed_tokens: int
    prefill_s: float
    loaded: tuple[tuple[Tier, int], ...] = ()  # bytes from each lower tier
    load_s: float = 0.0


class _Worker:
    """Running means of seconds per unit, by the rate's name, and when each was last taught."""

    def __init__(self) -> None:
        self.costs: dict[str, tuple[float, float]] = {}

    def teach(self, name: str, amount: float, seconds: float, now: float) -> None:
        if amount <= 0 or not _LEAST_S <= seconds < 1e6:
            return
        cost = seconds / amount
        known = self.costs.get(name)
        if known is not None and now - known[1] < FORGET_S:
            cost = _WEIGHT * cost + (1 - _WEIGHT) * known[0]
        self.costs[name] = cost, now


class Learned:
    """What requests taught about each worker. Time is passed in.

    Means are of costs (seconds a token, seconds a byte), not of speeds: so a request counts by
    the time that it took.
    """

    def __init__(self) -> None:
        self._workers: dict[str, _Worker] = {}

    def observe(self, worker: str, sample: Sample, now: float) -> None:
        """A request on `worker` got its first token.

        A load from several tiers at once tells the speed of none.
        """
        known = self._workers.setdefault(worker, _Worker())
        if sample.computed_tokens >= _LEAST_TOKENS:
            known.teach("prefill_tokens_per_s", sample.computed_tokens, sample.prefill_s, now)
        if len(sample.loaded) == 1:
            ((tier, nbytes),) = sample.loaded
            if tier in _OF_TIER:
                known.teach(_OF_TIER[tier], nbytes, sample.load_s, now)

    def rates(self, worker: str, told: Rates, now: float) -> Rates:
        """`told`, the worker's own word, with what was learned in its place."""
        known = self._workers.get(worker)
        if known is None:
            return told
        rates = {
            "prefill_tokens_per_s": told.prefill_tokens_per_s,
            "host_bytes_per_s": told.host_bytes_per_s,
            "disk_bytes_per_s": told.disk_bytes_per_s,
            "shared_bytes_per_s": told.shared_bytes_per_s,
        }
        for name, (cost, at) in list(known.costs.items()):
            if now - at < FORGET_S:
                rates[name] = 1 / cost
            else:
                del known.costs[name]
        if not known.costs:
            del self._workers[worker]
        return Rates(
            **rates,
            peer_bytes_per_s=told.peer_bytes_per_s,
            doubles_at=told.doubles_at,
            decode_drag=told.decode_drag,
        )

    def keep_only(self, workers: Collection[str]) -> None:
        """All others are gone."""
        for worker in self._workers.keys() - set(workers):
            del self._workers[worker]
