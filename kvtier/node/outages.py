"""A lower tier that gives no answer, or that hangs, is left alone, and asked again after a while.

    a call fails: StoreUnavailable   ──►  paused  ──► after `retry_s` any question ──► answers again
    a call has not returned for      ──►  paused, ──► once all of them have returned,
    `hung_s`                              and what waits for it is let go: a page of I/O ──► ...

While a tier is paused nothing is copied into or out of it; what it holds is still known. A thread
in a call that hangs cannot be ended: there are as many as the tier has, and no more are begun.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Final

from kvtier import metrics
from kvtier.core.blocks import BlockKey
from kvtier.core.effects import Move
from kvtier.core.ledger import Ledger
from kvtier.node.movers import LowerTier, Movers
from kvtier.node.watched import WatchedStore
from kvtier.stores.base import Store

LOOKS: Final = 4  # at the calls under way, in `hung_s`

log = logging.getLogger(__name__)


class Outages:
    """Which lower tiers of a layout answer. Lives on the daemon's loop.

    Args:
        ledger: Is told to pause and resume them.
        movers: Make the calls.
        lower: The tiers; ledger tier t is lower[t - 1].
        dropped: Told of moves that were not begun, and will not be.
        changed: Called after each word to the ledger.
    """

    def __init__(
        self,
        ledger: Ledger,
        movers: Movers,
        lower: Sequence[LowerTier],
        dropped: Callable[[Iterable[Move]], None],
        changed: Callable[[], None],
    ) -> None:
        self._ledger = ledger
        self._movers = movers
        self._lower = lower
        self._dropped = dropped
        self._changed = changed
        self._loop = asyncio.get_running_loop()
        self._hung: set[int] = set()  # with a call that does not return
        self._unproven: set[int] = set()  # that hung, and have not done any I/O since
        self._retries: dict[int, asyncio.TimerHandle] = {}
        self._watches = {tier: self._look_later(tier) for tier in range(1, len(lower) + 1)}
        self._closed = False

    def close(self) -> None:
        """Ask nobody any more."""
        self._closed = True
        for handle in (*self._retries.values(), *self._watches.values()):
            handle.cancel()

    def greet(self, tier: int) -> None:
        """Ask a tier for the first time: one that is not there is known before the first block."""
        self._ask(tier, _question, self._greeted)

    def pause(self, tier: int, why: str = "no answer") -> None:
        """A store gave no answer: leave it alone, and ask again after a while."""
        if self._ledger.paused(tier):
            return
        lower = self._lower[tier - 1]
        log.warning("%s tier: %s; going on without it", lower.tier.label, why)
        self._ledger.pause(tier)
        self._changed()
        self._retry_later(tier)

    # --- calls that do not return -----------------------------------------------------

    def _look_later(self, tier: int) -> asyncio.TimerHandle:
        return self._loop.call_later(self._lower[tier - 1].hung_s / LOOKS, self._look, tier)

    def _look(self, tier: int) -> None:
        self._watches[tier] = self._look_later(tier)
        if self._movers.stores[tier - 1].look() <= LOOKS:
            self._hung.discard(tier)
        elif tier not in self._hung:
            self._hung.add(tier)
            self._unproven.add(tier)
            lower = self._lower[tier - 1]
            metrics.STORE_HUNG.labels(lower.tier.label).inc()
            self.pause(tier, f"it hangs: no answer in {lower.hung_s:g} s")
            self._ledger.abandon(tier)
            self._dropped(self._movers.drop(tier))
            self._changed()

    # --- asking again -----------------------------------------------------------------

    def _retry_later(self, tier: int) -> None:
        if not self._closed:
            retry_s = self._lower[tier - 1].retry_s
            self._retries[tier] = self._loop.call_later(retry_s, self._retry, tier)

    def _retry(self, tier: int) -> None:
        if tier in self._hung:
            self._retry_later(tier)
        elif tier in self._unproven:
            self._ask(tier, WatchedStore.probe, partial(self._retried, proven=True))
        else:
            self._ask(tier, _question, self._retried)

    def _ask(
        self,
        tier: int,
        question: Callable[[WatchedStore], None],
        told: Callable[[int, "asyncio.Future[None]"], None],
    ) -> None:
        """Put a question to a store, to see whether it answers."""
        future = asyncio.wrap_future(self._movers.call(tier, question))
        future.add_done_callback(partial(told, tier))

    def _greeted(self, tier: int, done: "asyncio.Future[None]") -> None:
        if not done.cancelled() and (error := done.exception()) and not self._closed:
            metrics.STORE_ERRORS.labels(self._lower[tier - 1].tier.label).inc()
            self.pause(tier, str(error))

    def _retried(self, tier: int, done: "asyncio.Future[None]", *, proven: bool = False) -> None:
        if self._closed or done.cancelled():
            return
        lacks = tier in self._unproven and not proven  # it was asked before the tier hung
        if done.exception() is not None or tier in self._hung or lacks:
            self._retry_later(tier)
            return
        self._unproven.discard(tier)
        log.warning("%s tier answers again", self._lower[tier - 1].tier.label)
        self._ledger.resume(tier)
        self._changed()


def _question(store: Store) -> None:
    store.count([BlockKey(bytes(16))])
