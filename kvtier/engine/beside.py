"""What lies under an engine's pool, on a thread of its own: the engine never waits for a store."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

from kvtier.core.blocks import BlockKey
from kvtier.core.breakeven import ComputeCost
from kvtier.core.policy import NO_USE, Use
from kvtier.core.tiers import Tier

T = TypeVar("T")


class LowerTiers(Protocol):
    """What lies under the pool, as `engine.tier.EngineTier` offers it. No method raises.

    Block ids are rows of the pool's storage; keys are whole paths from the root. `use` names the
    request; its time does not count.
    """

    def restore(
        self,
        keys: Sequence[BlockKey],
        first: int,
        block_ids: Sequence[int],
        compute: ComputeCost | None = None,
        use: Use = NO_USE,
    ) -> list[Tier]:
        """Fill `block_ids` with keys[first:], from the first on; where each filled one was.

        `keys` may go on with what is asked for next. With `compute`, what is faster computed
        again may be left out.
        """
        ...

    def pull(
        self,
        keys: Sequence[BlockKey],
        first: int,
        node: str,
        compute: ComputeCost | None = None,
        use: Use = NO_USE,
    ) -> int:
        """Have what is not there of keys[first:] brought from another node; how many came."""
        ...

    def save(
        self, keys: Sequence[BlockKey], first: int, block_ids: Sequence[int], use: Use = NO_USE
    ) -> int:
        """Hand keys[first:], which lie in `block_ids`, down; how many were taken."""
        ...

    def bytes_per_s(self) -> dict[Tier, float]:
        """How fast restores from each tier have been. Any thread may ask, at any time."""
        ...

    def close(self) -> None:
        """Hang up."""
        ...


class Beside:
    """The one thread that calls `tiers`; what is submitted is done in that order.

    Args:
        tiers: Nobody else calls it from now on.
        on_done: Called, on that thread, each time that a future is done; must not block or raise.
    """

    def __init__(self, tiers: LowerTiers, on_done: Callable[[], None]) -> None:
        self._tiers = tiers
        self._on_done = on_done
        self._executor = ThreadPoolExecutor(1, "kvtier-tiers")

    def submit(self, work: Callable[[LowerTiers], T]) -> "Future[T]":
        """Do `work` after all that was submitted before.

        The blocks that it names must neither be written nor be handed to anyone else until the
        future is done. The caller bounds how much is under way.
        """
        future = self._executor.submit(work, self._tiers)
        future.add_done_callback(lambda _: self._on_done())
        return future

    def bytes_per_s(self) -> dict[Tier, float]:
        """See `LowerTiers.bytes_per_s`."""
        return self._tiers.bytes_per_s()

    def close(self) -> None:
        """Wait for all that was submitted, then hang up and end the thread."""
        hung_up = self._executor.submit(self._tiers.close)
        self._executor.shutdown()
        hung_up.result()
