"""What an engine asks of a node's tiers, and what of that is not settled yet."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from kvtier.core.blocks import BlockKey
from kvtier.core.breakeven import ComputeCost
from kvtier.core.ledger import Lease
from kvtier.core.policy import NO_USE, Use


@dataclass(frozen=True, slots=True)
class Reading:
    """What an engine asks of `TierManager.read`.

    The answer comes once `wanted` leading blocks are in their slots; `wait_s` is the deadline of
    the loads. With `compute` nothing is loaded that is faster computed again. `use` names the
    request, where the engine does; the time in it does not count.
    """

    client: int
    keys: Sequence[BlockKey]
    first: int
    wanted: int
    wait_s: float
    compute: ComputeCost | None = None
    use: Use = NO_USE


@dataclass(slots=True)
class Loading:
    """A read lease that is not settled, and who waits for more of it."""

    lease: Lease
    deadline: asyncio.TimerHandle
    wanted: int = 0
    waiter: asyncio.Future[None] | None = None

    def wake(self) -> None:
        """Let go whoever waits."""
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)
